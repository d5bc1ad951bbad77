"""`task=depth`, `task=normals`: probes for the geometry of what is seen, after Probe3D (El Banani et al., CVPR 2024).

Probe3D's gradient loss takes its strides along batch and channels; here they are along rows and columns, as in its
source (Li & Snavely, MegaDepth, CVPR 2018). Its alignment fits scale and shift; here the median alone is aligned.
"""

import math

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor

from experiments.measuring.bench import Bench, EncodedImage, EvaluationError
from experiments.measuring.probe import ProbeSettings
from experiments.measuring.probes import ProbeTask
from experiments.measuring.task import register_task
from experiments.reports.style import SEQUENTIAL
from experiments.settings import SettingError
from experiments.statistics.scores import Measure, register_measures

NUM_BINS = 256
MIN_DEPTH = 0.001
_EPS = 1e-3  # metres, added inside of logarithms
_SHRINK = (1, 2, 4, 6)  # strides of the gradient loss


class GeometryTask(ProbeTask):
    """What depth and normals share: no flips, and data sets that do not say beforehand what they hold."""

    field: str
    """Of `EncodedImage`."""

    def check(self, bench: Bench) -> None:
        """Contract: `Task.check`."""
        for role, cases in (("data", bench.train), ("val_data", bench.val)):
            if getattr(cases.cut(0), self.field) is None:
                raise SettingError(
                    f"task={self.choice} needs {self.field}, and {role}={cases.data.choice} gives none: choose another "
                    "data set"
                    + (
                        ", or set data.intrinsics (of rgbd)"
                        if (self.field, cases.data.choice) == ("normals", "rgbd")
                        else ""
                    )
                )

    def target(self, case: EncodedImage) -> Tensor:
        """Contract: `ProbeTask.target`."""
        if (values := getattr(case, self.field)) is None:
            raise EvaluationError(f"image {case.name} has no {self.field}")
        return values.float()


register_measures(
    {
        "rmse": Measure(-1, "m", "RMSE"),
        "rmse_aligned": Measure(-1, "m", "RMSE, median aligned"),
        "delta1": Measure(+1, title="δ1"),
        "delta2": Measure(+1, title="δ2"),
        "delta3": Measure(+1, title="δ3"),
        "delta1_aligned": Measure(+1, title="δ1, median aligned"),
        "delta2_aligned": Measure(+1, title="δ2, median aligned"),
        "delta3_aligned": Measure(+1, title="δ3, median aligned"),
        "angular_rmse": Measure(-1, "°", "normals RMSE"),
        "within_11_25": Measure(+1, title="normals within 11.25°"),
        "within_22_5": Measure(+1, title="normals within 22.5°"),
        "within_30": Measure(+1, title="normals within 30°"),
    }
)


@register_task("depth")
class Depth(GeometryTask):
    """Depth as a weighted mean of 256 bins from 1 mm to `max_depth`, on frozen features.

    Measured: RMSE and δ1 to δ3, as it is and with the median of each image aligned; means over images.

    Trained by the scale-invariant logarithmic loss (Eigen et al. 2014; weight 10) and, on whole images, the gradient
    loss (weight 0.5), which needs neighbours: drawn pixels have none. Depth beyond `max_depth` neither trains nor
    counts.

    Args:
        lr, weight_decay, batch_size, epochs, warmup_epochs, pixels_per_image, head, hidden: see `ProbeSettings`.
        max_depth: metres.

    Raises:
        SettingError: a value out of its range.
    """

    field = "depth"
    worst_by = "rmse"

    def __init__(
        self,
        lr: float = 5e-4,
        weight_decay: float = 0.01,
        batch_size: int = 8,
        epochs: int = 10,
        warmup_epochs: float = 1.5,
        pixels_per_image: int | None = 1024,
        head: str = "linear",
        hidden: int = 512,
        max_depth: float = 10.0,
    ):
        settings = {
            "warmup_epochs": warmup_epochs,
            "pixels_per_image": pixels_per_image,
            "head": head,
            "hidden": hidden,
        }
        super().__init__(ProbeSettings(lr, weight_decay, batch_size, epochs, **settings))
        if not MIN_DEPTH < max_depth < math.inf:
            raise SettingError(f"task.max_depth must be above {MIN_DEPTH} metres, got {max_depth}")
        self.max_depth = max_depth

    def outputs(self, bench: Bench) -> int:
        """Contract: `ProbeTask.outputs`."""
        return NUM_BINS

    def known(self, target: Tensor) -> Tensor:
        """Contract: `ProbeTask.known`."""
        return (target[:, 0] > 0) & (target[:, 0] <= self.max_depth)

    def decode(self, raw: Tensor) -> Tensor:
        """(B,256,h,w) -> (B,1,h,w) metres: the bins' mean, weighted by the positive part of the outputs (AdaBins)."""
        weights = F.relu(raw) + 0.1
        bins = torch.linspace(MIN_DEPTH, self.max_depth, NUM_BINS, device=raw.device)
        return torch.einsum("bkhw,k->bhw", weights, bins)[:, None] / weights.sum(1, keepdim=True)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Contract: `ProbeTask.loss`."""
        known = self.known(target)[:, None]  # (B,1,H,W)
        loss = 10 * scale_invariant_loss(prediction[known], target[known])
        if self.settings.pixels_per_image is None:
            loss = loss + 0.5 * gradient_loss(prediction, target, known)
        return loss

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, object]:
        """Contract: `ProbeTask.measures`."""
        known = self.known(target)[0]
        if not known.any():
            return {}
        ours, theirs = prediction[0, 0][known].double(), target[0, 0][known].double()  # (K,)
        return depth_measures(ours, theirs)

    def columns(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Contract: `ProbeTask.columns`."""
        return {"depth": self._painted(target), "prediction": self._painted(prediction)}

    def _painted(self, depth: Tensor) -> Tensor:
        colours = torch.from_numpy(colormaps[SEQUENTIAL]((depth[0, 0].cpu() / self.max_depth).numpy())[..., :3])
        return (colours * (depth[0, 0].cpu() > 0)[..., None]).permute(2, 0, 1).float()  # (3,H,W)


@register_task("normals")
class Normals(GeometryTask):
    """Surface normals on frozen features.

    Measured: RMSE of the angle in degrees, and shares within 11.25°, 22.5° and 30°; means over images.

    Trained by the angular loss with uncertainty (Bae et al., ICCV 2021): the head gives a vector and its concentration.

    Args:
        lr, weight_decay, batch_size, epochs, warmup_epochs, pixels_per_image, head, hidden: see `ProbeSettings`.

    Raises:
        SettingError: a value out of its range.
    """

    field = "normals"
    worst_by = "angular_rmse"

    def __init__(
        self,
        lr: float = 5e-4,
        weight_decay: float = 0.01,
        batch_size: int = 8,
        epochs: int = 10,
        warmup_epochs: float = 1.5,
        pixels_per_image: int | None = 1024,
        head: str = "linear",
        hidden: int = 512,
    ):
        settings = {
            "warmup_epochs": warmup_epochs,
            "pixels_per_image": pixels_per_image,
            "head": head,
            "hidden": hidden,
        }
        super().__init__(ProbeSettings(lr, weight_decay, batch_size, epochs, **settings))

    def outputs(self, bench: Bench) -> int:
        """Contract: `ProbeTask.outputs`."""
        return 4

    def known(self, target: Tensor) -> Tensor:
        """Contract: `ProbeTask.known`."""
        return target.abs().amax(1) > 0

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Contract: `ProbeTask.loss`."""
        known = self.known(target)  # (B,H,W)
        cosine = F.cosine_similarity(prediction[:, :3], target, dim=1)[known].clamp(-1 + 1e-4, 1 - 1e-4)
        return angular_loss(cosine.acos(), prediction[:, 3][known])

    def measures(self, prediction: Tensor, target: Tensor) -> dict[str, object]:
        """Contract: `ProbeTask.measures`."""
        known = self.known(target)[0]  # (H,W)
        if not known.any():
            return {}
        ours, theirs = (values[0, :3][:, known].double() for values in (prediction, target))  # (3,K)
        return angular_measures(ours, theirs)

    def columns(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Contract: `ProbeTask.columns`; x, y, z are red, green, blue, and unknown is grey."""
        unit = F.normalize(prediction[0, :3], dim=0)
        return {"normals": (target[0].cpu() + 1) / 2, "prediction": (unit.cpu() + 1) / 2}


def scale_invariant_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """(K,) metres each -> scalar: root of mean squared log ratio, less 0.85 of its squared mean (Eigen et al. 2014)."""
    ratio = torch.log(prediction + _EPS) - torch.log(target + _EPS)
    return (ratio.square().mean() - 0.85 * ratio.mean().square()).clamp(min=1e-12).sqrt()


def gradient_loss(prediction: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """(B,1,H,W) each -> scalar: differences of the log ratio two pixels apart, at four scales (MegaDepth, eq. 2)."""
    ratio = torch.where(known, torch.log(prediction + _EPS) - torch.log(target.clamp(min=0) + _EPS), 0)
    total = ratio.new_zeros(())
    for step in _SHRINK:
        values, valid = ratio[..., ::step, ::step], known[..., ::step, ::step]
        down = (values[..., 2:, :] - values[..., :-2, :]).abs() * (valid[..., 2:, :] & valid[..., :-2, :])
        across = (values[..., 2:] - values[..., :-2]).abs() * (valid[..., 2:] & valid[..., :-2])
        total = total + (down.sum() + across.sum()) / valid.sum().clamp(min=1)
    return total


def angular_loss(angle: Tensor, raw: Tensor) -> Tensor:
    """(K,) radians, (K,) output for the concentration -> scalar: negative log likelihood (Bae et al. 2021, eq. 5)."""
    kappa = F.elu(raw) + 1.01
    return (kappa * angle + torch.log1p(torch.exp(-kappa * math.pi)) - torch.log(kappa.square() + 1)).mean()


def depth_measures(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """(K,) metres predicted and true -> measures; `_aligned`: after ours were scaled to the median of theirs."""
    measured = {}
    for suffix, values in (("", ours), ("_aligned", ours * theirs.median() / ours.median())):
        worse = torch.maximum(values / theirs, theirs / values)
        measured[f"rmse{suffix}"] = (values - theirs).square().mean().sqrt().item()
        measured |= {f"delta{k}{suffix}": (worse < 1.25**k).double().mean().item() for k in (1, 2, 3)}
    return measured


def angular_measures(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """(3,K) vectors of any length -> measures of the angle between them."""
    degrees = F.cosine_similarity(ours, theirs, dim=0).clamp(-1, 1).acos().rad2deg()
    limits = {"within_11_25": 11.25, "within_22_5": 22.5, "within_30": 30}
    shares = {name: (degrees < limit).double().mean().item() for name, limit in limits.items()}
    return {"angular_rmse": degrees.square().mean().sqrt().item()} | shares
