"""`learner=maml`: inner and outer gradients from their definitions, tasks, memory, and trainings that use it."""

import copy
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import learn2learn
import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

import core
from core import AnyUp, Batch, Clip, Objective
from core.adaptation import weights_of
from core.batch import images_of
from core.registry import discover
from core.streams import generator
from core.training import Trainable, all_losses
from experiments.settings import SettingError
from experiments.training.loop import Training, train
from experiments.training.state import STATE_NAME

SMALL = ["embed_dim=8", "unifier.num_basis=8", "attention.num_heads=2"]


def maml(**settings) -> core.Learner:
    return core.build_filler("learner", {"name": "maml", **settings})


def objective() -> Objective:
    return core.build_filler("objective", {"name": "cosine_mse", "self_consistency": 0})


def batch_of(images: int = 4, channels: int = 5, dtype: torch.dtype = torch.float32, seed: int = 6) -> Batch:
    drawn = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=drawn).to(dtype)  # noqa: E731
    corners = torch.tensor([[i % 3, (2 * i) % 4] for i in range(2 * images)])
    features, target = draw(images, channels, 4, 4), draw(2 * images, channels, 4, 4)
    return Batch(draw(images, 3, 12, 12), features, target, (8, 8), corners, generator=torch.Generator().manual_seed(3))


# --- gradients -------------------------------------------------------------------------------------------------------


class Gain(nn.Module):
    """Multiplies features by a number, so that all derivatives are known."""

    def __init__(self, gain: float, other: float = 2.0):
        super().__init__()
        self.part = nn.ParameterDict({"gain": nn.Parameter(torch.tensor(gain, dtype=torch.float64))})
        self.other = nn.Parameter(torch.tensor(other, dtype=torch.float64))

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int], generator=None) -> Tensor:
        return self.part["gain"] * self.other * features

    def twice_differentiable(self, on: bool = True) -> "Gain":
        return self


class Square(Objective):
    def forward(self, model: nn.Module, batch: Batch, output: Tensor | None) -> dict[str, Tensor]:
        return {"square_loss": (output - batch.target).square().mean()}


def numbers(x: list[float], y: list[float]) -> Batch:
    image = torch.arange(3 * len(x), dtype=torch.float64).view(-1, 3, 1, 1)
    return Batch(image, *(torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1) for values in (x, y)), (1, 1))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_written_by_hand(steps, first_order):
    """Support (1, 3), (2, 5), query (3, 4), (-1, 2), model g·k·x; only g is adapted: each step is an affine map of g.

    With a = k² mean(x²), b = k mean(x·y) the inner gradient is 2 (a g - b). So the last g depends on the first one by
    (1 - 2 lr a)^steps, and on k by the derivative of each step; the first order leaves both out.
    """
    lr, g, k = 0.01, 0.7, 2.0
    model, learner = Gain(g, k), maml(inner_steps=steps, inner_lr=lr, first_order=first_order, parts=["part"])
    [losses] = learner(model, Square(), [numbers([1, 2, 3, -1], [3, 5, 4, 2])])
    sum(losses.values()).backward()
    x2, xy = (1 + 4) / 2, (1 * 3 + 2 * 5) / 2
    by_g, by_k = 1.0, 0.0
    for _ in range(steps):
        if not first_order:
            by_k = by_k * (1 - 2 * lr * k * k * x2) - 2 * lr * (2 * k * x2 * g - xy)
            by_g *= 1 - 2 * lr * k * k * x2
        g -= lr * 2 * (k * k * x2 * g - k * xy)
    q2, qy = (9 + 1) / 2, (3 * 4 - 1 * 2) / 2
    loss = k * k * g * g * q2 - 2 * k * g * qy + (16 + 4) / 2
    slope = 2 * (k * k * q2 * g - k * qy)
    assert losses["square_loss"].item() == pytest.approx(loss, rel=1e-12)
    assert model.part["gain"].grad.item() == pytest.approx(slope * by_g, rel=1e-12)
    assert model.other.grad.item() == pytest.approx(2 * (k * g * g * q2 - g * qy) + slope * by_k, rel=1e-12)


def outer_loss(learner: core.Learner, model: nn.Module, batch: Batch) -> Tensor:
    batch.generator.manual_seed(3)
    [losses] = learner(model, objective(), [batch])
    return sum(losses.values())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"parts": ["attention", "aggregation"]},
        {"rates": "tensor"},
        {"rates": "element", "recover": [2]},
        {"mixing": 1.0, "flips": 1.0, "normalising": 1.0, "noise": 0.1},
    ],
    ids=["plain", "parts", "rate of a tensor", "rate of an element", "changed task"],
)
def test_second_order_gradients_against_finite_differences(settings, perturbed):
    """Along a random direction of all weights, rates included, in float64. Errors of the difference are of order h²."""
    learner = maml(inner_steps=2, inner_lr=0.05, **settings)
    wide = "attention.window_ratio=0.6"  # of 2x2 cells a narrow window shows one, whatever the weights
    model, batch = perturbed(core.build([*SMALL, wide])).double(), batch_of(dtype=torch.float64)
    trainable = Trainable(model, objective(), learner).double()
    weights = list(trainable.parameters())
    drawn = torch.Generator().manual_seed(1)
    direction = [torch.randn(w.shape, generator=drawn, dtype=torch.float64) for w in weights]
    if learner.learnt:  # mostly the rates are moved, or they would hardly count
        rates = {id(rate) for rate in learner.learnt.values()}
        direction = [d * (1.0 if id(w) in rates else 0.1) for d, w in zip(direction, weights, strict=True)]
    outer_loss(learner, model, batch).backward()
    found = sum((w.grad * d).sum() for w, d in zip(weights, direction, strict=True)).item()
    values, h = [], 3e-6
    for sign in (1, -1):
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w += sign * h * d
        values.append(outer_loss(learner, model, batch).item())
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w -= sign * h * d
    expected = (values[0] - values[1]) / (2 * h)
    assert found == pytest.approx(expected, rel=1e-5)
    second = [w.grad.clone() for w in weights]
    trainable.zero_grad()
    learner.first_order = True
    outer_loss(learner, model, batch).backward()
    differs = [((w.grad - s).norm() / s.norm()).item() for w, s in zip(weights, second, strict=True)]
    assert max(differs) > 1e-3, "the second order makes no difference: the test shows nothing"


def test_the_graph_holds_weights_only(perturbed):
    """However many inner steps: nothing of an image survives its step."""
    model, support = perturbed(core.build(SMALL)), batch_of(2)
    size = sum(weight.numel() for weight in model.parameters())
    for steps in (1, 3):
        kept: weakref.WeakSet[Kept] = weakref.WeakSet()

        def pack(x: Tensor, kept: weakref.WeakSet = kept) -> "Kept":
            kept.add(one := Kept(x))
            return one

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
            adapted = maml(inner_steps=steps).adapted(model, objective(), support)
        assert sum(one.tensor.numel() for one in kept) == steps * size
        del adapted
        assert not kept


class Kept:
    """What a graph has saved."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def test_learn2learn_makes_the_steps(monkeypatch, perturbed):
    calls, real = [], learn2learn.algorithms.MAML.adapt
    monkeypatch.setattr(
        learn2learn.algorithms.MAML, "adapt", lambda self, loss: (calls.append(self.lr), real(self, loss))
    )
    maml(inner_steps=3, first_order=True)(perturbed(core.build(SMALL)), objective(), [batch_of()])
    assert calls == [0.01] * 3


def test_without_learn2learn_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    with pytest.raises(ModuleNotFoundError, match=r"learner=maml needs learn2learn: run `uv sync --group maml`"):
        maml()


# --- the inner loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"parts": ["attention"]}, {"rates": "element"}], ids=["all", "parts", "rates"]
)
@pytest.mark.parametrize("first_order", [False, True])
def test_adapting_is_the_inner_loop(settings, first_order, perturbed):
    model, support = perturbed(core.build(SMALL)).double(), batch_of(2, dtype=torch.float64)
    learner = maml(first_order=first_order, inner_lr=0.1, **settings)
    learner.prepare(model)
    with torch.no_grad():
        for i, rate in enumerate(learner.learnt.values()):
            rate.mul_(1 + 0.1 * i)
    inner = dict(learner.double().adapted(model, objective(), support).named_parameters())
    outer = dict(learner.adapt(model, objective(), [support]).named_parameters())
    moved = weights_of(model, settings.get("parts", ()))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(inner[name], outer[name], rtol=1e-7, atol=1e-10)
        assert torch.equal(outer[name], weight) == (name not in moved), name


def test_frozen_parts_stay(perturbed):
    model = perturbed(core.build(SMALL))
    model.attention.requires_grad_(False)
    for rates in ("fixed", "tensor"):
        learner = maml(rates=rates)
        trainable = Trainable(model, objective(), learner)
        outer_loss(learner, model, batch_of()).backward()
        assert model.attention.conv.weight.grad is None
        assert model.aggregation[0].weight.grad.abs().max() > 0
        adapted = learner.adapted(model, objective(), batch_of())
        assert torch.equal(adapted.attention.conv.weight, model.attention.conv.weight)
        trainable.zero_grad()


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize(
    "chosen",
    [
        ["unifier=dynamic_basis", "unifier.open_at_start=0.3"],
        ["attention=pyramid_window"],
        ["attention=global"],
        ["decoder=inr"],
        ["refiner=diffusion"],
        ["temporal=temporal_consistency"],
        ["unifier=none", "decoder=inr"],
    ],
    ids=lambda chosen: chosen[0],
)
def test_with_every_model_extension(chosen, first_order, perturbed):
    own = [one for one in SMALL if not any(one.startswith(choice.split("=")[0]) for choice in chosen)]
    model = perturbed(core.build([*own, *chosen]))
    learner = maml(first_order=first_order, inner_lr=0.001)
    trainable = Trainable(model, objective(), learner)
    optimizer = torch.optim.SGD(trainable.parameters(), lr=1e-3)
    [losses] = learner.step(trainable, [batch_of()], optimizer)
    assert all(torch.isfinite(loss) for loss in losses.values())
    grads = [w.grad for w in model.parameters() if w.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert model.aggregation[0].weight.grad.abs().max() > 0


class Weighted(Objective):
    """With a weight of its own, which acts through the inner loop as well."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, model: nn.Module, batch: Batch, output: Tensor | None) -> dict[str, Tensor]:
        crops = core.batch.crops_of(output, batch)
        return {"weighted_loss": (self.weight * crops - batch.target).square().mean()}


def test_an_objectives_weight_acts_through_the_inner_loop(perturbed):
    model = perturbed(core.build(SMALL)).double()
    found = {}
    for first_order in (False, True):
        own = Weighted().double()
        [losses] = maml(inner_lr=0.5, first_order=first_order)(model, own, [batch_of(dtype=torch.float64)])
        losses["weighted_loss"].backward()
        found[first_order] = own.weight.grad.item()
    assert found[False] != pytest.approx(found[True], rel=1e-6)


class Faint(Objective):
    """Gradients below what float16 can hold."""

    def forward(self, model: nn.Module, batch: Batch, output: Tensor | None) -> dict[str, Tensor]:
        return {"faint_loss": 1e-5 * (core.batch.crops_of(output, batch) - batch.target).square().mean()}


def test_small_gradients_survive_in_float16(monkeypatch, perturbed):
    model, support = perturbed(core.build(SMALL)), batch_of(2)
    learner = maml(inner_steps=1, inner_lr=1e3, first_order=True)

    def moved(half: bool) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=half):
            adapted = learner.adapted(model, Faint(), support)
        pairs = zip(adapted.parameters(), model.parameters(), strict=True)
        return torch.cat([(ours - theirs).flatten().detach() for ours, theirs in pairs])

    expected = moved(half=False)
    assert (moved(half=True) - expected).norm() < 0.05 * expected.norm()
    monkeypatch.setattr("extensions.maml.INNER_SCALE", 1.0)
    assert (moved(half=True) - expected).norm() > 0.1 * expected.norm(), "nothing is lost without a scale"


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_support_and_query_are_different_images():
    batch = batch_of(5)
    batch.image[3] = batch.image[0]  # as where an epoch ends and the next begins
    support, query = maml().divide(batch)
    assert torch.equal(support.image, batch.image[:2])
    assert torch.equal(query.image, batch.image[[2, 4]])
    assert torch.equal(query.target, batch.target[[4, 5, 8, 9]])
    assert torch.equal(query.corners, batch.corners[[4, 5, 8, 9]])
    assert [len(part.image) for part in maml(num_support=4).divide(batch_of(5))] == [4, 1]


@pytest.mark.parametrize("case", ["one image", "the same twice", "all are support"])
def test_one_image_as_support_and_query_is_refused(case):
    batch, settings = batch_of(1 if case == "one image" else 2), {}
    if case == "the same twice":
        batch.image[1] = batch.image[0]
    if case == "all are support":
        settings = {"num_support": 2}
    with pytest.raises(ValueError, match=r"needs other images for the query than for the support: .*raise batch_size"):
        maml(**settings)(core.build(SMALL), objective(), [batch])


def test_a_support_of_mixed_channel_counts_is_refused():
    with pytest.raises(ValueError, match=r"adapts to one encoder, got a support with \[5, 7\] channels"):
        maml().adapt(core.build(SMALL), objective(), [batch_of(), batch_of(channels=7)])


def test_images_of_a_batch_bring_all_that_is_theirs():
    batch = batch_of(3)
    batch.whole, batch.crops, batch.augmented_image = torch.rand(3, 3, 5, 5), torch.rand(6, 3, 5, 5), batch.image + 1
    batch.clip = Clip(torch.rand(3, 2, 3, 4, 4), torch.rand(3, 2, 5, 2, 2), None)
    part = images_of(batch, [2, 0])
    for name in ("image", "features", "whole", "augmented_image"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[[2, 0]])
    for name in ("target", "corners", "crops"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[[4, 5, 0, 1]])
    assert torch.equal(part.clip.features, batch.clip.features[[2, 0]])
    assert part.clip.flow is None
    assert part.generator is batch.generator


def test_a_changed_task_is_one_affine_map_of_all_features(monkeypatch):
    """Features, targets, clips and the encoder's answers go through the same map, and are never the old ones."""
    monkeypatch.setattr("extensions.maml.GROUP", 3)
    batch = batch_of(channels=7, dtype=torch.float64)
    batch.clip = Clip(torch.rand(4, 2, 3, 4, 4), batch.features[:, None].repeat(1, 2, 1, 1, 1), None)
    batch.encoder = lambda images: batch.features
    changed = maml(mixing=1.0, flips=1.0, normalising=1.0).changed(batch)
    x, y = (one.features.transpose(0, 1).flatten(1).T for one in (batch, changed))  # (positions, C)
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    fitted = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution
    torch.testing.assert_close(torch.cat([x, ones], 1) @ fitted, y)
    target = batch.target.transpose(0, 1).flatten(1).T
    expected = torch.cat([target, torch.ones(len(target), 1, dtype=x.dtype)], 1) @ fitted
    torch.testing.assert_close(changed.target.transpose(0, 1).flatten(1).T, expected)
    assert torch.equal(changed.clip.features[:, 1], changed.features)
    assert torch.equal(changed.encoder(None), changed.features)
    assert (changed.features - batch.features).abs().max() > 0.1
    rounding = 64 * torch.finfo(torch.float32).eps  # the statistics are in single precision, at least
    torch.testing.assert_close(y.mean(0), torch.zeros(7, dtype=y.dtype), atol=rounding, rtol=0)


def test_mixing_and_flips_keep_angles():
    batch = batch_of(channels=7, dtype=torch.float64)
    for settings in ({"mixing": 1.0}, {"flips": 1.0}):
        changed = maml(**settings).changed(batch)
        products = [torch.einsum("bchw,bcij->bhwij", one, one) for one in (batch.features, changed.features)]
        torch.testing.assert_close(*products, rtol=1e-5, atol=1e-5)  # the matrix is drawn in float32
        assert not torch.allclose(changed.features, batch.features)
    noisy = maml(mixing=1.0, noise=0.3).changed(batch)
    assert (noisy.features.norm(dim=1) / batch.features.norm(dim=1) - 1).abs().max() > 0.05
    assert maml().changed(batch) is batch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": -1}, "inner_steps must not be negative"),
        ({"inner_lr": 0.0}, "inner_lr must be above 0"),
        ({"recover": [1]}, "scales to recover at least 2"),
        ({"mixing": 1.5}, "mixing is a probability"),
        ({"rates": "each"}, "rates must be one of fixed, tensor, element"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        maml(**settings)


def test_unknown_parts_are_refused_before_training(config):
    with pytest.raises(SettingError, match=r"the model has no part 'head'; there are: image_encoder, .*attention"):
        Training(config("learner=maml", "learner.parts=[head]"))


# --- trainings -------------------------------------------------------------------------------------------------------

TINY = [
    *SMALL, "backbones=[{name: hog8}]", "views.view=32", "batch_size=4", "views.crops=2",
    "objective.self_consistency=0", "steps=2", "checkpoint_every=1", "validate_every=0", "log_every=1",
    "tracking.enabled=false", "device=cpu", "data.path=[bundled]",
]  # fmt: skip


@pytest.fixture
def config(tmp_path):
    """Overrides -> the configuration of a tiny training in tmp_path."""
    discover()

    def make(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            return compose("train", [*TINY, f"out_dir={tmp_path / 'out'}", *overrides])

    return make


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path / STATE_NAME)


def test_no_inner_steps_are_the_plain_training_bit_for_bit(config, tmp_path):
    train(config("learner=maml", "learner.inner_steps=0", f"out_dir={tmp_path / 'none'}"))
    train(config("learner=sgd", f"out_dir={tmp_path / 'plain'}"))
    none, plain = tensors(tmp_path / "none"), tensors(tmp_path / "plain")
    assert none.keys() == plain.keys()
    assert all(torch.equal(none[name], plain[name]) for name in none)


MORE = ["learner=maml", "learner.mixing=0.5", "learner.flips=0.5", "optimiser.ema=0.5", "optimiser.lr=1e-3"]


@pytest.mark.parametrize(
    "more",
    [
        ["learner.rates=tensor"],
        ["learner.first_order=true", "learner.rates=element", "mixed_precision=bf16"],
        ["mixed_precision=bf16", "learner.recover=[2]"],
    ],
    ids=["second order", "first order bf16", "second order bf16"],
)
def test_a_stopped_training_goes_on_bit_for_bit(config, tmp_path, more):
    starts = (("whole", []), ("parts", ["stop_after=1"]), ("parts", ["resume=must"]))
    made = [config(*MORE, *more, "steps=2", f"out_dir={tmp_path / name}", *last) for name, last in starts]
    for one in made:
        train(one)
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    rates = [name for name in whole if name.startswith("weights/learner.")]
    assert bool(rates) == any("rates" in one for one in more)
    assert all((whole[name] != 0.01).any() for name in rates), "rates are not trained"


def test_half_precision_is_near_single(config):
    """Of a step's loss after the inner loop: bfloat16 has 8 bits; the copies' own weights are what autocast rounds."""
    found = {}
    for precision in ("no", "bf16"):
        training = Training(config("learner=maml", f"mixed_precision={precision}", "learner.inner_lr=0.05"))
        found[precision] = sum(training.step(training.views[0]).values())
    assert found["bf16"] == pytest.approx(found["no"], rel=2**-6)
    assert found["bf16"] != found["no"]


def test_rates_are_saved_with_the_checkpoint(config):
    trained = train(config(*MORE, "learner.rates=tensor", "learner.parts=[attention]"))
    model = core.load(trained.checkpoint)
    learner = core.load_learner(trained.checkpoint, model)
    state = tensors(trained.checkpoint.parent)
    assert learner.learnt.keys() == {name.replace(".", "/") for name in weights_of(model, ["attention"])}
    for name, rate in learner.learnt.items():  # of the moving average, as the model's weights
        assert torch.equal(rate, state[f"ema/learner.learnt.{name}"])
    assert learner.parts == ["attention"]
    warm = core.build(SMALL)
    assert core.warm_start(warm, trained.checkpoint) == []
    assert core.load_learner("bundled", AnyUp.from_pretrained()) is None


SCRIPT = """
import sys
from omegaconf import OmegaConf
from experiments.training.loop import train
if __name__ == "__main__":
    train(OmegaConf.load(sys.argv[1]))
"""


def test_two_processes_share_tasks(config, tmp_path):
    """gloo: each has a task of its own of half of the batch; the update's gradient is the mean of both.

    The expectation is computed here, process by process. Differences come from sums in another order.
    """
    more = ["learner=maml", "learner.rates=tensor", "learner.flips=0.5", "steps=1"]
    shared = config(*more, f"out_dir={tmp_path / 'two'}")
    (tmp_path / "two.yaml").write_text(OmegaConf.to_yaml(shared, resolve=True))
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    done = subprocess.run(
        [*launch, f"--main_process_port={port}", str(tmp_path / "script.py"), str(tmp_path / "two.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    training = Training(config(*more, "batch_size=4"))
    trainable = training.inner
    for rank in (0, 1):
        views = copy.copy(training.views)
        views.shard = (rank, 2)
        training.batch.rank = rank
        torch.manual_seed(generator(training.config.seed, "step", 0, rank).initial_seed())
        [losses] = trainable([training.batch(views[0])])
        (sum(losses.values()) / 2).backward()
    found = tensors(tmp_path / "two")
    for name, weight in trainable.named_parameters():
        moment = found[f"adam/exp_avg/{name}"] / 0.1  # after one update: the gradient
        largest = weight.grad.abs().max().item()
        torch.testing.assert_close(moment, weight.grad, rtol=2e-3, atol=1e-4 * largest + 1e-9)


def test_the_losses_of_a_task_are_the_objectives(perturbed):
    """By the same names, so that curves of learners can be laid over each other."""
    model = perturbed(core.build(SMALL))
    [losses] = maml()(model, objective(), [batch_of()])
    assert losses.keys() == all_losses(model, objective(), batch_of()).keys()
