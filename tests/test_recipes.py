"""Every recipe of configs/experiment: what it needs is named, what it says composes, and two steps of it run."""

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from core.registry import discover
from experiments.settings import SettingError
from experiments.sweeps.arms import composed, read_arms
from experiments.sweeps.sweep import Sweep, ablate

FOLDER = Path(__file__).resolve().parent.parent / "configs/experiment"
RECIPES = sorted(
    path.relative_to(FOLDER).with_suffix("").as_posix()
    for path in FOLDER.rglob("*.yaml")
    if path.parent.name != "base" and not path.name.startswith("leaderboard")  # tests/test_leaderboard.py
)
TRAIN = ["embed_dim=16", "attention.num_heads=2", "steps=2", "batch_size=1", "views.view=32", "views.guidance=32",
         "objective.self_consistency_size=16", "device=cpu"]  # fmt: skip
FEW = ["max_train_images=2", "max_val_images=2", "task.epochs=2"]
PROBE = [*FEW, "image_size=[64,64]", "output_size=[8,8]"]
SMALL = {
    "fidelity": ["task.view=32", "task.guidance=32", "task.scales=[2]", "max_val_images=2", "adapt.view=32",
                 "adapt.guidance=32"],
    "segmentation": [*PROBE, "encoder_size=[64,64]"],
    "depth": PROBE,
    "normals": PROBE,
    "temporal": ["image_size=[32,40]", "output_size=[8,10]"],
    "propagation": ["image_size=[32,40]", "output_size=[8,10]", "task.radius=8"],
}  # fmt: skip
SLOW = ("num_basis", "paper_ablation", "paper_ablation_rgbd", "any_to_any", "unseen_backbone", "single_to_multi",
        "preservation", "model_extensions", "model_extensions_probes", "extension_variations", "diffusion",
        "maml", "self_supervised", "detail_causes", "bilateral_prior", "parts", "seven_ideas")  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What recipes leave open, with little data made up."""
    folder = tmp_path_factory.mktemp("data")
    numbers = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(2):
            save(numbers.integers(0, 255, (64, 80, 3), np.uint8), folder / f"camvid/{split}/{i}.png")
            save(numbers.integers(0, 11, (64, 80), np.uint8), folder / f"camvid/{split}annot/{i}.png")
            save(numbers.integers(0, 255, (64, 80, 3), np.uint8), folder / f"rgbd_{split}/{i}.color.png")
            depth = (1000 + 20 * np.arange(64)[:, None] + 30 * i + np.zeros((64, 80))).astype(np.uint16)
            save(depth, folder / f"rgbd_{split}/{i}.depth.png")
    for i in range(3):
        for video in ("a", "b"):
            save(numbers.integers(0, 255, (64, 80, 3), np.uint8), folder / f"davis/JPEGImages/480p/{video}/{i}.png")
            mask = 255 * (np.arange(80) < 40 + i).astype(np.uint8) + np.zeros((64, 1), np.uint8)
            save(mask, folder / f"davis/Annotations/480p/{video}/{i}.png")
    return {
        "davis": str(folder / "davis"), "clips": str(folder / "davis/JPEGImages/480p/a"), "published": "bundled",
        "pool": "[{name: hog8}]", "image_scales": [0.75, 1, 2], "consistency_size": 16,
        "num_videos": 1, "num_frames": 3,
        "photos": "bundled", "num_train": 4, "num_test": 2, "encoder": "hog8", "camvid": str(folder / "camvid"),
        "rgbd_train": str(folder / "rgbd_train"), "rgbd_val": str(folder / "rgbd_val"), "unseen": "daisy8",
        "also": "daisy16", "shots": 2, "shots_many": 3, "intrinsics": "[60,60,40,32]", "num_scenes": 2,
        "num_test_scenes": 2,
    }  # fmt: skip


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def recipe(name):
    discover()
    made = composed("ablate", [f"experiment={name}", "tracking.enabled=false", "device=cpu"])
    OmegaConf.set_struct(made, False)
    return made


def tiny(name, given, out_dir):
    """A recipe with two steps, little data and small images; arms, tasks and seeds are its own."""
    made = recipe(name)
    for key, value in given.items():
        if key in made.keys():  # noqa: SIM118  a setting without a value is not in it
            made[key] = value
    if "steps" in made:
        made.steps = 2
    made.out_dir, made.cost, made.start = str(out_dir), None, "scratch"  # tiny models have no trained weights
    own = name in ("self_supervised", "seven_ideas")  # their arms choose the objective
    made.train = [*made.train, *(text for text in TRAIN if not (own and text.startswith("objective.")))]
    for task, overrides in made.tasks.items():
        kind = next(text for text in flat(overrides) if text.startswith("task=")).partition("=")[2]
        made.tasks[task] = [
            *made.tasks[task],
            *(FEW if (name, kind) == ("any_to_any", "segmentation") else SMALL[kind]),
        ]
    return made


def flat(values):
    return [text for value in values for text in (flat(value) if OmegaConf.is_list(value) else [value])]


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_says_can_be_understood(name, given, tmp_path):
    sweep = Sweep(tiny(name, given, tmp_path))
    assert sweep.plan.baseline in sweep.plan.competing
    assert len(sweep.plan.competing) > 1
    assert all(member.tasks for member in sweep.plan.members)


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if "base/photographs" in (FOLDER / f"{name}.yaml").read_text()]
)
def test_what_a_recipe_needs_is_asked_for_by_name(name):
    with pytest.raises(SettingError, match=r"(photos|unseen).*give it a value"):
        Sweep(recipe(name))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_it_is_run_and_what_came_out(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    header = text[: text.index("\nname:" if "defaults:" not in text else "\ndefaults:")]
    assert f"python -m experiments.ablate experiment={name}" in header
    assert "# Measured: " in header
    assert "not yet" not in header, "say what came out"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RECIPES]
)
def test_two_steps_of_a_recipe_run(name, given, tmp_path):
    made = tiny(name, given, tmp_path)
    made.seeds = [0]
    report = ablate(made)
    assert not report.results.failures
    assert {one.arm for one in report.comparisons} == {member.arm for member in Sweep(made).plan.members}


@pytest.mark.parametrize(
    ("start", "arm", "init_from", "ordering"),
    [
        ("scratch", [], None, "paper"),
        ("bundled", [], "bundled", "paper"),
        ("bundled", ["unifier.ordering=released"], "bundled_released", "released"),
        ("bundled_released", [], "bundled_released", "released"),
        ("bundled", ["unifier=none"], "bundled", None),
        ("bundled", ["attention=pyramid_window"], "bundled", "paper"),
        ("bundled", ["init_from=null"], None, "paper"),
        ("published", [], "anyup_multi_backbone", "released"),
    ],
)
def test_arms_start_from_the_weights_that_are_asked_for(start, arm, init_from, ordering, shared, monkeypatch):
    if start == "published":
        file = shared("weights/anyup_multi_backbone.pth")
        monkeypatch.setattr("core.checkpoint.fetch", lambda name: file)
    made = recipe("quickstart")
    made.start, made.arms = start, {"baseline": arm}
    training = read_arms(made)[0].training
    assert training.init_from == init_from
    assert OmegaConf.to_container(training.unifier, enum_to_str=True).get("ordering") == ordering


def test_every_recipe_that_trains_can_start_from_trained_weights(given):
    for name in set(RECIPES) - {"debug/fast", "parts", "video"}:  # whose models are small; which trains nothing
        made = recipe(name)
        for key, value in given.items():
            if key in made.keys():  # noqa: SIM118
                made[key] = value
        made.start = "bundled"
        started = [arm.training.init_from for arm in read_arms(made) if arm.training is not None]
        assert started
        assert all(source in ("bundled", "bundled_released") for source in started), name


def test_a_start_that_is_not_there_names_arm_and_names():
    made = recipe("quickstart")
    made.start = "nowhere"
    with pytest.raises(SettingError, match=r"arm baseline: checkpoint nowhere: there is no such file; known names are"):
        read_arms(made)
