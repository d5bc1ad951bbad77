"""The contract of every hook point, over every registered filler.

Wrote a filler? Give it a row in `ROWS`; without one `test_every_filler_has_a_row` fails. A row says how to build it
small and what it promises; everything else is promised by every filler (core/hooks.py).
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from core import (
    AnyUp,
    Attention,
    Batch,
    Context,
    Decoder,
    Objective,
    Refiner,
    Temporal,
    Unifier,
    build,
    build_filler,
    registry,
)
from core.anyup import pixel_centres
from core.hooks import HOOK_POINTS, MODEL_HOOKS, Filler
from core.training import PlainStep, Trainable, fillers_of


@dataclass(frozen=True)
class Row:
    """One filler, in one setting."""

    hook: str
    name: str
    settings: dict = field(default_factory=dict)
    """Overrides that keep it small and fast."""
    permuted_channels: str = "follow"
    """`follow`: the output's channels are permuted alike (unifier: nothing changes); `change`: it is another output."""
    neutral: dict | None = None
    """Settings, over `settings`, that make it the baseline (8 filters, 4 heads); fillers outside `core` need some."""
    tolerance: float = 1e-4
    """Of half precision and of the order of sums, as a share of the largest value, in float32."""

    def __str__(self):
        return f"{self.hook}={self.name}" + "".join(f",{key}={value}" for key, value in self.settings.items())


ROWS = [
    Row("unifier", "learned_basis", {"num_basis": 8, "ordering": "paper"}, neutral={}),
    Row("unifier", "learned_basis", {"num_basis": 16, "kernel_size": 3, "ordering": "released"}, "change"),
    Row("unifier", "none"),
    Row("unifier", "dynamic_basis", {"num_basis": 8, "hidden_dim": 8, "bank_size": 3}, neutral={}),
    Row("unifier", "dynamic_basis", {"num_basis": 16, "conditioning": "features", "per_location": True}),
    Row(
        "unifier",
        "dynamic_basis",
        {"num_basis": 8, "conditioning": "guidance", "open_at_start": 0.5, "ordering": "released"},
        "change",
    ),
    Row("attention", "window", {"num_heads": 2}, neutral={"num_heads": 4}),
    Row("attention", "window", {"num_heads": 4, "window_ratio": 0.3}),
    Row("attention", "global", {"num_heads": 2}),
    Row("attention", "pyramid_window", {"num_heads": 2, "scales": [2, 5]}, neutral={"num_heads": 4}),
    Row("attention", "pyramid_window", {"scales": [0.3, 0.2, 0.6], "unit": "ratio", "keys_per_side": 2}),
    Row("attention", "pyramid_window", {"window_ratio": 0.4, "scales": [8], "keys_per_side": 0}),
    Row("attention", "bilateral_prior", {"num_heads": 2}, neutral={"num_heads": 4}),
    Row(
        "attention",
        "bilateral_prior",
        {"window_ratio": 0.3, "gate_at_start": 0.5, "share_at_start": 0.4, "temperature": 2.0},
    ),
    Row("attention", "naf", {"num_heads": 2}, neutral={"num_heads": 4}),
    Row("attention", "naf", {"num_heads": 2, "value_groups": True}, "change"),
    Row("attention", "naf", {"num_heads": 2, "pooled_keys": True, "convolve": False}),
    Row("decoder", "none", neutral={}),
    Row("decoder", "inr", {"hidden_dim": 8, "num_units": 4, "num_frequencies": 2}, neutral={}),
    Row("refiner", "none", neutral={}),
    Row("refiner", "diffusion", {"hidden_dim": 8, "window": 3, "num_inference_steps": 2}, neutral={"strength": 0}),
    Row(
        "refiner",
        "diffusion",
        {"hidden_dim": 8, "num_directions": 3, "window": 1, "num_samples": 2, "prediction": "epsilon", "tile": 8}
        | {"scheduler": "FlowMatchEulerDiscreteScheduler", "num_inference_steps": 2},
    ),
    Row("temporal", "none", neutral={}),
    Row(
        "temporal",
        "temporal_consistency",
        {"flow": "still", "cut_share": 0, "photometric_weight": 0.1},
        neutral={"strength": 0},
    ),
    Row(
        "temporal",
        "temporal_consistency",
        {"flow": "still", "fusion": "learned", "cut_share": 0},
        neutral={"strength": 0},
    ),
    Row("temporal", "temporal_consistency"),
    Row("temporal", "statistics_drift", {"cut_distance": 0}, neutral={"strength": 0}),
    Row("temporal", "cross_frame_attention", neutral={}),
    Row("objective", "cosine_mse", {"self_consistency_size": 9}),
    Row("objective", "cosine_mse", {"self_consistency": 0, "input_consistency": 0}),
    Row("objective", "self_supervised", {"scales": [0.75, 1, 2]}),
    Row("objective", "self_supervised", {"inpainting": 0, "consistency": 0, "alignment": 0, "reconstruction": 1}),
    Row(
        "objective",
        "detail",
        {"self_consistency_size": 9},
        neutral={"weight_detail": 0, "weight_cosine": 1, "weight_squared": 1},
    ),
    Row(
        "objective",
        "detail",
        {"self_consistency": 0, "input_consistency": 0, "weight_squared": 0.5, "per_octave": True},
    ),
    Row("learner", "sgd"),
    Row("learner", "maml", {"inner_lr": 0.001, "rates": "tensor"}, neutral={"inner_steps": 0, "rates": "fixed"}),
    Row("learner", "maml", {"inner_lr": 0.001, "first_order": True, "mixing": 0.5, "parts": ["attention"]}),
]
MODEL_ROWS = [row for row in ROWS if row.hook in MODEL_HOOKS]
SMALLEST = {(row.hook, row.name): row for row in reversed(ROWS)}  # the first row of each filler
WIDTH = 16
FRAMES = 3
every_row = pytest.mark.parametrize("row", MODEL_ROWS, ids=str)


def fillers() -> set[tuple[str, str]]:
    """All that is registered, except what tests and notebooks registered for themselves."""
    own = ("test_", "tests.", "__main__")
    found = {hook: registry.choices(hook) for hook in HOOK_POINTS}
    return {(hook, name) for hook in found for name, cls in found[hook].items() if not cls.__module__.startswith(own)}


def test_every_filler_has_a_row():
    missing = fillers() - SMALLEST.keys()
    assert not missing, f"add rows to tests/test_contracts.py for {sorted(missing)}"
    assert SMALLEST.keys() == fillers(), "a row names no filler"


def test_a_filler_without_a_row_is_noticed(own_registry):
    class Other(Decoder):
        def __init__(self, embed_dim: int):
            super().__init__()

        def forward(self, output: Tensor, context: Context) -> Tensor:
            return output

    Other.__module__ = "extensions.other"
    registry.register("other")(Other)
    assert fillers() - SMALLEST.keys() == {("decoder", "other")}


@every_row
def test_fillers_outside_the_core_have_a_neutral_setting(row):
    cls = registry.choices(row.hook)[row.name]
    smallest = SMALLEST[row.hook, row.name]
    assert cls.__module__.startswith("core.") or smallest.neutral is not None


# --- calling a filler by its contract --------------------------------------------------------------------------------


def make(row: Row, seed: int = 0, **settings) -> Filler:
    torch.manual_seed(seed)
    return registry.factory(row.hook, row.name, row.settings | settings)(embed_dim=WIDTH)


@dataclass
class Sizes:
    batch: int = 2
    channels: int = 7
    grid: tuple[int, int] = (3, 5)
    image: tuple[int, int] = (14, 22)
    output: tuple[int, int] = (9, 13)


ODD = {
    "batch of one": Sizes(batch=1),
    "one channel": Sizes(channels=1),
    "many channels": Sizes(batch=1, channels=384),
    "square": Sizes(grid=(4, 4), image=(16, 16), output=(16, 16)),
    "portrait": Sizes(grid=(7, 2), image=(35, 11), output=(23, 6)),
    "larger than the image": Sizes(grid=(2, 3), image=(6, 9), output=(13, 10)),
    "smaller than the features": Sizes(grid=(5, 6), image=(20, 24), output=(3, 2)),
    "one pixel": Sizes(grid=(2, 2), image=(8, 8), output=(1, 1)),
}


def arguments(row: Row, sizes: Sizes, dtype: torch.dtype = torch.float32, order: Tensor | None = None) -> dict:
    """What the core would call the filler with; `order` permutes the feature channels."""
    generator = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(sizes.batch, *shape, generator=generator).to(dtype)  # noqa: E731
    features, output = draw(sizes.channels, *sizes.grid), draw(sizes.channels, *sizes.output)
    if order is not None:
        features, output = features[:, order], output[:, order]
    image, guidance = draw(3, *sizes.image), draw(WIDTH, *sizes.image)
    query, key = draw(WIDTH, *sizes.output), draw(WIDTH, *sizes.grid)
    if row.hook == "unifier":
        return {"features": features, "guidance": guidance}
    if row.hook == "attention":
        looks = {"image": image} if registry.choices(row.hook)[row.name].needs_image else {}
        return {"query": query, "key": key, "value": features, **looks}
    asks = registry.choices(row.hook)[row.name].needs_guidance
    coords = pixel_centres(sizes.output, like=output)
    noise = torch.Generator().manual_seed(5)
    context = Context(image, features, coords, guidance if asks else None, noise)
    return {"output": output, "context": context} | ({"state": None} if row.hook == "temporal" else {})


def call(filler: Filler, row: Row, sizes: Sizes, dtype: torch.dtype = torch.float32, order=None) -> Tensor:
    """The filler's output; of three frames for `temporal`, so that a state is carried."""
    given = arguments(row, sizes, dtype, order)
    if row.hook != "temporal":
        return filler(**given)
    outputs, state = [], None
    for i in range(FRAMES):
        context = replace(given["context"], image=given["context"].image.roll(i, -1))
        output, state = filler(given["output"].roll(i, -1), context, state)
        outputs.append(output)
    return torch.cat(outputs)


def promised(row: Row, sizes: Sizes) -> tuple[int, ...]:
    if row.hook == "unifier":
        return (sizes.batch, WIDTH, *sizes.grid)
    return (sizes.batch * (FRAMES if row.hook == "temporal" else 1), sizes.channels, *sizes.output)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    assert actual.shape == expected.shape
    error, largest = (actual.double() - expected.double()).abs().max(), expected.double().abs().max()
    assert error <= tolerance * largest.clamp(min=1e-3), f"off by {(error / largest).item():.1e}"
    return True


# --- what every filler promises --------------------------------------------------------------------------------------


@every_row
@pytest.mark.parametrize("sizes", list(ODD.values()), ids=list(ODD))
def test_shapes(row, sizes, perturbed):
    filler = perturbed(make(row))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output = call(filler, row, sizes)
        assert output.shape == promised(row, sizes)
        assert torch.isfinite(output).all()


@every_row
def test_arguments_are_only_read(row, perturbed):
    """The core goes on using features, image, guidance and coords; `output` belongs to whoever has it."""
    filler = perturbed(make(row)).eval()
    given, copies = arguments(row, Sizes()), arguments(row, Sizes())
    with torch.no_grad():
        filler(**given)
    for name, expected in seen(copies).items():
        assert name == "output" or torch.equal(seen(given)[name], expected), name


def seen(given: dict) -> dict[str, Tensor]:
    """All tensors among arguments, those of the context too."""
    flat = given | (vars(given["context"]) if "context" in given else {})
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


@every_row
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(row, dtype, perturbed):
    filler = perturbed(make(row)).eval()
    with torch.no_grad():
        expected = call(filler, row, Sizes())
        output = call(filler.to(dtype), row, Sizes(), dtype)
    assert output.dtype == dtype
    assert close(output, expected, row.tolerance if dtype == torch.float64 else 1000 * row.tolerance)


@every_row
def test_gradients(row, perturbed):
    """Off its neutral start, every parameter matters: its gradient is finite and not zero. Inputs get one too."""
    filler = perturbed(make(row)).train()
    given = arguments(row, Sizes())
    inputs = {name: tensor.requires_grad_() for name, tensor in seen(given).items() if name in ("features", "value")}
    total = 0
    for _ in range(FRAMES if row.hook == "temporal" else 1):
        output = filler(**given)
        if row.hook == "temporal":
            output, given["state"] = output
        weight = torch.linspace(-1, 1, output.numel()).view_as(output)
        total = total + (output * weight).sum() + sum(auxiliary_losses(filler, row, output).values())
    if total.requires_grad:
        total.backward()
    for name, parameter in filler.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"
    for name, tensor in inputs.items():
        assert tensor.grad is None or torch.isfinite(tensor.grad).all(), name


def auxiliary_losses(filler: Filler, row: Row, output: Tensor) -> dict[str, Tensor]:
    """Of a filler whose latest forward was of `output`, with a target that is the whole output."""
    if row.hook in ("unifier", "attention"):
        output = torch.zeros(2, 7, 9, 13)
    context = arguments(Row("refiner", "none"), Sizes())["context"]
    batch = Batch(context.image, context.features, torch.ones_like(output), tuple(output.shape[-2:]))
    return filler.auxiliary_loss(output, batch)


@every_row
def test_eval_is_deterministic(row, perturbed):
    filler = perturbed(make(row)).eval()
    with torch.no_grad():
        first, second = call(filler, row, Sizes()), call(filler, row, Sizes())
        torch.manual_seed(99)
        third = call(filler, row, Sizes())
    assert torch.equal(first, second)
    assert torch.equal(first, third), "the output depends on the global random state"


@every_row
def test_state_dict_round_trip(row, perturbed):
    filler, other = perturbed(make(row), seed=1).eval(), perturbed(make(row, seed=5), seed=2).eval()
    other.load_state_dict(copy.deepcopy(filler.state_dict()), strict=True)
    with torch.no_grad():
        assert torch.equal(call(filler, row, Sizes()), call(other, row, Sizes()))


@every_row
def test_permuted_channels(row, perturbed):
    filler = perturbed(make(row)).eval()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    with torch.no_grad():
        straight, permuted = call(filler, row, Sizes()), call(filler, row, Sizes(), order=order)
    expected = straight if row.hook == "unifier" else straight[:, order]
    if row.permuted_channels == "follow":
        assert close(permuted, expected, 1e-5)
    else:
        assert row.permuted_channels == "change"
        assert (permuted - expected).abs().max() > 1e-3 * expected.abs().max()


@every_row
def test_any_number_of_channels(row, perturbed):
    """The same weights serve C = 1, 7 and 384, and using them adds and reshapes nothing."""
    filler = perturbed(make(row)).eval()
    before = {name: tensor.shape for name, tensor in filler.state_dict().items()}
    for channels in (7, 1, 384):
        sizes = Sizes(batch=1, channels=channels)
        with torch.no_grad():
            assert call(filler, row, sizes).shape == promised(row, sizes)
        assert {name: tensor.shape for name, tensor in filler.state_dict().items()} == before


@every_row
def test_images_of_a_batch_are_independent(row, perturbed):
    filler = perturbed(make(row)).eval()
    if row.hook == "temporal":
        pytest.skip("the state belongs to the whole batch")
    both, given = call(filler, row, Sizes()), arguments(row, Sizes())
    for i in range(2):
        own = {n: t[i : i + 1] for n, t in seen(given).items() if n != "coords"}
        alone = {name: own[name] for name in given if name in own}
        if "context" in given:
            inner = {name: tensor for name, tensor in own.items() if name in vars(given["context"])}
            alone["context"] = replace(given["context"], **inner)
        assert close(filler(**alone), both[i : i + 1], row.tolerance)


@every_row
def test_auxiliary_losses_are_named_scalars(row):
    filler = make(row).train()
    output = call(filler, row, Sizes())
    losses = auxiliary_losses(filler, row, output[-2:])
    assert isinstance(losses, dict)
    for name, loss in losses.items():
        assert name.endswith("_loss")
        assert loss.shape == ()
        assert torch.isfinite(loss)


@every_row
def test_settings_are_rebuilt_from_their_description(row, perturbed):
    factory = registry.factory(row.hook, row.name, row.settings)
    described = registry.describe(factory)
    assert described["name"] == row.name
    assert set(described) == {"name"} | set(registry.signature_fields(registry.choices(row.hook)[row.name]))
    again = registry.factory(row.hook, row.name, {key: value for key, value in described.items() if key != "name"})
    assert registry.describe(again) == described
    torch.manual_seed(0)
    rebuilt = again(embed_dim=WIDTH).eval()
    with torch.no_grad():
        assert torch.equal(call(rebuilt, row, Sizes()), call(make(row).eval(), row, Sizes()))


# --- what single hook points promise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ROWS if row.hook == "attention"], ids=str)
@pytest.mark.parametrize("size", [(23, 8), (1, 5), (9, 13)])
def test_bands_of_an_attention_are_its_forward(row, size, perturbed):
    filler = perturbed(make(row)).eval()
    given = arguments(row, Sizes(output=size))
    with torch.no_grad():
        rows, bands = zip(*filler.bands(**given), strict=True)
        assert [i for some in rows for i in range(some.start, some.stop)] == list(range(size[0]))
        assert close(torch.cat(bands, 2), filler(**given), 1e-5)


@pytest.mark.parametrize("row", [row for row in ROWS if row.hook == "attention"], ids=str)
def test_bands_with_entropy_are_the_bands_and_the_entropy_of_the_weights(row, perturbed):
    filler = perturbed(make(row)).eval()
    given = arguments(row, Sizes(output=(23, 8)))
    if not filler.linear_in_values:
        with pytest.raises(ValueError, match="heads have weights of their own"):
            next(filler.bands_with_entropy(**given))
        return
    with torch.no_grad():
        rows, bands, entropy = zip(*filler.bands_with_entropy(**given), strict=True)
        plain = list(filler.bands(**given))
        by_definition = [part for _, _, part in Attention.bands_with_entropy(filler, **given)]
    assert list(rows) == [some for some, _ in plain]
    assert close(torch.cat(bands, 2), torch.cat([band for _, band in plain], 2), 1e-5)
    assert close(torch.cat(entropy, 2), torch.cat(by_definition, 2), 1e-5)


@pytest.mark.parametrize("row", [row for row in ROWS if row.hook == "attention"], ids=str)
def test_attention_looks_up_values(row, perturbed):
    """The output is a weighted mean of value vectors: linear in them, and constant where they are."""
    filler = perturbed(make(row)).eval()
    given = arguments(row, Sizes())
    with torch.no_grad():
        output = filler(**given)
        constant = filler(**given | {"value": torch.full_like(given["value"], 3.0)})
        doubled = filler(**given | {"value": 2 * given["value"] + 1})
    assert close(constant, torch.full_like(constant, 3.0), 1e-5)
    assert close(doubled, 2 * output + 1, 1e-5)


@pytest.mark.parametrize("row", [row for row in ROWS if row.hook == "decoder"], ids=str)
def test_a_decoder_is_pointwise(row, perturbed):
    filler = perturbed(make(row)).eval()
    given = arguments(row, Sizes())
    with torch.no_grad():
        whole = filler(**given)
        for rows in (slice(0, 1), slice(4, 9)):
            context = replace(given["context"], coords=given["context"].coords[rows])
            band = {"output": given["output"][:, :, rows], "context": context}
            assert close(filler(**band), whole[:, :, rows], row.tolerance)


@pytest.mark.parametrize("row", [row for row in ROWS if row.hook in ("refiner", "temporal")], ids=str)
def test_needs_whole_output_is_true_where_it_must_be(row, perturbed):
    filler = perturbed(make(row)).eval()
    assert isinstance(filler.needs_whole_output, bool)
    if filler.needs_whole_output:
        return
    given = arguments(row, Sizes())
    with torch.no_grad():
        context = replace(given["context"], coords=given["context"].coords[4:9])
        whole, band = filler(**given), filler(**given | {"output": given["output"][:, :, 4:9], "context": context})
    whole, band = (whole[0], band[0]) if row.hook == "temporal" else (whole, band)
    assert close(band, whole[:, :, 4:9], row.tolerance)


# --- in the model ----------------------------------------------------------------------------------------------------


def overrides(*rows: Row) -> list[str]:
    chosen = [f"{row.hook}={row.name}" for row in rows]
    return chosen + [f"{row.hook}.{key}={json.dumps(value)}" for row in rows for key, value in row.settings.items()]


def inputs(batch: int = 1, channels: int = 5) -> tuple[Tensor, Tensor, tuple[int, int]]:
    generator = torch.Generator().manual_seed(4)
    image = torch.randn(batch, 3, 11, 14, generator=generator)
    return image, torch.randn(batch, channels, 3, 4, generator=generator), (13, 9)


CHOICES = {hook: [row for key, row in SMALLEST.items() if key[0] == hook] for hook in HOOK_POINTS}


@pytest.mark.parametrize(
    "rows", list(product(*(CHOICES[hook] for hook in MODEL_HOOKS))), ids=lambda rows: "-".join(row.name for row in rows)
)
def test_every_combination(rows, perturbed):
    """Forward, backward, streaming (or its refusal), and the state dict's top level, through `core.build`."""
    model = perturbed(build([f"embed_dim={WIDTH}", *overrides(*rows)]))
    image, features, size = inputs()
    output, state = model(image, features, size, return_state=True)
    assert output.shape == (1, 5, *size)
    assert torch.isfinite(output).all()
    own = Batch(image, features, torch.ones_like(output), size)
    auxiliary = [loss for filler in fillers_of(model) for loss in filler.auxiliary_loss(output, own).values()]
    following = model(image.flip(-1), features.flip(-1), size, state=state)
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    (((output + 2 * following) * weight).sum() + sum(auxiliary)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"
    top = {name.split(".")[0] for name in model.state_dict()}
    assert top <= {"image_encoder", "rotary", "query_encoder", "key_encoder", "aggregation", *MODEL_HOOKS}
    model.eval()
    with torch.no_grad():
        expected = model(image, features, size)
        if model.refiner.needs_whole_output or model.temporal.needs_whole_output:
            with pytest.raises(ValueError, match="needs the whole output"):
                model.stream(image, features, size)
        else:
            assert close(torch.cat([band for _, band in model.stream(image, features, size)], 2), expected, 1e-4)


@pytest.mark.parametrize("row", [row for row in MODEL_ROWS if row.neutral is not None], ids=str)
def test_the_neutral_setting_is_the_baseline(row, perturbed):
    """With the baseline's weights where it has any: an idea can be added to a trained model without harm."""
    small = Row("unifier", "learned_basis", {"num_basis": 8})
    neutral = Row(row.hook, row.name, row.settings | row.neutral)
    baseline = perturbed(build([f"embed_dim={WIDTH}", *overrides(small)])).eval()
    chosen = {small.hook: small, neutral.hook: neutral}
    model = build([f"embed_dim={WIDTH}", *overrides(*chosen.values())]).eval()
    own = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in baseline.state_dict().items() if name in own}, strict=False)
    with torch.no_grad():
        assert close(model(*inputs()), baseline(*inputs()), 1e-6)


# --- the training step -----------------------------------------------------------------------------------------------


def batch(images: int = 2, crops: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(6)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    corners = torch.tensor([[i % 3, (2 * i) % 4] for i in range(images * crops)])
    return Batch(
        image=draw(images, 3, 12, 16),
        features=draw(images, 5, 3, 4),
        target=draw(images * crops, 5, 4, 5),
        output_size=(6, 8),
        corners=corners,
        augmented_image=draw(images, 3, 12, 16),
        high_resolution=torch.rand(images, 3, 24, 32, generator=generator),
        encoder=lambda rgb: torch.nn.functional.avg_pool2d(torch.cat([rgb, rgb[:, :2].square()], 1), 4),
    )


def tiny_model(perturbed) -> AnyUp:
    return perturbed(build([f"embed_dim={WIDTH}", "unifier.num_basis=8"]))


@pytest.mark.parametrize("row", [row for row in ROWS if row.hook == "objective"], ids=str)
def test_objectives(row, perturbed):
    objective = build_filler("objective", {"name": row.name, **row.settings})
    model = tiny_model(perturbed)
    output = model(batch().image, batch().features, batch().output_size)
    losses = objective(model, batch(), output)
    assert losses
    for name, loss in losses.items():
        assert name.endswith("_loss")
        assert loss.shape == ()
        assert torch.isfinite(loss)
        assert loss.requires_grad
    sum(losses.values()).backward()
    for name, parameter in [*model.named_parameters(), *objective.named_parameters()]:
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    again = objective(model, batch(), model(batch().image, batch().features, batch().output_size))
    assert {name: loss.item() for name, loss in again.items()} == {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize(
    "rows", list(product(CHOICES["objective"], CHOICES["learner"])), ids=lambda rows: "-".join(row.name for row in rows)
)
def test_every_objective_with_every_learner(rows, perturbed):
    """Each step moves every weight, returns detached scalars, and the loss falls on the batch it is taken on."""
    objective, learner = (build_filler(row.hook, {"name": row.name, **row.settings}) for row in rows)
    model = tiny_model(perturbed)
    trainable = Trainable(model, objective, learner)
    optimizer = torch.optim.AdamW(trainable.parameters(), lr=1e-3)
    history = []
    for _ in range(6):
        before = {name: parameter.detach().clone() for name, parameter in trainable.named_parameters()}
        tasks = learner.step(trainable, [batch(), batch(crops=1)], optimizer)
        assert len(tasks) == 2
        assert all(not loss.requires_grad and loss.shape == () for losses in tasks for loss in losses.values())
        assert all(not torch.equal(before[name], parameter) for name, parameter in trainable.named_parameters())
        history.append(sum(sum(losses.values()) for losses in tasks).item())
    assert history[-1] < history[0]


@pytest.mark.parametrize("row", CHOICES["learner"], ids=str)
def test_adapting_leaves_the_given_model_as_it_is(row, perturbed):
    """And gives a model that upsamples any number of channels."""
    learner, model = build_filler("learner", {"name": row.name, **row.settings}), tiny_model(perturbed)
    before = copy.deepcopy(model.state_dict())
    adapted = learner.adapt(model, small_objective(), [batch()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert adapted(*inputs(channels=9)).shape == (1, 9, 13, 9)


def test_auxiliary_losses_are_trained_with_the_objectives(perturbed):
    """A filler's own loss reaches its weights in the same step, and is reported beside the others."""

    class Penalised(Decoder):
        def __init__(self, embed_dim: int):
            super().__init__()
            self.gate = nn.Parameter(torch.tensor(2.0))

        def forward(self, output: Tensor, context: Context) -> Tensor:
            return output

        def auxiliary_loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
            return {"gate_loss": self.gate.square()}

    model = AnyUp(decoder=Penalised, embed_dim=WIDTH)
    losses = one_step(model, small_objective())
    assert losses["gate_loss"] == 4
    assert model.decoder.gate.item() == pytest.approx(2 - 0.1 * 4)


def one_step(model: nn.Module, objective: Objective, rate: float = 0.1) -> dict[str, Tensor]:
    """The losses of a plain step on one batch."""
    trainable = Trainable(model, objective, PlainStep())
    [losses] = PlainStep().step(trainable, [batch()], torch.optim.SGD(trainable.parameters(), lr=rate))
    return losses


def small_objective() -> Objective:
    return build_filler("objective", {"name": "cosine_mse", "self_consistency": 0})


# --- the host checks what it is given --------------------------------------------------------------------------------


class Base:
    """A filler that answers with `self.answer` of what it should have."""

    answer: ClassVar[Callable] = staticmethod(lambda output: output)

    def __init__(self, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim


class WrongUnifier(Base, Unifier):
    def forward(self, features, guidance):
        return self.answer(features.new_zeros(len(features), self.embed_dim, *features.shape[-2:]))


class WrongAttention(Base, Attention):
    def forward(self, query, key, value):
        return self.answer(value.new_zeros(*value.shape[:2], *query.shape[-2:]))


class WrongDecoder(Base, Decoder):
    def forward(self, output, context):
        return self.answer(output)


class WrongRefiner(Base, Refiner):
    needs_whole_output = False

    def forward(self, output, context):
        return self.answer(output)


class WrongTemporal(Base, Temporal):
    needs_whole_output = False

    def forward(self, output, context, state):
        return self.answer(output), state


class StatelessTemporal(Base, Temporal):
    needs_whole_output = False

    def forward(self, output, context, state):
        return output


WRONG = {
    "unifier": WrongUnifier,
    "attention": WrongAttention,
    "decoder": WrongDecoder,
    "refiner": WrongRefiner,
    "temporal": WrongTemporal,
}
ANSWERS = {
    "too narrow": (
        lambda output: output[:, :-1],
        ValueError,
        r"must return shape \(\d, \d+, \d+, \d+\), got \(\d, \d+",
    ),
    "transposed": (lambda output: output.transpose(2, 3), ValueError, "must return shape .*, got"),
    "flattened": (lambda output: output.flatten(2), ValueError, "must return shape .*, got"),
    "a tuple": (lambda output: (output,), TypeError, "must return a tensor of shape .*, got tuple"),
    "nothing": (lambda output: None, TypeError, "must return a tensor of shape .*, got NoneType"),
    "an array": (lambda output: output.detach().numpy(), TypeError, "must return a tensor of shape .*, got ndarray"),
}


@pytest.mark.parametrize("way", ["forward", "stream"])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("hook", MODEL_HOOKS)
def test_a_wrong_answer_names_hook_point_and_class(hook, answer, way, monkeypatch):
    wrong, error, message = ANSWERS[answer]
    cls = WRONG[hook]
    monkeypatch.setattr(cls, "answer", staticmethod(wrong))
    model = AnyUp(**{hook: cls}, embed_dim=WIDTH)
    image, features, size = inputs(batch=2)
    with torch.no_grad(), pytest.raises(error, match=f"{hook} {cls.__name__} {message}"):
        model(image, features, size) if way == "forward" else list(model.stream(image, features, size))


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("way", ["forward", "stream"])
def test_a_temporal_filler_without_a_state_is_named(images, way):
    """A tensor of two images unpacks into two values: it must not pass for (output, state)."""
    model = AnyUp(temporal=StatelessTemporal, embed_dim=WIDTH)
    image, features, size = inputs(batch=images)
    with torch.no_grad(), pytest.raises(TypeError, match=r"temporal StatelessTemporal must return .*state"):
        model(image, features, size) if way == "forward" else list(model.stream(image, features, size))


@pytest.mark.parametrize("hook", MODEL_HOOKS)
def test_a_right_answer_passes(hook):
    """Guards the tests above: only the answer is wrong there."""
    with torch.no_grad():
        assert AnyUp(**{hook: WRONG[hook]}, embed_dim=WIDTH)(*inputs()).shape == (1, 5, 13, 9)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda loss: loss, "objective Answer must return a dict"),
        (lambda loss: {"my_loss": loss.expand(3)}, "objective Answer.*my_loss.*scalar"),
        (lambda loss: {}, "objective Answer.*no loss"),
    ],
    ids=["a tensor", "no scalar", "nothing"],
)
def test_an_objectives_wrong_answer_is_named(losses, message, perturbed):
    class Answer(Objective):
        def forward(self, model, batch, output):
            return losses(output.mean())

    model = tiny_model(perturbed)
    with pytest.raises((TypeError, ValueError), match=message):
        one_step(model, Answer())


def test_two_losses_of_one_name_are_refused(perturbed):
    """Otherwise one of them would silently not be trained."""

    class Twice(Decoder):
        def __init__(self, embed_dim: int):
            super().__init__()

        def forward(self, output, context):
            return output

        def auxiliary_loss(self, output, batch):
            return {"reconstruction_loss": torch.zeros(())}

    model = AnyUp(decoder=Twice, embed_dim=WIDTH)
    with pytest.raises(ValueError, match="reconstruction_loss"):
        one_step(model, small_objective())
