"""The model leaves PyTorch's eager mode: torch.export, ONNX, and compiled encoders give the same numbers."""

import shutil

import numpy as np
import pytest
import torch

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


@pytest.mark.slow
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
