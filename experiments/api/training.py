"""`train`: `python -m experiments.train` with Python values."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from torch import nn

import core
from experiments.api.display import Shown, frame_html, lines_html
from experiments.api.overrides import Filler, Overrides, Paths, overrides_of, paths
from experiments.peers.recorded import settings_of
from experiments.settings import SettingError
from experiments.sweeps.arms import composed, started
from experiments.training import loop
from experiments.training.curves import plot, read_table
from experiments.training.setup import warn_of_bundled_images


class Training:
    """What a training left behind. In a notebook it shows where it stands, and its curves.

    Attributes:
        checkpoint: the weights of the last step. best: of the best validation; None without validation.
        run_id: of its run in MLflow; empty if it was not tracked.
    """

    def __init__(self, trained: loop.Trained):
        self.checkpoint, self.best, self.run_id = trained.checkpoint, trained.best, trained.run_id
        self._state, self._curves = trained.state, trained.curves

    @property
    def steps(self) -> int:
        return self._state.step

    @property
    def losses(self) -> dict[str, float]:
        """Of the last step."""
        return dict(self._state.losses)

    @property
    def validation(self) -> dict[str, float]:
        """What the last validation measured; empty without validation."""
        return dict(self._state.validation)

    @property
    def curves(self) -> pd.DataFrame:
        """Every logged value: one row for each step, one column for each name."""
        points = pd.DataFrame(read_table(self._curves), columns=["step", "name", "value"])
        return points.pivot_table(index="step", columns="name", values="value", aggfunc="last", sort=False)

    @property
    def figure(self) -> Shown:
        """Losses, and validation."""
        return Shown(plot({"training": read_table(self._curves)}))

    def model(self, best: bool = False) -> nn.Module:
        """The trained upsampler, in eval mode; with `best`, that of the best validation.

        Raises:
            SettingError: there was no validation, or a peer was trained: evaluate it by its `checkpoint`.
        """
        if best and self.best is None:
            raise SettingError("there was no validation, so there are no best weights: set validate_every")
        if settings_of(self.checkpoint) is not None:
            raise SettingError(f"{self.checkpoint} is a peer: give it to evaluate(peers={{NAME: {{...}}}})")
        return core.load(self.best if best else self.checkpoint).eval()

    def _lines(self) -> list[str]:
        seconds = f"{self._state.seconds:.0f} s of training"
        lines = [f"{self.steps} steps, {seconds}; weights: {self.checkpoint}"]
        return lines + ([f"best validation: {self.best}"] if self.best else [])

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {value:.4f}" for name, value in (self.losses | self.validation).items())
        return "\n".join([*self._lines(), f"last step: {last}"])

    def _repr_html_(self) -> str:
        last = pd.DataFrame([{**self.losses, **self.validation}])
        return lines_html(self._lines()) + self.figure.html() + frame_html(last)


def train(
    steps: int = 2000,
    *,
    attention: Filler = "window",
    unifier: Filler = "learned_basis",
    decoder: Filler = "none",
    refiner: Filler = "none",
    temporal: Filler = "none",
    objective: Filler = "cosine_mse",
    learner: Filler = "sgd",
    start: str | Path = "scratch",
    images: Paths | None = None,
    backbones: Sequence[str | dict[str, str]] = ("embedded",),
    batch_size: int = 4,
    view: int = 224,
    lr: float = 2e-4,
    validate_every: int = 500,
    seed: int = 0,
    out_dir: str | Path = "outputs/train",
    resume: str = "auto",
    tracking: bool = True,
    device: str = "auto",
    overrides: Overrides = (),
) -> Training:
    """Trains an upsampler: `python -m experiments.train` with Python values. Called again, it goes on or is finished.

    Args:
        steps: of the optimiser.
        attention, unifier, decoder, refiner, temporal, objective, learner: the filler of each hook point: its name, its
            class (which may be defined in a cell), `functools.partial(TheClass, setting=...)`, or `{"name": NAME,
            SETTING: VALUE}`.
        start: weights to start from: "scratch", "bundled", "published" (downloaded), or a file. Their ordering of
            channels comes with them; fillers that they lack are new.
        images: photographs: a folder, a file, a pattern, or several; None: the few that come with this package.
        backbones: names of encoders, or `{"name": NAME, "weights": FILE}`; one is drawn for each step.
        batch_size: images per step. view: side in pixels of what an encoder sees.
        lr: learning rate. validate_every: steps between two validations; 0: none.
        seed: of weights, crops and order.
        out_dir: of weights and curves. A training with other settings there is refused.
        resume: "auto": goes on with the training in `out_dir`; "never": starts anew, and removes it; "must".
        tracking: False: nothing is recorded in MLflow.
        device: "auto" (the GPU where there is one), "cpu", "cuda", ...
        overrides: further settings of configs/train.yaml, such as `{"optimiser.clip": 1, "views": {"guidance": 112}}`,
            or as on its command line; they win over the arguments.

    Raises:
        SettingError: a setting that cannot be, with the nearest valid name; another training in `out_dir`.
        DataError, NoImages, WeightsError, OSError, TrackingUnavailable: what they name cannot be used.
        NonFiniteLoss, NotFinite: a loss or a feature is NaN or infinite.
    """
    fillers = {"attention": attention, "unifier": unifier, "decoder": decoder, "refiner": refiner}
    fillers |= {"temporal": temporal, "objective": objective, "learner": learner}
    settings = {"steps": steps, "backbones": list(backbones), "batch_size": batch_size, "views.view": view}
    settings |= {"optimiser.lr": lr, "validate_every": validate_every, "seed": seed, "out_dir": out_dir}
    settings |= {"resume": resume, "device": device}
    settings |= {} if images is None else {"data.path": paths(images)}
    settings |= {} if tracking else {"tracking.enabled": False}
    asked = [*overrides_of("train", fillers | settings, "train"), *overrides_of("train", overrides, "overrides")]
    config = composed("train", asked)
    if str(start) != "scratch":
        config = composed("train", [*asked, *started(str(start), config, asked)])
    warn_of_bundled_images(config.data)
    return Training(loop.train(config))
