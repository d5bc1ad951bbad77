"""`task=segmentation`: a linear probe for the class of each pixel, as JAFAR, NAF and ViT-Up evaluate upsamplers."""

import colorsys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.data import IGNORE
from experiments.measuring.bench import Bench, EncodedImage, EncodedImages, EvaluationError
from experiments.measuring.probe import ProbeSettings
from experiments.measuring.probes import ProbeTask
from experiments.measuring.task import register_task
from experiments.settings import SettingError, check_choice
from experiments.statistics.scores import Measure, register_measures

LOW_LABELS = ("pixels", "cells")


register_measures(
    {
        "miou": Measure(+1, title="mIoU"),
        "accuracy": Measure(+1, title="pixel accuracy"),
        "boundary_miou": Measure(+1, title="mIoU at boundaries"),
        "boundary_f": Measure(+1, title="boundary F"),
    }
)


@register_task("segmentation")
class Segmentation(ProbeTask):
    """Semantic segmentation by a 1x1 convolution on frozen features: mIoU, pixel accuracy, mIoU and F at boundaries.

    mIoU and accuracy are those of the whole set: intersections, unions and pixels are summed over images first. Pixels
    labelled 255 neither train nor count. The defaults are the protocol of JAFAR (Couairon et al., 2025, appendix),
    except for `pixels_per_image`.

    Args:
        lr, weight_decay, batch_size, epochs, schedule, flip, pixels_per_image: see `ProbeSettings`.
        low_labels: what the transferred probe is trained on: `pixels`, as above with bilinear features; `cells`: the
            low-resolution features as they are, with the most frequent class of each cell, which is cheapest and costs
            some points of mIoU (docs/evaluation.md).
        boundary: pixels from a pixel of another class within which a pixel counts as near a boundary, and
            an outline as found.

    Raises:
        SettingError: a value out of its range.
    """

    worst_by = "accuracy"

    def __init__(
        self,
        lr: float = 5e-4,
        weight_decay: float = 1e-5,
        batch_size: int = 4,
        epochs: int = 20,
        schedule: str = "cosine",
        flip: float = 0.5,
        pixels_per_image: int | None = 1024,
        low_labels: str = "pixels",
        boundary: int = 3,
    ):
        super().__init__(
            ProbeSettings(lr, weight_decay, batch_size, epochs, schedule, flip=flip, pixels_per_image=pixels_per_image)
        )
        if boundary < 1:
            raise SettingError(f"task.boundary must be at least 1 pixel, got {boundary}")
        check_choice("task.low_labels", low_labels, LOW_LABELS)
        self.boundary, self.cell_targets = boundary, low_labels == "cells"

    def check(self, bench: Bench) -> None:
        """Contract: `Task.check`."""
        for role, cases in (("data", bench.train), ("val_data", bench.val)):
            if not cases.data.classes:
                raise SettingError(
                    f"task=segmentation needs labels, and {role}={cases.data.choice} has none: choose another data set"
                )
        known, other = bench.train.data.classes, bench.val.data.classes
        if known != other:
            raise SettingError(
                f"data has the classes {_some(known)}, val_data {_some(other)}: a probe cannot be trained on the one "
                "and measured on the other"
            )
        if len(known) < 2:
            raise SettingError(f"data={bench.train.data.choice} has the one class {known[0]}: nothing to tell apart")

    def outputs(self, bench: Bench) -> int:
        """Contract: `ProbeTask.outputs`."""
        return len(bench.train.data.classes)

    def usable(self, cases: EncodedImages) -> list[int]:
        """Contract: `ProbeTask.usable`; refuses a set of which all labelled pixels have one class."""
        usable = super().usable(cases)
        first = _classes(self.target(cases.cut(usable[0])))
        if len(first) == 1 and all(torch.equal(_classes(self.target(cases.cut(i))), first) for i in usable):
            name = cases.data.classes[int(first)]
            raise EvaluationError(f"all labelled pixels of {len(usable)} training images are {name}: nothing to learn")
        return usable

    def target(self, case: EncodedImage) -> Tensor:
        """(1,1,H,W) uint8."""
        if case.labels is None:
            raise EvaluationError(f"image {case.name} has no labels")
        return case.labels

    def of_cells(self, target: Tensor, size: tuple[int, int]) -> Tensor:
        """(1,1,H,W) -> (1,1,*size) most frequent class of each cell; `IGNORE` counts as one."""
        present = target.unique()
        each = torch.cat([(target == label).float() for label in present], 1)  # (1,classes here,H,W)
        return present[F.interpolate(each, size, mode="area").argmax(1, keepdim=True)]  # (1,1,*size)

    def known(self, target: Tensor) -> Tensor:
        """Contract: `ProbeTask.known`."""
        return target[:, 0] != IGNORE

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, averaged over the labelled pixels of all images together."""
        return F.cross_entropy(prediction, target[:, 0].long(), ignore_index=IGNORE)

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, object]:
        """(1,classes,H,W) logits, (1,1,H,W) -> intersections and unions by class, correct and labelled pixels."""
        predicted, labels = prediction.argmax(1).cpu(), target[:, 0].cpu().long()  # (1,H,W)
        classes = prediction.shape[1]
        whole = _overlaps(predicted, labels, classes)
        edge = torch.where(near_boundary(labels, self.boundary), labels, IGNORE)
        correct, labelled = (predicted == labels).sum().item(), (labels != IGNORE).sum().item()
        accuracy = {"accuracy": (float(correct), float(labelled))} if labelled else {}
        outlines = boundary_f(predicted[0].numpy(), labels[0].numpy(), self.boundary)
        of_outlines = {} if outlines is None else {"boundary_f": outlines}
        return {"miou": whole, "boundary_miou": _overlaps(predicted, edge, classes)} | accuracy | of_outlines

    def columns(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Contract: `ProbeTask.columns`; unlabelled pixels are black."""
        colours = palette(prediction.shape[1])  # (classes,3)
        labels = target[0, 0].cpu().long()
        shown = colours[labels.clamp(max=len(colours) - 1)] * (labels != IGNORE)[..., None]
        predicted = colours[prediction[0].argmax(0).cpu()]
        return {"labels": shown.permute(2, 0, 1), "prediction": predicted.permute(2, 0, 1)}


def near_boundary(labels: Tensor, distance: int) -> Tensor:
    """(B,H,W) int64 -> bool: labelled pixels with another class at most `distance` pixels away in rows and columns."""
    window = {"kernel_size": 2 * distance + 1, "stride": 1, "padding": distance}
    known = labels != IGNORE
    highest = F.max_pool2d(torch.where(known, labels, -1).float(), **window)
    lowest = -F.max_pool2d(-torch.where(known, labels, 2 * IGNORE).float(), **window)
    return known & (highest != lowest)


def boundary_f(predicted: np.ndarray, labels: np.ndarray, distance: float) -> float | None:
    """The boundary F-measure of an image (Csurka, Larlus & Perronnin, BMVC 2013), the mean over its classes.

    Precision is the share of a class's predicted outline at most `distance` pixels from its true outline. Recall is the
    share of the true outline that near to the predicted one. Unlabelled pixels belong to no class and make no outline.

    Args:
        predicted, labels: (H,W) integers, `IGNORE` in `labels` where nothing is known.

    Returns:
        Between 0 and 1; None for an image without any outline.
    """
    from scipy.ndimage import distance_transform_edt

    known, found = labels != IGNORE, []
    for label in np.unique(labels[known]):
        true, ours = (_outline((classes == label) & known, known) for classes in (labels, predicted))
        if not true.any():
            continue
        if not ours.any():
            found.append(0.0)
            continue
        precision = (distance_transform_edt(~true)[ours] <= distance).mean()
        recall = (distance_transform_edt(~ours)[true] <= distance).mean()
        found.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return float(np.mean(found)) if found else None


def _outline(inside: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(H,W) bool: pixels inside that have a known pixel outside above, below, left or right of them."""
    outside = np.pad(known & ~inside, 1)
    beside = outside[:-2, 1:-1] | outside[2:, 1:-1] | outside[1:-1, :-2] | outside[1:-1, 2:]
    return inside & beside


def palette(count: int) -> Tensor:
    """(count,3) RGB in [0,1]: hues a golden angle apart, so that neighbours in number differ."""
    hues = ((i * 0.6180339887) % 1 for i in range(count))
    return torch.tensor([colorsys.hsv_to_rgb(hue, 0.6 + 0.4 * (i % 2), 0.95) for i, hue in enumerate(hues)])


def _overlaps(predicted: Tensor, labels: Tensor, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(1,H,W) each -> intersection and union, (classes,) pixels."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # takes seconds to import

    counts = multiclass_confusion_matrix(predicted, labels, classes, ignore_index=IGNORE, validate_args=False)
    both = counts.diag()  # (classes,)
    return both.double().numpy(), (counts.sum(0) + counts.sum(1) - both).double().numpy()


def _classes(target: Tensor) -> Tensor:
    found = target.unique()
    return found[found != IGNORE]


def _some(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:3]) + (f", ... ({len(classes)})" if len(classes) > 3 else "")
