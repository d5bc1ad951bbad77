"""Where a stopped video goes on: the number of its next frame, and what the temporal filler carries to it."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from core.backbones import Backbone
from core.hooks import MODEL_HOOKS
from experiments.atomic import replacing
from experiments.data.feature_cache import fingerprint
from experiments.upsampling.video import Video

log = logging.getLogger(__name__)

_SETTINGS = (*MODEL_HOOKS, "embed_dim", "max_size", "output_size", "features", "uncertainty", "dtype")


@dataclass(frozen=True)
class Bookmark:
    """A file beside a video's frames."""

    path: Path
    made_with: str
    """Digest of all that the frames depend on."""

    def write(self, frame: int, video: Video) -> None:
        """Notes that all frames before number `frame` are done."""
        tensors = {} if video.state is None else video.state.tensors()
        described = {"frame": str(frame), "made_with": self.made_with, "size": repr(video.size)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as part:
            save_file({name: tensor.cpu() for name, tensor in tensors.items()}, part, described)

    def read(self, video: Video) -> int:
        """The frame to go on with, 0 to begin; puts the state of the frame before into `video`."""
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, "pt", device=str(next(video.model.parameters()).device)) as file:
                described = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s): the video begins again", self.path, error)
            return 0
        if described.get("made_with") != self.made_with:
            log.warning("the frames in %s were made with other settings: the video begins again", self.path.parent)
            return 0
        if tensors:
            video.state = video.model.temporal.state_type.from_tensors(tensors)
            video.size = tuple(int(side) for side in described["size"].strip("()").split(","))
        return int(described["frame"])


def made_with(config: DictConfig, model: nn.Module, backbone: Backbone, video: str) -> str:
    """Digest of settings, weights, encoder and video (its fingerprint)."""
    settings = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    known = [[settings[key] for key in _SETTINGS], fingerprint(backbone), video]
    digest = hashlib.sha256(repr(known).encode())
    for name, values in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()
