"""What the model refuses: each bad input gets an error that names it and says what is expected."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

import core
from core.fast.windows import window_bounds
from core.hooks import Attention, Decoder, Refiner, Unifier

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

    def forward(self, output, context):
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

    def forward(self, output, context):
        return None


@pytest.mark.parametrize(
    ("filler", "error", "message"),
    [
        (
            {"unifier": WrongUnifier},
            ValueError,
            r"unifier WrongUnifier must return shape \(2, 16, 4, 6\), got \(2, 5, 4, 6\)",
        ),
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
        ({"corners": torch.zeros(3, 2, dtype=torch.int64)}, "got 4 targets and 3 corners for 2 images"),
        ({"target": torch.randn(3, 5, 3, 3), "corners": torch.zeros(3, 2, dtype=torch.int64)}, "2 images"),
    ],
)
def test_batches_that_do_not_fit(model, change, message):
    objective = core.build_filler("objective", core.compose().objective)
    with pytest.raises(ValueError, match=message):
        losses_of(objective, model, dataclasses.replace(BATCH, **change))


def test_compile_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match="compile=true needs a C\\+\\+ compiler"):
        core.AnyUp(embed_dim=16, compile=True)


def test_reference_of_another_model_is_refused():
    from core.reference import reference_of

    with pytest.raises(ValueError, match=r"the reference is the baseline only .* got unifier=none"):
        reference_of(core.build(["unifier=none", "embed_dim=16"]))


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output_size",
    [
        (0, 0),
        (-3, 8),
        (8, 2.5),
        (40.0, 40),
        (8, True),
        (np.float32(8), 8),
        torch.tensor([8.0, 9.0]),
        (torch.tensor(8.0), 8),
        (float("inf"), 8),
        (float("nan"), 8),
        (None, 8),
        ("8", "8"),
        ("a", "b"),
        (8,),
        (8, 8, 8),
        (2, 5, 8, 8),
        "88",
        8.0,
        ([8], [8]),
    ],
    ids=repr,
)
def test_output_sizes_that_are_none(model, output_size):
    """Whatever is given, the message says what an output size is."""
    message = r"output_size must be (two positive integers|\(height, width\))"
    for call in (model, model.stream, lambda *inputs: model(*inputs, return_state=True)):
        with pytest.raises(ValueError, match=message):
            call(IMAGE, FEATURES, output_size)


@pytest.mark.parametrize(
    "output_size",
    [[8, 9], torch.Size([8, 9]), (np.int64(8), np.uint8(9)), torch.tensor([8, 9]), (torch.tensor(8), 9)],
    ids=repr,
)
def test_output_sizes_that_are_some(model, output_size):
    assert model(IMAGE, FEATURES, output_size).shape == (2, 5, 8, 9)


@pytest.mark.parametrize(
    ("image", "features", "message"),
    [
        (
            IMAGE[None],
            FEATURES,
            r"image must have 4 dimensions \(batch, channels, height, width\), got \(1, 2, 3, 32, 40\)",
        ),
        (IMAGE, FEATURES.flatten(2), r"features must have 4 dimensions .*, got \(2, 5, 24\)"),
        (IMAGE, torch.cat([FEATURES] * 2), r"same batch, got \(2, 3, 32, 40\) and \(4, 5, 4, 6\)"),
        (IMAGE.repeat(1, 2, 1, 1)[:, :4], FEATURES, r"image must have 3 channels .*, got \(2, 4, 32, 40\)"),
        (IMAGE.permute(0, 2, 3, 1), FEATURES, r"image must have 3 channels .*, got \(2, 32, 40, 3\)"),
        (
            IMAGE,
            FEATURES[:, :, :1],
            r"features must be at least 2x2 cells .*got \(2, 5, 1, 6\); run the backbone on a larger",
        ),
        (IMAGE[:0], FEATURES[:0], r"image is empty: \(0, 3, 32, 40\)"),
        ((255 * IMAGE).byte(), FEATURES, r"image must be floating point, got torch.uint8"),
        (IMAGE, FEATURES.to(torch.complex64), r"features must be floating point, got torch.complex64"),
        (IMAGE, FEATURES.bfloat16(), r"features is torch.bfloat16 but the model is torch.float32; convert one of them"),
    ],
)
def test_more_inputs_that_do_not_fit(model, image, features, message):
    out = torch.empty(2, 5, 8, 8)
    for call in (
        lambda: model(image, features, (8, 8)),
        lambda: model(image, features, (8, 8), state=None, return_state=True),
        lambda: model.stream(image, features, (8, 8)),  # at once, not when the first band is asked for
        lambda: model(image, features, (8, 8), out=out),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("image", [None, [1, 2], "photo.jpg"])
def test_images_that_are_no_tensors(model, image):
    with pytest.raises(TypeError, match=rf"image must be a torch tensor, got {type(image).__name__}"):
        model(image, FEATURES)
    with pytest.raises(TypeError, match=rf"features must be a torch tensor, got {type(image).__name__}"):
        model(IMAGE, image)


def test_nothing_is_computed_before_a_refusal(model, monkeypatch):
    monkeypatch.setattr(model.image_encoder, "forward", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ValueError, match="output_size"):
        model(IMAGE, FEATURES, (0, 1))
    with pytest.raises(ValueError, match="out must"):
        model(IMAGE, FEATURES, out=torch.empty(3))


def test_autocast_takes_inputs_of_its_own_dtype(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(IMAGE.bfloat16(), FEATURES.bfloat16()).shape == (2, 5, 32, 40)


# --- out= ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.empty(2, 5, 40, 32), ValueError, r"out must have shape \(2, 5, 32, 40\), got \(2, 5, 40, 32\)"),
        (torch.empty(1, 5, 32, 40), ValueError, r"out must have shape \(2, 5, 32, 40\), got \(1, 5, 32, 40\)"),
        (torch.empty(2, 5, 1, 1), ValueError, r"out must have shape"),
        (torch.empty(2, 5, 32, 40, requires_grad=True), ValueError, r"out requires a gradient"),
        (torch.empty(2, 5, 32, 40, dtype=torch.int32), ValueError, r"out must be floating point, got torch.int32"),
        ([0.0], TypeError, r"out must be a torch tensor .*got list"),
    ],
)
def test_buffers_that_do_not_fit(model, out, error, message):
    with pytest.raises(error, match=message):
        model(IMAGE, FEATURES, out=out)


def test_a_buffer_of_less_precision_is_meant(model):
    """Half the space for the result of a float32 computation: a conversion that someone asked for."""
    out = torch.empty(2, 5, 32, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(IMAGE, FEATURES, out=out), model(IMAGE, FEATURES).bfloat16())


def test_a_refused_buffer_is_untouched():
    model = core.AnyUp(embed_dim=16, refiner=WholeOutput)
    out = torch.full((2, 5, 32, 40), 7.0)
    with pytest.raises(ValueError, match=r"refiner=WholeOutput .* call the model without out=, or use refiner=none"):
        model(IMAGE, FEATURES, out=out)
    assert (out == 7).all()


class WholeVideo(core.Temporal):
    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output, context, state):
        return output, state


def test_streaming_past_a_temporal_filler_that_needs_the_whole_output():
    model = core.AnyUp(embed_dim=16, temporal=WholeVideo)
    with pytest.raises(ValueError, match=r"temporal=WholeVideo needs the whole output.*or use temporal=none"):
        model.stream(IMAGE, FEATURES)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(core.AnyUp, embed_dim=0), "embed_dim must be a positive multiple of 8 .* got 0"),
        (partial(core.AnyUp, embed_dim=-8), "embed_dim must be a positive multiple of 8 .* got -8"),
        (partial(core.build, ["embed_dim=4"]), "embed_dim must be a positive multiple of 8 .* got 4"),
        (partial(core.build, ["attention.num_heads=-1"]), "num_heads must divide embed_dim = 128, got -1"),
        (partial(core.build, ["attention.num_heads=256"]), "num_heads must divide embed_dim = 128, got 256"),
        (partial(core.build, ["unifier.num_basis=12"]), "num_basis must be a positive multiple of 8 .*got 12"),
        (partial(core.build, ["unifier.num_basis=-8"]), "num_basis must be a positive multiple of 8 .*got -8"),
        (partial(core.build, ["unifier.kernel_size=-1"]), "kernel_size must be odd and positive, got -1"),
        (partial(core.build, ["attention.window_ratio=nan"]), "window_ratio .*nan"),
    ],
)
def test_more_settings_that_make_no_model(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_window_too_narrow_for_a_grid_is_refused_when_it_is_met():
    """One query in the middle of two keys, and a window that ends before either: the same model serves other sizes."""
    model = core.build(["embed_dim=16", "attention.window_ratio=1e-9"])
    with pytest.raises(
        ValueError, match=r"window_ratio=1e-09 leaves a query without a key; use a wider one, or 0 for no"
    ):
        model(IMAGE, FEATURES, (1, 1))
    assert model(IMAGE, FEATURES, (8, 12)).shape == (2, 5, 8, 12)


# --- not finite ------------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_are_looked_for_in_every_way_in():
    checking = core.build(["embed_dim=16", "check_finite=true"]).eval()
    image = IMAGE.clone()
    image[0, 2, 5, 6] = -torch.inf
    message = r"image has 1 NaN or infinite values of 7680"
    for call in (
        lambda: checking(image, FEATURES),
        lambda: checking.stream(image, FEATURES),
        lambda: checking(image, FEATURES, return_state=True),
        lambda: checking(image, FEATURES, out=torch.empty(2, 5, 32, 40)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert checking(IMAGE, FEATURES).shape == (2, 5, 32, 40)


# --- batches ---------------------------------------------------------------------------------------------------------

AUGMENTED = dataclasses.replace(BATCH, augmented_image=IMAGE)


def losses_of(objective, model, batch):
    return objective(model, batch, model(batch.image, batch.features, batch.output_size))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corners": None}, r"target.*\(4, 5, 3, 3\).*\(2, 5, 8, 12\)"),
        ({"corners": None, "target": torch.randn(1, 5, 8, 12)}, r"target.*\(1, 5, 8, 12\).*\(2, 5, 8, 12\)"),
        ({"corners": None, "target": torch.randn(2, 1, 8, 12)}, r"target.*\(2, 1, 8, 12\).*\(2, 5, 8, 12\)"),
        ({"target": torch.randn(4, 1, 3, 3)}, r"target.*\(4, 1, 3, 3\)"),
        ({"corners": torch.tensor([[0, 0], [6, 0], [0, 0], [0, 0]])}, r"(?i)corner.*outside|outside.*corner|\(6, 0\)"),
        (
            {"corners": torch.tensor([[0, 0], [0, -1], [0, 0], [0, 0]])},
            r"(?i)corner.*outside|outside.*corner|\(0, -1\)",
        ),
        ({"corners": torch.tensor([[0, 10]] * 4), "target": torch.randn(4, 5, 3, 3)}, r"(?i)corner.*outside|\(0, 10\)"),
    ],
    ids=["no corners", "one target", "one channel", "channels", "below", "negative", "right"],
)
def test_targets_that_are_not_part_of_the_output(model, change, message):
    """Never broadcast, never cut off: a wrong loss would look like a loss."""
    objective = core.build_filler("objective", {"name": "cosine_mse", "self_consistency_size": 8})
    assert len(losses_of(objective, model, AUGMENTED)) == 3
    with pytest.raises(ValueError, match=message):
        losses_of(objective, model, dataclasses.replace(AUGMENTED, **change))


def test_a_loss_that_is_switched_off_needs_nothing(model):
    objective = core.build_filler("objective", {"name": "cosine_mse", "self_consistency": 0})
    assert losses_of(objective, model, BATCH).keys() == {"reconstruction_loss", "input_consistency_loss"}
