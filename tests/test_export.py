"""The model leaves PyTorch's eager mode: torch.export, ONNX, and compiled encoders give the same numbers."""

import shutil

import numpy as np
import pytest
import torch
from torch.export import Dim

import core

IMAGE, FEATURES = torch.randn(2, 3, 32, 48), torch.randn(2, 7, 4, 6)
SIZE = (24, 40)


@pytest.fixture
def model(perturbed) -> core.AnyUp:
    return perturbed(core.build(["embed_dim=16", "unifier.num_basis=8"])).eval()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_exported_program_gives_the_same_numbers_and_can_be_stored(model, tmp_path):
    with torch.no_grad():
        expected = model(IMAGE, FEATURES, SIZE)
        program = torch.export.export(model, (IMAGE, FEATURES, SIZE))
    torch.export.save(program, tmp_path / "anyup.pt2")
    close(torch.export.load(tmp_path / "anyup.pt2").module()(IMAGE, FEATURES, SIZE), expected)


@pytest.mark.parametrize(
    "overrides",
    [
        ["unifier=none", "attention=global"],
        ["unifier.ordering=released", "attention.window_ratio=0.3"],
        ["attention=bilateral_prior"],
    ],
)
def test_other_choices_export(perturbed, overrides):
    model = perturbed(core.build(["embed_dim=16", *overrides])).eval()
    with torch.no_grad():
        program = torch.export.export(model, (IMAGE, FEATURES, SIZE))
        close(program.module()(IMAGE, FEATURES, SIZE), model(IMAGE, FEATURES, SIZE))


def test_an_exported_program_keeps_its_gradients(model):
    """Exported with gradients on: it differentiates as the model does."""
    program = torch.export.export(model, (IMAGE, FEATURES, SIZE)).module()
    ours, theirs = (image.clone().requires_grad_() for image in (IMAGE, IMAGE))
    given = torch.randn(2, 7, *SIZE)
    (model(ours, FEATURES, SIZE) * given).sum().backward()
    (program(theirs, FEATURES, SIZE) * given).sum().backward()
    torch.testing.assert_close(theirs.grad, ours.grad, rtol=0, atol=1e-4 * ours.grad.abs().max().item())


@pytest.mark.xfail(strict=True, reason="exported programs serve one batch size and width: blocks are cut for them")
@pytest.mark.parametrize(
    ("shapes", "others"),
    [
        ({"image": {0: Dim("batch", min=1, max=64)}, "features": {0: Dim("batch", min=1, max=64)}}, [(1, 7), (5, 7)]),
        ({"image": None, "features": {1: Dim("channels", min=2, max=4096)}}, [(2, 384), (2, 2)]),
    ],
    ids=["batch", "channels"],
)
def test_one_program_serves_any(model, shapes, others):
    """Batch and number of channels may stay open; sizes are fixed, because the windows are worked out from them."""
    with torch.no_grad():
        program = torch.export.export(
            model, (IMAGE, FEATURES, SIZE), dynamic_shapes=shapes | {"output_size": (None, None)}
        ).module()
        for batch, channels in others:
            image, features = torch.randn(batch, 3, 32, 48), torch.randn(batch, channels, 4, 6)
            close(program(image, features, SIZE), model(image, features, SIZE))


def test_an_exported_program_refuses_other_sizes(model):
    """It was made for one size of everything: no wrong numbers for another."""
    with torch.no_grad():
        program = torch.export.export(model, (IMAGE, FEATURES, SIZE)).module()
        for inputs in (
            (IMAGE[..., :40], FEATURES, SIZE),
            (IMAGE, FEATURES[..., :5], SIZE),
            (IMAGE, FEATURES, (24, 41)),
        ):
            with pytest.raises((AssertionError, RuntimeError), match=r"(?i)guard|expected"):
                program(*inputs)


def test_onnx_gives_the_same_numbers(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "anyup.onnx"
    with torch.no_grad():
        expected = model(IMAGE, FEATURES, SIZE)
        torch.onnx.export(model, (IMAGE, FEATURES, SIZE), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    (actual,) = session.run(None, dict(zip(names, (IMAGE.numpy(), FEATURES.numpy()), strict=True)))
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_encoders_give_the_same_numbers(model):
    with torch.no_grad():
        expected = model(IMAGE, FEATURES, SIZE)
        close(model.compile_encoders()(IMAGE, FEATURES, SIZE), expected)


compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture
def fresh_compiler():
    """Graphs of earlier tests count towards the compiler's limits: forget them."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()


@pytest.mark.slow
@compiles
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [None, (3, 5)])
def test_compile_true_gives_the_same_numbers_and_gradients(fresh_compiler, size):
    """As an option of `build`, with whole and pooled queries; without gradients and with."""
    plain = core.build(["embed_dim=16", "unifier.num_basis=8"])
    compiled = core.build(["embed_dim=16", "unifier.num_basis=8", "compile=true"])
    assert compiled.config == plain.config
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        close(compiled(IMAGE, FEATURES, size), plain(IMAGE, FEATURES, size))
    assert fresh_compiler() == 3  # image, query and key encoder
    expected, actual = plain(IMAGE, FEATURES, size), compiled(IMAGE, FEATURES, size)
    close(actual.detach(), expected.detach())
    given = torch.randn_like(expected)
    (expected * given).sum().backward()
    (actual * given).sum().backward()
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        largest = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-3 * largest, msg=name)


@pytest.mark.slow
@compiles
@pytest.mark.filterwarnings("ignore")
def test_every_image_size_is_compiled(fresh_compiler):
    """None falls back to plain operations unnoticed: the encoders share their code, and so the compiler's limits."""
    model = core.build(["embed_dim=8", "attention.num_heads=1", "unifier=none", "compile=true"]).eval()
    for sizes, side in enumerate((16, 20, 24, 28), start=1):
        with torch.no_grad():
            model(torch.randn(1, 3, side, side), torch.randn(1, 2, 4, 4))
        assert fresh_compiler() == 3 * sizes, f"{side}² was not compiled"
