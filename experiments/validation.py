"""Validation during training: feature fidelity on held-out photographs, for every backbone, and pictures."""

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from tqdm import tqdm

from core import AnyUp
from core.backbones import Backbone
from core.hooks import MODEL_HOOKS
from experiments.data import open_data
from experiments.metrics import FidelityCase, fidelity, fidelity_case
from experiments.pictures import fit_colours, panel
from experiments.settings import SettingError
from experiments.tracking import Run
from experiments.views import ViewSettings


class Validation:
    """Held-out cases, encoded once; bilinear upsampling is measured on them once.

    Args:
        config: has `val_data`, and `val_images`, the number of photographs to use.
        backbones: those of the training. views: sizes and scale of the training.
    """

    def __init__(self, config: DictConfig, backbones: list[Backbone], views: ViewSettings):
        data = open_data(config.val_data)
        if config.val_images < 1:
            raise SettingError(f"val_images must be at least 1, got {config.val_images}")
        count = min(config.val_images, len(data))
        self.cases: dict[str, list[FidelityCase]] = {backbone.name: [] for backbone in backbones}
        for index in tqdm(range(count), desc="validation images", disable=None, leave=False):
            image = data[index].image
            for backbone in backbones:
                device = next(backbone.parameters(), torch.empty(0)).device
                case = fidelity_case(image.to(device), backbone, views.scale, views.view, views.guidance)
                self.cases[backbone.name].append(case)
        self.names = [data.names[index] for index in range(count)]
        self.bilinear = {name: _mean([_bilinear(case) for case in cases]) for name, cases in self.cases.items()}

    @torch.no_grad()
    def measure(self, model: AnyUp) -> dict[str, float]:
        """`val/BACKBONE/cosine` and so on, means over images; `val/cosine` is the mean over backbones, and
        `val/BACKBONE/gain` the cosine above bilinear upsampling's."""
        measured = {}
        for name, cases in self.cases.items():
            means = _mean([fidelity(_upsample(model, case), case) for case in cases])
            measured |= {f"val/{name}/{key}": value for key, value in means.items()}
            measured[f"val/{name}/gain"] = means["cosine"] - self.bilinear[name]["cosine"]
        measured["val/cosine"] = sum(measured[f"val/{name}/cosine"] for name in self.cases) / len(self.cases)
        return measured

    @torch.no_grad()
    def pictures(self, model: AnyUp, run: Run, step: int) -> None:
        """For each backbone the image on which the model does worst: PCA of features, target and result, and error;
        and what each filler shows of itself there."""
        for name, cases in self.cases.items():
            results = [_upsample(model, case) for case in cases]
            cosines = [fidelity(result, case)["cosine"] for result, case in zip(results, cases, strict=True)]
            worst = min(range(len(cases)), key=cosines.__getitem__)
            case, result = cases[worst], results[worst]
            colours = fit_colours([case.features, case.target])
            error = (1 - F.cosine_similarity(result, case.target, dim=1)).clamp(0, 1)  # (1,H,W)
            columns = {
                self.names[worst][:24]: case.image,
                "features": colours.paint(case.features),
                "target": colours.paint(case.target),
                f"upsampled {cosines[worst]:.3f}": colours.paint(result),
                "1 - cosine": error.expand(3, -1, -1),
            }
            path = f"validation/{name.replace('/', '_')}/{step:06d}"
            run.picture(panel(columns), f"{path}.png")
            for hook, learnt in _learnt(model, case).items():
                run.picture(panel(learnt), f"{path}_{hook}.png")


def _learnt(model: AnyUp, case: FidelityCase) -> dict[str, dict[str, torch.Tensor]]:
    """What each filler shows of itself on this image; the baseline's fillers have nothing to show."""
    showing = [hook for hook in MODEL_HOOKS if getattr(model, hook).pictures()]
    if showing:
        _upsample(model, case)  # pictures are of the latest forward
    return {hook: getattr(model, hook).pictures() for hook in showing}


def _upsample(model: AnyUp, case: FidelityCase) -> torch.Tensor:
    return model(case.guidance, case.features, case.output_size)  # (1,C,s·h,s·w)


def _bilinear(case: FidelityCase) -> dict[str, float]:
    return fidelity(F.interpolate(case.features, case.output_size, mode="bilinear"), case)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the images that have the value: one without edges has no edge error."""
    keys = {key for row in rows for key in row}
    return {key: sum(row[key] for row in rows if key in row) / sum(key in row for row in rows) for key in keys}
