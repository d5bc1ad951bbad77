"""The images of an adaptation: those that a model is adapted to, and those that are held out and measured on."""

from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import core
from core import Learner
from core.adaptation import DESCENTS, AfterStep, default_objective, support_of
from core.backbones import Backbone, imagenet_normalize
from core.batch import Batch
from core.training import all_losses
from experiments.data import DataSet
from experiments.data.feature_cache import CachedBackbone, FeatureCache
from experiments.data.image_files import centre_square, resized
from experiments.measuring.detail import detail_measures
from experiments.measuring.metrics import FidelityError, fidelity_case
from experiments.progress import Progress
from experiments.settings import SettingError, check_choice, check_count

TARGETS = ("features", "encoder")
"""What is to be reached: the given features, from their averages; or finer ones, which the encoder gives."""


@dataclass(frozen=True)
class Example:
    """One encoded image."""

    name: str
    image: Tensor
    """(1,3,G,G) guidance, ImageNet-normalised."""
    features: Tensor
    """(1,C,h,w)."""
    target: Tensor | None
    """(1,C,s·h,s·w), as `task=fidelity` has it; None where nobody looks at it."""


def check_adaptation(settings: DictConfig) -> None:
    """Refuses settings of an adaptation that cannot be.

    Raises:
        SettingError: names the setting and what it may be.
    """
    check_choice("targets", settings.targets, TARGETS)
    check_choice("descent", settings.descent, tuple(DESCENTS))
    for name, least in (("steps", 0), ("images_per_step", 1), ("scale", 2), ("view", 1)):
        check_count(name, settings[name], least)
    if not isinstance(settings.lr, int | float) or not settings.lr > 0:
        raise SettingError(f"lr must be a number above 0, got {settings.lr}")


class Images:
    """Some images of a data set, encoded.

    Args:
        indices: which. settings: view, guidance, scale, targets and scales as in configs/adapt.yaml.
        cache: where features are looked for, and kept. finer: whether targets at the higher resolution are needed.
        title: of the progress.

    Raises:
        SettingError: the backbone refuses the size of the views.
    """

    def __init__(
        self,
        data: DataSet,
        indices: range,
        backbone: Backbone,
        settings: DictConfig,
        cache: FeatureCache,
        finer: bool,
        title: str,
    ):
        self.settings, self.device = settings, next(backbone.parameters(), torch.empty(0)).device
        self.examples = [
            self._encoded(data[i].image[None].to(self.device), data.names[i], backbone, cache, finer)
            for i in Progress(indices, title, "image")
        ]

    def _encoded(self, image: Tensor, name: str, backbone: Backbone, cache: FeatureCache, finer: bool) -> Example:
        encoder, c = CachedBackbone(backbone, cache, name), self.settings
        guidance = c.guidance or c.view
        try:
            if finer:
                case = fidelity_case(image, encoder, c.scale, c.view, guidance)
                return Example(name, case.guidance, case.features, case.target)
            square = centre_square(image, c.scale * c.view)  # (1,3,s·view,s·view)
            features = encoder(resized(square, (c.view, c.view)))
            return Example(name, imagenet_normalize(resized(square, (guidance, guidance))), features, None)
        except FidelityError as error:
            raise SettingError(f"{name}: {error}") from error
        except ValueError as error:
            raise SettingError(f"backbone={backbone.name} cannot encode {name}: {error}") from error

    def given(self) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
        """Images, features and targets, as `core.adapt` takes them."""
        e = self.examples
        targets = [one.target for one in e] if self.settings.targets == "encoder" else None
        return [one.image for one in e], [one.features for one in e], targets

    def adapt(self, model: nn.Module, learner: Learner | None = None, after_step: AfterStep | None = None) -> nn.Module:
        """The model adapted to these images, as the settings say (also steps, lr, descent, parts, images_per_step).

        Raises:
            SettingError: a setting that cannot work; the message says what may be.
        """
        s = self.settings
        try:
            return core.adapt(
                model,
                *self.given(),
                steps=s.steps,
                lr=s.lr,
                descent=s.descent,
                parts=list(s.parts),
                scales=list(s.scales),
                images_per_step=s.images_per_step,
                learner=learner,
                after_step=after_step,
            )
        except ValueError as error:
            raise SettingError(str(error)) from error

    @torch.no_grad()
    def measure(self, model: nn.Module) -> list[dict[str, float]]:
        """For each image: the loss that is minimised, and where finer features are known, the detail correlation."""
        was_training, objective = model.training, default_objective()
        model.eval()
        measured = []
        for example, tasks in zip(self.examples, self._tasks(), strict=True):
            found = {
                "loss": sum(float(sum(all_losses(model, objective, task).values())) for task in tasks) / len(tasks)
            }
            if example.target is not None:
                size = tuple(example.target.shape[-2:])
                output = model(example.image, example.features, size)
                found |= detail_measures(output, example.target, tuple(example.features.shape[-2:]))
            measured.append({key: found[key] for key in ("loss", "detail") if key in found})
        model.train(was_training)
        return measured

    def _tasks(self) -> list[list[Batch]]:
        return support_of(*self.given(), list(self.settings.scales))
