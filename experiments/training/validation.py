"""Validation during training: feature fidelity on held-out photographs, for every backbone, and pictures."""

import torch
import torch.nn.functional as F
from omegaconf import DictConfig

from core import AnyUp
from core.backbones import Backbone
from core.hooks import MODEL_HOOKS
from experiments.data import open_data
from experiments.data.feature_cache import CachedBackbone, FeatureCache
from experiments.measuring.metrics import FidelityCase, fidelity, fidelity_case
from experiments.peers import Peer
from experiments.progress import Progress
from experiments.reports.fidelity_pictures import comparison
from experiments.reports.pictures import panel
from experiments.settings import SettingError
from experiments.tracking.store import Run
from experiments.training.views import ViewSettings

PRIMARY = "detail"
"""The measure that decides which weights are best: `experiments.measuring.detail`."""


class Validation:
    """Held-out cases, encoded once; bilinear upsampling is measured on them once.

    Args:
        config: has `val_data`, and `val_images`, the number of photographs to use.
        backbones: those of the training. views: sizes and scale of the training.
        cache: where features are looked for, and kept.
    """

    def __init__(self, config: DictConfig, backbones: list[Backbone], views: ViewSettings, cache: FeatureCache):
        self.data = data = open_data(config.val_data)
        if config.val_images < 1:
            raise SettingError(f"val_images must be at least 1, got {config.val_images}")
        count = min(config.val_images, len(data))
        names = [backbone.name for backbone in backbones]  # two models of timm are both called timm
        labels = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
        self.cases: dict[str, list[FidelityCase]] = {label: [] for label in labels}
        for index in Progress(range(count), "validation images", "image"):
            image, name = data[index].image, data.names[index]
            for label, backbone in zip(labels, backbones, strict=True):
                device = next(backbone.parameters(), torch.empty(0)).device
                encoder = CachedBackbone(backbone, cache, f"validation image {name}")
                case = fidelity_case(image.to(device), encoder, views.scale, views.view, views.guidance)
                self.cases[label].append(case)
        self.names = [data.names[index] for index in range(count)]
        self.bilinear = {name: _mean([_bilinear(case) for case in cases]) for name, cases in self.cases.items()}

    @torch.no_grad()
    def measure(self, model: AnyUp | Peer, run: Run, step: int) -> dict[str, float]:
        """`val/BACKBONE/detail` and so on, means over images; `val/detail` is the mean over backbones, and
        `val/BACKBONE/gain` the detail above bilinear upsampling's. A tracked run gets pictures of the worst images."""
        measured = {}
        for name, cases in self.cases.items():
            results = [fidelity(_upsample(model, case), case) for case in cases]
            means = _mean(results)
            measured |= {f"val/{name}/{key}": value for key, value in means.items()}
            measured[f"val/{name}/gain"] = means[PRIMARY] - self.bilinear[name][PRIMARY]
            if run.run_id:
                worst = min(range(len(cases)), key=lambda index: results[index][PRIMARY])
                self._show(
                    model, run, f"validation/{name.replace('/', '_')}/{step:06d}", cases[worst], self.names[worst]
                )
        own = [measured[f"val/{name}/{PRIMARY}"] for name in self.cases]
        measured[f"val/{PRIMARY}"] = sum(own) / len(own)
        return measured

    def _show(self, model: AnyUp | Peer, run: Run, path: str, case: FidelityCase, name: str) -> None:
        """The image on which the model does worst, and what each filler shows of itself there."""
        result = _upsample(model, case)
        run.picture(comparison(case, result, name, f"upsampled {fidelity(result, case)[PRIMARY]:.3f}"), f"{path}.png")
        for hook, learnt in _learnt(model).items():
            run.picture(panel(learnt), f"{path}_{hook}.png")


def _learnt(model: AnyUp | Peer) -> dict[str, dict[str, torch.Tensor]]:
    """What each filler shows of itself in its latest forward; the baseline's fillers, and peers, show nothing."""
    if isinstance(model, Peer):
        return {}
    shown = {hook: getattr(model, hook).pictures() for hook in MODEL_HOOKS}
    return {hook: pictures for hook, pictures in shown.items() if pictures}


def _upsample(model: AnyUp | Peer, case: FidelityCase) -> torch.Tensor:
    return model(case.guidance, case.features, case.output_size)  # (1,C,s·h,s·w)


def _bilinear(case: FidelityCase) -> dict[str, float]:
    return fidelity(F.interpolate(case.features, case.output_size, mode="bilinear"), case)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the images that have the value: one without edges has no edge error."""
    keys = dict.fromkeys(key for row in rows for key in row)  # in order: curves are compared bit for bit
    return {key: sum(row[key] for row in rows if key in row) / sum(key in row for row in rows) for key in keys}
