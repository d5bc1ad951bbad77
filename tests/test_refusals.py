"""What the model refuses: each bad input gets an error that names it and says what is expected."""

import dataclasses
from functools import partial

import pytest
import torch

import core
from core.hooks import Attention, Decoder, Refiner, Unifier
from core.windows import window_bounds

IMAGE, FEATURES = torch.randn(2, 3, 32, 40), torch.randn(2, 5, 4, 6)


@pytest.fixture(scope="module")
def model() -> core.AnyUp:
    return core.AnyUp(embed_dim=16).eval()


@pytest.mark.parametrize(
    ("image", "features", "output_size", "message"),
    [
        (IMAGE[0], FEATURES, None, r"image must have 4 dimensions .* got \(3, 32, 40\)"),
        (IMAGE, FEATURES[0], None, r"features must have 4 dimensions .* got \(5, 4, 6\)"),
        (IMAGE[:1], FEATURES, None, r"same batch, got \(1, 3, 32, 40\) and \(2, 5, 4, 6\)"),
        (IMAGE[:, :1], FEATURES, None, r"image must have 3 channels .* got \(2, 1, 32, 40\)"),
        (IMAGE, FEATURES[:, :, :1, :1], None, r"features must be at least 2x2 cells .* got \(2, 5, 1, 1\)"),
        (IMAGE, FEATURES[:, :, :, :1], None, r"at least 2x2 cells"),
        (IMAGE[:, :, :0], FEATURES, None, "image is empty"),
        (IMAGE, FEATURES[:, :0], None, "features is empty"),
        (IMAGE, FEATURES, (0, 8), r"two positive integers, got \(0, 8\)"),
        (IMAGE, FEATURES, (8, -1), r"two positive integers, got \(8, -1\)"),
        (IMAGE, FEATURES, (8.5, 8), r"two positive integers, got \(8.5, 8\)"),
        (IMAGE, FEATURES, 8, r"output_size must be \(height, width\), got 8"),
        (IMAGE.double(), FEATURES, None, "image is torch.float64 but the model is torch.float32"),
        (IMAGE, FEATURES.half(), None, "features is torch.float16 but the model is torch.float32"),
        (IMAGE, FEATURES.int(), None, "features must be floating point, got torch.int32"),
        (IMAGE, FEATURES.to("meta"), None, "features is on meta but the model is on cpu"),
    ],
)
def test_inputs_that_do_not_fit(model, image, features, output_size, message):
    with pytest.raises(ValueError, match=message):
        model(image, features, output_size)
    with pytest.raises(ValueError, match=message):
        model.stream(image, features, output_size)


def test_inputs_that_are_no_tensors(model):
    with pytest.raises(TypeError, match="image must be a torch tensor, got ndarray"):
        model(IMAGE.numpy(), FEATURES)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["image", "features"])
def test_values_that_are_not_finite_are_counted_where_asked(name, value):
    checking = core.build(["embed_dim=16", "check_finite=true"]).eval()
    inputs = {"image": IMAGE.clone(), "features": FEATURES.clone()}
    inputs[name][1, 0, 1, 1:3] = value
    with pytest.raises(ValueError, match=f"{name} has 2 NaN or infinite values of {inputs[name].numel()}"):
        checking(**inputs)
    assert core.build(["embed_dim=16"])(**inputs).shape == (2, 5, 32, 40)


def test_out_must_fit(model):
    with pytest.raises(ValueError, match=r"out must have shape \(2, 5, 32, 40\), got \(2, 5, 32, 41\)"):
        model(IMAGE, FEATURES, out=torch.empty(2, 5, 32, 41))
    with pytest.raises(TypeError, match="out must be a torch tensor"):
        model(IMAGE, FEATURES, out=torch.empty(2, 5, 32, 40).numpy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(core.AnyUp, embed_dim=12), "embed_dim must be a positive multiple of 8 .* got 12"),
        (partial(core.build, ["attention.num_heads=3"]), "num_heads must divide embed_dim = 128, got 3"),
        (partial(core.build, ["attention=global", "attention.num_heads=0"]), "num_heads must divide"),
        (partial(core.build, ["unifier.num_basis=0"]), "num_basis must be a positive multiple of 8 .*got 0"),
        (partial(core.build, ["unifier.kernel_size=4"]), "kernel_size must be odd and positive, got 4"),
    ],
)
def test_settings_that_make_no_model(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_window_that_sees_nothing():
    with pytest.raises(ValueError, match="window_ratio=1e-09 leaves a query without a key"):
        window_bounds(8, 16, 1e-9)


class WholeOutput(Refiner):
    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output, image, features):
        return output


def test_streaming_past_a_refiner_that_needs_the_whole_output():
    model = core.AnyUp(embed_dim=16, refiner=WholeOutput)
    assert model(IMAGE, FEATURES).shape == (2, 5, 32, 40)
    with pytest.raises(ValueError, match="refiner=WholeOutput needs the whole output, so it cannot be streamed"):
        model.stream(IMAGE, FEATURES)
    with pytest.raises(ValueError, match="refiner=none"):
        model(IMAGE, FEATURES, out=torch.empty(2, 5, 32, 40))


class WrongUnifier(Unifier):
    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, features, guidance):
        return features


class WrongAttention(Attention):
    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, query, key, value):
        return value


class WrongDecoder(Decoder):
    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output, features, guidance, coords):
        return None


@pytest.mark.parametrize(
    ("filler", "error", "message"),
    [
        ({"unifier": WrongUnifier}, ValueError, r"unifier WrongUnifier must return shape \(2, 16, 4, 6\), got \(2, 5, 4, 6\)"),
        ({"attention": WrongAttention}, ValueError, r"attention WrongAttention must return shape \(2, 5, 32, 40\)"),
        ({"decoder": WrongDecoder}, TypeError, "decoder WrongDecoder must return a tensor .* got NoneType"),
    ],
)
def test_a_filler_that_breaks_its_promise_is_named(filler, error, message):
    with pytest.raises(error, match=message):
        core.AnyUp(embed_dim=16, **filler)(IMAGE, FEATURES)


BATCH = core.Batch(IMAGE, FEATURES, torch.randn(4, 5, 3, 3), (8, 12), torch.zeros(4, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "self_consistency > 0 needs batch.augmented_image"),
        ({"corners": torch.zeros(3, 2, dtype=torch.int64)}, "4 targets and 3 corners are no equal number of crops"),
        ({"target": torch.randn(3, 5, 3, 3), "corners": torch.zeros(3, 2, dtype=torch.int64)}, "2 images"),
    ],
)
def test_batches_that_do_not_fit(model, change, message):
    objective = core.build_filler("objective", core.compose().objective)
    with pytest.raises(ValueError, match=message):
        objective(model, dataclasses.replace(BATCH, **change))


def test_compile_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match="compile=true needs a C\\+\\+ compiler"):
        core.AnyUp(embed_dim=16, compile=True)


def test_reference_of_another_model_is_refused():
    from core.reference import reference_of

    with pytest.raises(ValueError, match="the reference is the baseline only, not unifier=none"):
        reference_of(core.build(["unifier=none", "embed_dim=16"]))

