"""What runs on a GPU, here on CPU: few large operations that compute the same function in bounded memory."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import core
from core.attention import WindowAttention
from core.fast import blocks_of_tiles, launches
from core.fast.norm_act_conv import moments_of

VIEWS = ("view", "permute", "transpose", "squeeze", "slice", "select", "expand", "aten.t.", "split", "unfold", "alias")
SIZES = [
    ((37, 41), (5, 7), 0.1),
    ((64, 48), (16, 12), 0.1),
    ((20, 20), (3, 5), 0.0),
    ((9, 7), (12, 11), 0.25),
    ((1, 1), (1, 1), 0.1),
]


class Operations(TorchDispatchMode):
    """Counts operations, views and empty memory apart."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not any(word in str(operation) for word in (*VIEWS, "empty", "detach"))
        return operation(*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu(small: int | None = None, block: int | None = None):
    """`small`: numbers up to which images are small; `block`: bytes of a block, instead of those for a real GPU."""
    limits = {} if small is None else dict.fromkeys((False, True), small)
    bytes_of = {} if block is None else dict.fromkeys((False, True), block)
    with (
        patch.object(launches, "dominate", lambda tensor: True),
        patch.dict(launches.SMALL, limits),
        patch.dict(blocks_of_tiles.MIN_BYTES, bytes_of),
    ):
        yield


def results(module: torch.nn.Module, inputs: list[torch.Tensor], grad: bool) -> list[torch.Tensor]:
    """The output; with `grad` also the gradients of inputs and weights."""
    inputs = [one.clone().requires_grad_(grad) for one in inputs]
    with torch.set_grad_enabled(grad):
        output = module(*inputs)
        if not grad:
            return [output]
        given = torch.linspace(0, 1, output.numel(), dtype=output.dtype).view_as(output)
        return [output, *torch.autograd.grad((output * given).sum(), [*inputs, *module.parameters()])]


def agree(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1e-3, other.abs().max().item()))


@pytest.mark.parametrize(("size", "grid", "ratio"), SIZES)
@pytest.mark.parametrize("block", [1, 2**26])
def test_attention_is_the_same(perturbed, size, grid, ratio, block):
    attention = perturbed(WindowAttention(16, 4, ratio)).double()
    query, key, value = torch.randn(2, 16, *size), torch.randn(2, 16, *grid), torch.randn(2, 5, *grid)
    inputs = [query.double(), key.double(), value.double()]
    for grad in (False, True):
        expected = results(attention, inputs, grad)
        with as_on_a_gpu(block=block):
            agree(results(attention, inputs, grad), expected, 1e-11)
            bands = torch.cat([band for _, band in attention.bands(*inputs)], 2)
        agree([bands], expected[:1], 1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hidden_keys_have_no_weight_in_half_precision(perturbed, dtype):
    """Values that a query must not see are huge: any weight on them would show."""
    attention = perturbed(WindowAttention(16, 4, 0.1)).to(dtype)
    value = torch.zeros(1, 1, 8, 8, dtype=dtype)
    value[..., 4:] = 6e4
    with torch.no_grad(), as_on_a_gpu():
        output = attention(torch.randn(1, 16, 64, 64).to(dtype), torch.randn(1, 16, 8, 8).to(dtype), value)
    assert output[..., :25].abs().max() == 0  # columns whose windows end before the fifth cell
    assert output[..., 40:].min() > 5e4


@pytest.mark.parametrize("small", [0, 2**40])
@pytest.mark.parametrize("size", [None, (21, 33)])
def test_the_model_is_the_same(perturbed, small, size):
    model = perturbed(core.build(["embed_dim=16", "unifier.num_basis=8"])).double()
    image, features = torch.randn(2, 3, 40, 36).double(), torch.randn(2, 7, 5, 6).double()
    whole = type("Sized", (torch.nn.Module,), {"forward": lambda self, *x: self.model(*x, size)})()
    whole.model = model
    for grad in (False, True):
        expected = results(whole, [image, features], grad)
        with as_on_a_gpu(small):
            agree(results(whole, [image, features], grad), expected, 1e-10)


def test_moments_do_not_lose_digits():
    """Of a channel with a mean of 1000 deviations."""
    pixels = torch.randn(2, 40, 30, 16) + 1000 * torch.arange(16).float()
    grouped = pixels.double().view(2, 1200, 8, 2)
    with as_on_a_gpu():
        mean, var = moments_of(pixels)
    torch.testing.assert_close(mean.double(), grouped.mean((1, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), grouped.var((1, 3), correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("grad", "most"), [(False, 200), (True, 500)])
def test_a_small_picture_takes_few_operations(grad, most):
    """About 5 microseconds each on a GPU, whatever they compute."""
    model = core.build(["embed_dim=16", "unifier.num_basis=8"])
    image, features = torch.randn(4, 3, 32, 32), torch.randn(4, 7, 4, 4)
    with as_on_a_gpu(), Operations() as seen, torch.set_grad_enabled(grad):
        output = model(image, features)
        if grad:
            output.sum().backward()
    assert 50 < seen.count < most


def test_more_blocks_are_made_only_of_larger_pictures():
    """Their number is bounded: blocks grow with the queries."""

    def num_blocks(side: int) -> int:
        query, keys = torch.empty(1, 128, side, side, device="meta"), torch.empty(1, side // 16, side // 16, 128)
        plan = blocks_of_tiles.plan(query, keys, 0.1, 4)
        return len(list(plan.blocks(plan.rows_at_once(query, 4, 768))))

    with torch.no_grad():
        blocks = [num_blocks(side) for side in (224, 448, 1024)]
    assert blocks[0] <= 8
    assert max(blocks) <= 20


def test_tables_are_made_once_and_serve_training_after_inference(perturbed):
    attention = perturbed(WindowAttention(16, 4))
    inputs = [torch.randn(1, 16, 48, 48), torch.randn(1, 16, 6, 6), torch.randn(1, 5, 6, 6)]
    with as_on_a_gpu():
        with torch.inference_mode():
            attention(*inputs)
        known = blocks_of_tiles._cached.cache_info().misses
        results(attention, inputs, grad=True)
    assert blocks_of_tiles._cached.cache_info().misses == known


def test_one_graph_compiles(perturbed):
    model = perturbed(core.build(["embed_dim=16", "unifier.num_basis=8"])).eval()
    image, features = torch.randn(2, 3, 48, 48), torch.randn(2, 7, 4, 4)
    torch.compiler.reset()
    with torch.no_grad(), as_on_a_gpu():
        expected = model(image, features)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(image, features)
        program = torch.export.export(model, (image, features)).module()(image, features)
    torch.compiler.reset()
    agree([compiled, program], [expected, expected], 1e-4)


def test_counting_what_is_not_computed_is_quick():
    """Tables of cost count the operations of a forward without computing it: in as few blocks as there can be."""
    model = core.AnyUp().twice_differentiable().to("meta")
    image, features = (torch.empty(1, *shape, device="meta") for shape in ((3, 1024, 1024), (768, 64, 64)))
    with torch.no_grad(), Operations() as seen:
        model(image, features)
    assert 50 < seen.count < 1000
