"""torchvision's SqueezeNet 1.1 as a backbone.

Iandola et al., SqueezeNet: AlexNet-level accuracy with 50x fewer parameters, arXiv 1602.07360.
"""

from pathlib import Path

import torch
from torch import Tensor

from core.backbones.base import Backbone
from core.backbones.timm import RANDOM, load_strict, unavailable
from core.weight_files import read_weights


class SqueezeNetBackbone(Backbone):
    """SqueezeNet 1.1 up to its last Fire module, after ReLU. Its four layers end at strides 2, 4, 8 and 16.

    Its strided convolutions and pools have no padding. So an image of H pixels gives H/16 - 1 rows in the last layer
    (352x480 gives 21x29), row i is centred at pixel 16·i + 15, and `aligned` is False.
    """

    ends = (1, 4, 7, 12)
    """For strides 2, 4, 8 and 16: the index of the last module at this stride in torchvision's `features`."""

    def __init__(self, name: str):
        from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

        preset = SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()
        super().__init__(
            name=name,
            layer_channels=(64, 128, 256, 512),
            layer_strides=(2, 4, 8, 16),
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            aligned=False,
            min_size=32,
        )
        self.trunk = squeezenet1_1().features

    def features(self, image: Tensor, layer: int) -> Tensor:
        """As `Backbone.features`, but with one row and one column less."""
        image = image.to(self.trunk[0].weight.dtype)
        return self.trunk[: self.ends[layer] + 1](image)  # (B, C, h, w)


def load_squeezenet(name: str, weights: str | Path | None) -> SqueezeNetBackbone:
    """Builds SqueezeNet with torchvision's weights (None), those of a file, or "random". Raises: `load_backbone`."""
    backbone = SqueezeNetBackbone(name)
    if weights == RANDOM:
        return backbone
    path = _download(name) if weights is None else weights
    state, _ = read_weights(path)
    inner = {key.removeprefix("features."): value for key, value in state.items()}
    load_strict(backbone.trunk, inner, ("classifier",), f"backbone {name}: {path}")
    return backbone


def _download(name: str) -> Path:
    from torchvision.models import SqueezeNet1_1_Weights

    url = SqueezeNet1_1_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix=path.stem.split("-")[-1], progress=False)
        except OSError as error:
            way_out = f"go online, or set TORCH_HOME to a folder that contains hub/checkpoints/{path.name}"
            raise unavailable(name, url, way_out, f"it cannot be reached: {type(error).__name__}") from error
    return path
