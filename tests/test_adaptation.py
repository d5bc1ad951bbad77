"""`core.adapt` and deltas: steps by hand, what may be given, and that base and delta are the adapted model."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import core
from core.adaptation import support_of
from core.delta import DELTA_FORMAT
from core.training import CosineMSE, all_losses, cosine_mse

SMALL = ["embed_dim=8", "unifier.num_basis=8", "attention.num_heads=2"]


@pytest.fixture
def model(perturbed) -> core.AnyUp:
    return perturbed(core.build(SMALL)).eval()


def support(count: int = 3, channels: int = 5, side: int = 8, dtype: torch.dtype = torch.float32):
    drawn = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(shape, generator=drawn).to(dtype)  # noqa: E731
    return draw(count, 3, 16, 16), draw(count, channels, side, side), draw(count, channels, 2 * side, 2 * side)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_targets", [False, True])
def test_a_step_written_by_hand(model, with_targets):
    """One sgd step on all images: the gradient of the mean loss over images and scales, in float64."""
    model = model.double()
    images, features, targets = support(dtype=torch.float64)
    given = (images, features, targets) if with_targets else (images, features)
    adapted = core.adapt(model, *given, steps=1, lr=0.1, descent="sgd", scales=(2, 4), images_per_step=3)
    by_hand, total = copy.deepcopy(model), 0
    for i in range(3):
        image, whole = images[i : i + 1], features[i : i + 1]
        if with_targets:
            pairs = [(whole, targets[i : i + 1])]
        else:
            pairs = [(F.avg_pool2d(whole, scale), whole) for scale in (2, 4)]
        for coarse, fine in pairs:
            output = by_hand(image, coarse, tuple(fine.shape[-2:]))
            pooled = F.adaptive_avg_pool2d(output, coarse.shape[-2:])
            loss = cosine_mse(output, fine) + 0.1 * cosine_mse(pooled, coarse)
            total = total + loss / (3 * len(pairs))
    total.backward()
    norm = torch.cat([weight.grad.flatten() for weight in by_hand.parameters()]).norm()
    rate = 0.1 * min(1.0, 1 / (norm.item() + 1e-6))  # a gradient longer than 1 is scaled down to it, as PyTorch does
    for (name, weight), ours in zip(by_hand.named_parameters(), adapted.parameters(), strict=True):
        torch.testing.assert_close(ours, weight - rate * weight.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_a_target_vector_without_range_does_not_throw_the_model_away(model):
    """As HOG's of a flat cell: the squared error is divided by its range, so the gradient is huge."""
    images, features, targets = support()
    targets[0, :, :4, :4] = 0.5
    adapted = core.adapt(model, images, features, targets, steps=3, lr=1.0)
    moved = sum(
        (ours - theirs).square().sum() for ours, theirs in zip(adapted.parameters(), model.parameters(), strict=True)
    )
    assert 0 < moved.sqrt() <= 3 * (1 + 1e-5), "three steps, none longer than the rate"


def test_a_gradient_that_is_not_finite_is_told(model):
    images, features, targets = support()
    targets[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="gradient of step 1 is not finite; lower lr"):
        core.adapt(model, images, features, targets, steps=1)


def test_the_given_model_is_not_changed_and_steps_lower_the_loss(model):
    images, features, _ = support()
    before = copy.deepcopy(model)

    @torch.no_grad()
    def loss(which: torch.nn.Module) -> float:
        tasks = [task for tasks in support_of(images, features) for task in tasks]
        return sum(float(sum(all_losses(which, CosineMSE(0.0), task).values())) for task in tasks)

    told = []
    adapted = core.adapt(
        model,
        images,
        features,
        steps=5,
        lr=1e-3,
        descent="adamw",
        after_step=lambda step, now: told.append((step, loss(now))),
    )
    assert same(model, before)
    assert not adapted.training
    assert all(weight.grad is None for weight in (*model.parameters(), *adapted.parameters()))
    assert [step for step, _ in told] == [0, 1, 2, 3, 4, 5]
    assert told[0][1] == pytest.approx(loss(model), rel=1e-6)
    assert told[-1][1] < told[0][1]
    again = core.adapt(model, images, features, steps=5, lr=1e-3, descent="adamw")
    assert same(adapted, again)


def test_no_steps_are_the_base_exactly(model):
    images, features, _ = support()
    assert same(core.adapt(model, images, features, steps=0), model)


def test_only_chosen_parts_change(model):
    images, features, _ = support()
    model.unifier.requires_grad_(False)
    for parts, moved in ((["attention.conv"], ("attention.conv.",)), ([], ())):
        adapted = core.adapt(model, images, features, steps=1, parts=parts)
        for (name, ours), theirs in zip(adapted.named_parameters(), model.parameters(), strict=True):
            free = name.startswith(moved) if moved else not name.startswith("unifier.")
            assert torch.equal(ours, theirs) != free, name


def test_every_image_is_seen_in_each_pass(model, monkeypatch):
    """7 images, 2 in each step: after 7 steps each was seen twice."""
    seen = []
    real = core.adaptation.gradients

    def watched(which, objective, batches, weights):
        seen.extend(float(batch.image.sum()) for batch in batches)
        return real(which, objective, batches, weights)

    monkeypatch.setattr("core.adaptation.gradients", watched)
    images, features, targets = support(7)
    core.adapt(model, images, features, targets, steps=7, images_per_step=2)
    assert len(seen) == 14
    assert all(seen.count(value) == 2 for value in seen)
    assert len(set(seen[:7])) == 7


def test_images_may_differ_in_size(model):
    images, features, _ = support(2)
    mixed = [images[0], F.interpolate(images[1:], (20, 12))], [features[0], features[1:, :, :, :6]]
    adapted = core.adapt(model, *mixed, steps=1, scales=[2])
    assert all(torch.isfinite(weight).all() for weight in adapted.parameters())


def test_a_learner_adapts_with_its_rates(model):
    learner = core.build_filler("learner", {"name": "maml", "inner_steps": 1, "rates": "tensor", "inner_lr": 0.2})
    learner.prepare(model)
    images, features, targets = support()
    ours = core.adapt(model, images, features, targets, learner=learner)
    plain = core.adapt(model, images, features, targets, steps=1, lr=0.2, descent="sgd")
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def refused(case: str) -> tuple[tuple, dict]:
    images, features, targets = support()
    wide = torch.randn(1, 6, 8, 8)
    return {
        "no images": ((images[:0], features[:0]), {}),
        "fewer features": ((images, features[:2]), {}),
        "mixed channels": ((list(images), [*features[:2], wide[0]]), {}),
        "targets of another encoder": ((images, features, targets[:, :4]), {}),
        "too small": ((images, features[..., :6]), {}),
        "flat": ((images, features.flatten(2)), {}),
        "unknown part": ((images, features), {"parts": ["head"]}),
        "frozen part": ((images, features), {"parts": ["decoder"]}),
        "negative steps": ((images, features), {"steps": -1}),
        "no scale": ((images, features), {"scales": []}),
        "unknown descent": ((images, features), {"descent": "adam"}),
    }[case]


MESSAGES = {
    "no images": r"adapt needs at least one image, got none",
    "fewer features": r"features and targets of each image, got \{'images': 3, 'features': 2\}",
    "mixed channels": r"of one encoder, got some of 5, 6 channels: adapt to each encoder by itself",
    "targets of another encoder": r"of one encoder, got some of 4, 5 channels",
    "too small": r"features of 8x6 cells are too small for scale 4: 8 rows and columns .*leave the scale out",
    "flat": r"features must be \(N, channels, rows, columns\)",
    "unknown part": r"the model has no part 'head'; there are: image_encoder, .*attention",
    "frozen part": r"parts=\['decoder'\]: nothing to adapt",
    "negative steps": r"adapt needs steps >= 0, lr > 0",
    "no scale": r"scales must be whole numbers from 2, got \[\]",
    "unknown descent": r"descent must be one of sgd, adamw, got 'adam'",
}


@pytest.mark.parametrize("case", MESSAGES)
def test_what_cannot_be_adapted_to_is_refused(model, case):
    given, settings = refused(case)
    with pytest.raises(ValueError, match=MESSAGES[case]):
        core.adapt(model, *given, **settings)


# --- deltas ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(model, tmp_path) -> Path:
    core.save(model, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def adapted(model) -> core.AnyUp:
    images, features, _ = support()
    return core.adapt(model, images, features, steps=2, parts=["attention"])


def test_base_and_delta_are_the_adapted_model(base, adapted, tmp_path):
    changed = core.save_delta(adapted, tmp_path / "delta.safetensors", base)
    assert set(changed) == {name for name, _ in adapted.named_parameters() if name.startswith("attention.")}
    assert load_file(tmp_path / "delta.safetensors").keys() == set(changed)
    assert same(core.load(tmp_path / "delta.safetensors"), adapted)
    assert (tmp_path / "delta.safetensors").stat().st_size < base.stat().st_size / 2
    warm = core.build(SMALL)
    assert core.warm_start(warm, tmp_path / "delta.safetensors") == []
    assert same(warm, adapted)


def test_a_delta_finds_its_base_where_it_was_beside_it_or_as_told(base, adapted, tmp_path):
    away, other = tmp_path / "away", tmp_path / "other.safetensors"
    away.mkdir()
    core.save_delta(adapted, away / "delta.safetensors", base)
    base.rename(other)
    with pytest.raises(FileNotFoundError, match=r"changes weights of .*put base.safetensors beside it"):
        core.load(away / "delta.safetensors")
    assert same(core.load(other, {"delta": away / "delta.safetensors"}), adapted)
    other.rename(away / "base.safetensors")
    assert same(core.load(away / "delta.safetensors"), adapted)


def test_a_delta_refuses_another_base(base, adapted, tmp_path, perturbed):
    core.save_delta(adapted, tmp_path / "delta.safetensors", base)
    for i, overrides in enumerate((SMALL, [*SMALL, "unifier.ordering=released"])):
        another = tmp_path / f"{i}.safetensors"
        other = perturbed(core.build(overrides), seed=1 - i)  # the second one has the same weights
        core.save(other, another)
        with pytest.raises(core.WeightsError, match=r"delta.safetensors was made from .*base.* another model"):
            core.load(another, {"delta": tmp_path / "delta.safetensors"})
    core.save(perturbed(core.build(SMALL), seed=1), base)  # the file was replaced
    with pytest.raises(core.WeightsError, match="another model"):
        core.load(tmp_path / "delta.safetensors")
    with pytest.raises(core.WeightsError, match=r"base.safetensors is no delta, so it has no base"):
        core.load(tmp_path / "0.safetensors", {"delta": base})


def test_the_same_base_in_another_file_is_the_same(base, adapted, tmp_path):
    """Saved again, and by a later version that writes one more setting: what counts is the content."""
    core.save_delta(adapted, tmp_path / "delta.safetensors", base)
    with safe_open(base, "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    del config["attention"]["window_ratio"]
    config["seed"] = 5
    save_file(load_file(base), tmp_path / "again.safetensors", metadata | {"config": json.dumps(config)})
    assert same(core.load(tmp_path / "again.safetensors", {"delta": tmp_path / "delta.safetensors"}), adapted)


def test_bundled_weights_are_a_base_by_name(tmp_path):
    model = core.AnyUp.from_pretrained()
    images, features, _ = support()
    adapted = core.adapt(model, images, features, steps=1, parts=["rotary"])
    core.save_delta(adapted, tmp_path / "delta.safetensors", "bundled")
    assert (tmp_path / "delta.safetensors").stat().st_size < 5000
    assert same(core.load(tmp_path / "delta.safetensors"), adapted)
    changed = core.load(tmp_path / "delta.safetensors", {"attention.window_ratio": 0.2})
    assert changed.attention.window_ratio == 0.2
    assert torch.equal(changed.rotary.freqs, adapted.rotary.freqs)


def test_nothing_changed_is_a_delta_without_tensors(base, model, tmp_path):
    assert core.save_delta(model, tmp_path / "none.safetensors", base) == []
    assert same(core.load(tmp_path / "none.safetensors"), model)


def test_what_is_no_adaptation_of_the_base_is_refused(base, model, tmp_path):
    for overrides in ([*SMALL, "attention=global"], [*SMALL, "unifier.ordering=released"], ["embed_dim=16"]):
        with pytest.raises(ValueError, match=r"other fillers, settings or weights than .*save it whole"):
            core.save_delta(core.build(overrides), tmp_path / "delta.safetensors", base)
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        core.save_delta(model, tmp_path / "delta.pth", base)


def test_a_damaged_delta_is_named(base, adapted, tmp_path):
    path = tmp_path / "delta.safetensors"
    core.save_delta(adapted, path, base)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == DELTA_FORMAT
    save_file({"nothing.weight": torch.zeros(2)}, path, metadata)
    with pytest.raises(core.WeightsError, match=r"is damaged: its base has no weight nothing.weight"):
        core.load(path)
    save_file({}, path, metadata | {"config": "{"})
    with pytest.raises(core.WeightsError, match=r"is damaged: its configuration cannot be read"):
        core.load(path)


def test_half_precision_weights_are_kept_as_they_are(base, model, tmp_path):
    """A delta of a model that was cast holds the cast weights that differ from the base's."""
    half = copy.deepcopy(model).half()
    with torch.no_grad():
        half.attention.conv.weight += 1
    changed = core.save_delta(half, tmp_path / "delta.safetensors", base)
    loaded: Tensor = core.load(tmp_path / "delta.safetensors").attention.conv.weight
    assert changed == ["attention.conv.weight"]
    assert torch.equal(loaded, half.attention.conv.weight.float())
    assert math.isfinite(loaded.sum().item())
