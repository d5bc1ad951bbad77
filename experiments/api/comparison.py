"""`compare`: one idea against the baseline in one call."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import core
from core.hooks import HOOK_POINTS, MODEL_HOOKS
from core.registry import choices
from experiments.api.ablation import Ablation, ablate
from experiments.api.names import unknown
from experiments.api.overrides import Filler, Overrides, Paths, described, filler_name, paths
from experiments.data.image_files import collect
from experiments.settings import SettingError, check_count
from experiments.sweeps.arms import STARTS

_NUM_SCENES = 12


def compare(
    filler: Filler,
    *,
    start: str | Path = "bundled",
    images: Paths | None = None,
    num_test: int | None = None,
    backbone: str | Mapping[str, str] = "embedded",
    steps: int = 30,
    only_filler: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
    lr: float = 1e-3,
    batch_size: int = 2,
    view: int = 128,
    guidance: int = 64,
    peers: Sequence[str] = ("bilinear",),
    name: str | None = None,
    out_dir: str | Path | None = None,
    tracking: bool = True,
    device: str = "auto",
    train: Mapping[str, Any] | None = None,
    overrides: Overrides = (),
) -> Ablation:
    """Compares an idea with the baseline: same weights to start from, same images, same steps and seeds.

    It is an ablation with two arms and one task, feature fidelity at twice the encoder's resolution. Called again, it
    repeats nothing that is finished; a class that was defined anew, in a cell, is another idea and is computed.

    Args:
        filler: a registered class, which may be defined in a cell; `functools.partial(TheClass, setting=...)`; a name,
            "inr" or "decoder=inr"; or settings of its arm, `{"decoder": "inr", "attention": "global"}`.
        start: the weights that both start from: "bundled", "published" (downloaded), a file, or "scratch".
        images: a folder, a file, a pattern, or several. The first are trained on, the last `num_test` measured.
            None: trained on the photographs that come with this package, measured on 12 procedural scenes.
        num_test: None: a quarter of `images`, at least one.
        backbone: the encoder: its name, such as "dinov2_vits14", or `{"name": NAME, "weights": FILE}`.
        steps: of each training. 0: nothing is trained, and both are measured with the weights of `start`, which is
            possible for a filler that they can be loaded into.
        only_filler: train the idea's own weights alone; the baseline is then `start` as it is.
        seeds: of the trainings. lr: learning rate. batch_size: images per step.
        view, guidance: sides in pixels of what the encoder sees, and of the guidance image.
        peers: other methods in the table.
        name: of the sweep ["compare_FILLER"]. out_dir: of its files ["outputs/ablate/NAME"].
        tracking: False: nothing is recorded in MLflow.
        device: "auto" (the GPU where there is one), "cpu", "cuda", ...
        train: further settings of both trainings (configs/train.yaml).
        overrides: further settings of configs/ablate.yaml.

    Raises:
        SettingError: an unknown name, with the nearest valid one; too few images; a filler that cannot be measured in
            this way. Otherwise as `ablate`.
    """
    check_count("steps", steps, 0)
    arm = _arm(filler)
    idea = "_".join(re.sub(r"[^\w.-]", "_", str(filler_name(value))) for value in arm.values()) or "idea"
    if idea == "baseline":
        raise SettingError("baseline is the name of the other arm: register the class under another name")
    encoder = {"name": backbone} if isinstance(backbone, str) else dict(backbone)
    trained_on, measured_on = _data(images, num_test)
    task = {"task": {"name": "fidelity", "view": view, "guidance": guidance, "scales": [2]}, "backbone": encoder}
    of_training = {
        "steps": steps, "batch_size": batch_size, "backbones": [encoder], "views.view": view,
        "views.guidance": guidance, "optimiser.lr": lr, "optimiser.clip": 1, "objective.self_consistency": 0,
        "validate_every": 0,
    }  # fmt: skip
    if "objective" in arm:
        del of_training["objective.self_consistency"]
    arms: dict[str, Overrides] = {"baseline": {}, idea: arm}
    if steps == 0 or only_filler:
        arms = _measured_as_they_are(arm, idea, str(start), steps)
    settings = dict(train or {})
    return ablate(
        arms,
        {"fidelity": task | {"val_data": measured_on}},
        name=name or f"compare_{idea}",
        start=start,
        train=(of_training | {"data": trained_on} | settings) if steps else {},
        seeds=seeds,
        peers=list(peers),
        out_dir=out_dir,
        tracking=tracking,
        device=device,
        overrides=overrides or {"cost": None},
    )


def _arm(filler: Filler) -> dict[str, Any]:
    """The settings of the idea's arm."""
    if isinstance(filler, str):
        hook, _, name = filler.rpartition("=")
        homes = {hook: choices(hook)} if hook in HOOK_POINTS else {hook: choices(hook) for hook in HOOK_POINTS}
        found = [hook for hook, known in homes.items() if name in known]
        if not found:
            raise unknown("the filler", name, dict.fromkeys(name for known in homes.values() for name in known))
        if len(found) > 1:
            raise SettingError(f"{name} fills {' and '.join(found)}: say which, such as {found[0]}={name}")
        return {found[0]: name}
    if isinstance(filler, Mapping):
        return dict(filler)
    hook = getattr(getattr(filler, "func", filler), "hook", "")
    return {hook: described(hook, filler)}


def _data(images: Paths | None, num_test: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The data to train on and to measure on."""
    if images is None:
        if num_test is not None:
            raise SettingError("num_test divides images: give images=FOLDER, or leave it out")
        scenes = {"name": "scenes", "num": _NUM_SCENES, "size": [256, 256], "split": "val"}
        return {"name": "images"}, scenes
    count = len(collect(paths(images)))
    if num_test is None:
        num_test = max(1, count // 4)
    check_count("num_test", num_test)
    if count <= num_test:
        raise SettingError(
            f"images has {count}, and {num_test} to measure on leaves none to train on: give more images"
        )
    of_images = {"name": "images", "path": paths(images)}
    return of_images | {"last": count - num_test}, of_images | {"first": count - num_test}


def _measured_as_they_are(arm: dict[str, Any], idea: str, start: str, steps: int) -> dict[str, Overrides]:
    """Both arms, of which the baseline, and with no steps the idea as well, is the weights as they are."""
    hooks = [hook for hook in arm if hook in MODEL_HOOKS]
    if not hooks or start == "scratch":
        what = "has weights to measure" if start == "scratch" else "changes the model"
        raise SettingError(f"with steps=0 or only_filler=True, nothing {what}: leave these out")
    checkpoint = {"checkpoint": STARTS.get(start, start)}
    if steps == 0:
        return {"baseline": checkpoint, idea: checkpoint | arm}
    parts = [name for name, _ in core.build().named_children() if name not in hooks]
    return {"baseline": checkpoint, idea: arm | {"freeze": parts}}
