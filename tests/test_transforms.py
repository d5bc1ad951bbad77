"""torch.func, torch.jit and copies: what works, and what to do where it does not."""

import copy
import io
import pickle

import learn2learn
import pytest
import torch
from torch import Tensor

import core


def model() -> core.AnyUp:
    return core.build(["embed_dim=16", "unifier.num_basis=8"]).eval()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, 3, 12, 16, generator=generator), torch.randn(1, 5, 3, 4, generator=generator)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=lambda f: f.__name__)
def test_the_fast_path_names_the_way_out_of_torch_func(transform):
    fast, (image, features) = model(), inputs()
    given = features if transform is torch.func.grad else features[None]
    with pytest.raises(RuntimeError, match=r"torch.func .* call model.twice_differentiable\(\) first"):
        transform(lambda x: fast(image, x, (6, 8)).square().sum())(given)


def test_torch_func_works_with_plain_operations():
    plain, (image, features) = model().double().twice_differentiable(), inputs()
    image, features = image.double(), features.double()

    def loss(x: Tensor) -> Tensor:
        return plain(image, x, (6, 8)).square().sum()

    given = features.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(given), given)
    torch.testing.assert_close(torch.func.grad(loss)(features), expected)
    several = torch.stack([features, features.flip(-1)])
    torch.testing.assert_close(torch.func.vmap(loss)(several), torch.stack([loss(x) for x in several]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:FutureWarning")
@pytest.mark.parametrize("plain", [False, True])
def test_tracing_names_export(plain):
    with pytest.raises(RuntimeError, match=r"use torch.export.export"):
        torch.jit.trace(model().twice_differentiable(plain), inputs())


@pytest.fixture
def compiled(monkeypatch) -> list:
    """Every function that was compiled, here by a compiler that leaves it as it is."""
    seen = []

    def compiler(function, **settings):
        seen.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    return seen


def moved(other: core.AnyUp) -> core.AnyUp:
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_a_compiled_model_runs_its_own_weights(compiled, copied):
    original = model().compile_encoders()
    with torch.no_grad():
        expected = original(*inputs())
        assert len(compiled) == 3
        other = moved(copied(original))
        torch.testing.assert_close(other(*inputs()), moved(model())(*inputs()))
        assert torch.equal(original(*inputs()), expected)
    assert {function.__self__ for function in compiled} == {
        getattr(one, name) for one in (original, other) for name in ("image_encoder", "query_encoder", "key_encoder")
    }


def test_a_functional_copy_of_a_compiled_model_runs_its_own_weights(compiled):
    """learn2learn copies modules attribute by attribute."""
    original = model().compile_encoders()
    with torch.no_grad():
        original(*inputs())
    other = learn2learn.clone_module(original)
    for weight in other.parameters():
        weight.update = 0.1 * weight if weight.is_floating_point() else None
    learn2learn.update_module(other)
    with torch.no_grad():
        torch.testing.assert_close(other(*inputs()), moved(model())(*inputs()))


def test_a_compiled_model_is_sent_to_another_process(compiled):
    buffer = io.BytesIO()
    original = model().compile_encoders()
    original(*inputs())
    torch.save(original.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == model().state_dict().keys(), "nothing compiled is a weight"
