"""The published numbers: the golden file, and (without any file) the reference with other weights and shapes."""

import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from core import AnyUp, build, from_config
from core.fast.windows import window_bounds
from core.published import rename_published, to_published
from core.reference import ReferenceAnyUp, reference_of
from core.training import cosine_mse

GOLDEN = "reference/anyup_reference.safetensors"
NUM_CASES, NUM_WINDOWS = 7, 4
PATHS = ("inference", "training", "twice_differentiable", "stream", "out", "reference", "reference_in_parts")


@cache
def read(path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["cases"])


@pytest.fixture(scope="module")
def golden(shared):
    return read(shared(GOLDEN))


def state_of(golden) -> dict[str, torch.Tensor]:
    return {name.removeprefix("state/"): tensor for name, tensor in golden[0].items() if name.startswith("state/")}


@pytest.fixture(scope="module")
def model(golden) -> AnyUp:
    state, config = rename_published(state_of(golden))
    model = from_config(config)
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def reference(golden) -> ReferenceAnyUp:
    reference = ReferenceAnyUp()
    reference.load_state_dict(state_of(golden))
    return reference


def run(path: str, model: AnyUp, reference: ReferenceAnyUp, image, features, size) -> torch.Tensor:
    """The output of one path through the code."""
    with torch.set_grad_enabled(path == "training"):
        if path.startswith("reference"):
            return reference(image, features, size, queries_at_once=100 if path == "reference_in_parts" else None)
        if path == "stream":
            return torch.cat([band for _, band in model.stream(image, features, size)], 2)
        if path == "out":
            return model(image, features, size, out=image.new_full((*features.shape[:2], *size), torch.nan))
        model.twice_differentiable(path == "twice_differentiable")
        try:
            return model(image, features, size).detach()
        finally:
            model.twice_differentiable(False)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error as a share of the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# --- the file ------------------------------------------------------------------------------------------------------


def test_the_file_is_what_these_tests_expect(golden):
    tensors, cases = golden
    assert sum("image" in case for case in cases) == NUM_CASES
    assert sum("window_low" in case for case in cases) == NUM_WINDOWS
    for i, case in enumerate(cases[:NUM_CASES]):
        assert tensors[f"case{i}/image"].shape == (case["batch"], 3, *case["image"])
        assert tensors[f"case{i}/features"].shape == (case["batch"], case["channels"], *case["features"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", range(NUM_CASES))
def test_outputs(golden, model, reference, case, path):
    tensors = golden[0]
    image, features, expected = (tensors[f"case{case}/{name}"] for name in ("image", "features", "output"))
    output = run(path, model, reference, image, features, tuple(expected.shape[-2:]))
    assert relative(output, expected) < 1e-5


@pytest.mark.parametrize("case", range(NUM_CASES))
def test_feature_agnostic_layer(golden, model, case):
    tensors = golden[0]
    layer = model.unifier.encoder[0]
    features, expected = F.normalize(tensors[f"case{case}/features"], dim=1), tensors[f"case{case}/unified"]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert relative(layer(features).detach(), expected) < 1e-5


@pytest.mark.parametrize("window", range(NUM_WINDOWS))
def test_windows_are_identical(golden, window):
    tensors, cases = golden
    case = cases[NUM_CASES + window]
    expected = tensors[f"window{window}/bounds"].long()  # (Hq,Wq,4): r0, r1, c0, c1
    (rows_from, rows_to), (columns_from, columns_to) = (
        tuple(map(torch.from_numpy, window_bounds(high, low, 0.1)))
        for high, low in zip(case["window_high"], case["window_low"], strict=True)
    )
    size = expected.shape[:2]
    assert torch.equal(rows_from[:, None].expand(size), expected[..., 0])
    assert torch.equal(rows_to[:, None].expand(size), expected[..., 1])
    assert torch.equal(columns_from.expand(size), expected[..., 2])
    assert torch.equal(columns_to.expand(size), expected[..., 3])


def test_loss(golden):
    tensors = golden[0]
    loss = cosine_mse(tensors["loss/pred"], tensors["loss/target"])
    assert loss.item() == pytest.approx(tensors["loss/value"].item(), rel=1e-5)


@pytest.mark.parametrize("path", ["fast", "twice_differentiable", "reference"])
def test_gradient_norms(golden, model, reference, path):
    """Ours, under the published names: what we dropped gets no gradient there either."""
    tensors = golden[0]
    network = reference if path == "reference" else model
    target = tensors["grad/target"]
    network.zero_grad()
    model.twice_differentiable(path == "twice_differentiable")
    try:
        loss = cosine_mse(network(tensors["grad/image"], tensors["grad/features"], tuple(target.shape[-2:])), target)
        loss.backward()
    finally:
        model.twice_differentiable(False)
    assert loss.item() == pytest.approx(tensors["grad/loss"].item(), rel=1e-5)
    grads = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in network.named_parameters()
    }
    network.zero_grad()
    grads = grads if path == "reference" else to_published(grads)
    expected = {
        name.removeprefix("grad/norm/"): norm.item() for name, norm in tensors.items() if name.startswith("grad/norm/")
    }
    assert len(expected) == 71
    wrong = {
        name: (grads[name].norm().item(), norm)
        for name, norm in expected.items()
        if grads[name].norm().item() != pytest.approx(norm, rel=1e-4)
    }
    assert not wrong


@pytest.mark.parametrize("ordering", ["paper", "released"])
@pytest.mark.parametrize("network", ["model", "reference"])
def test_what_permuted_channels_change(golden, ordering, network):
    """The unified features: nothing with `paper`; more than their own standard deviation with `released`."""
    image, features = golden[0]["case1/image"], golden[0]["case1/features"]
    order = torch.randperm(features.shape[1], generator=torch.Generator().manual_seed(3))
    if network == "model":
        state, config = rename_published(state_of(golden))
        config["unifier"]["ordering"] = ordering
        chosen = from_config(config)
        chosen.load_state_dict(state)
        layer = chosen.unifier.encoder[0]
    else:
        chosen = ReferenceAnyUp(ordering=ordering)
        chosen.load_state_dict(state_of(golden))
        blocks = chosen.key_features_encoder
        chosen.key_features_encoder = blocks[:1]
        layer = chosen._unify
    with torch.no_grad():
        before, after = (layer(F.normalize(some, dim=1)) for some in (features, features[:, order]))
        if network == "reference":
            chosen.key_features_encoder = blocks
        straight, permuted = chosen(image, features)[:, order], chosen(image, features[:, order])
    spread = before.std(correction=0)
    moved = (after - before).square().mean().sqrt()
    if ordering == "paper":
        terms = features.shape[1] + 25  # the sum over channels, and before it a filter's products
        assert relative(after, before) < terms * torch.finfo(torch.float32).eps
        assert relative(permuted, straight) < 1e-5
    else:
        assert moved > spread
        assert relative(permuted, straight) > 1e-3


# --- without a file ------------------------------------------------------------------------------------------------

IDENTITIES = {
    "square": ("embed_dim=128 unifier.ordering=released", (1, 5, 4, 4), (48, 48), (48, 48)),
    "odd": ("embed_dim=128 unifier.ordering=released", (2, 3, 5, 7), (37, 53), (29, 31)),
    "paper": ("embed_dim=64 unifier.num_basis=24 unifier.kernel_size=3", (1, 6, 7, 4), (31, 44), (62, 17)),
    "two_cells": ("embed_dim=32 attention.num_heads=2 unifier.ordering=released", (1, 1, 2, 2), (20, 9), (20, 9)),
    "one_query": ("embed_dim=24 attention.num_heads=3 attention.window_ratio=0.3", (2, 4, 3, 2), (11, 13), (1, 1)),
    "finer_features": ("embed_dim=16 attention.num_heads=1 unifier.num_basis=8", (1, 7, 17, 13), (15, 9), (6, 8)),
    "wide_window": ("embed_dim=40 attention.num_heads=5 attention.window_ratio=2", (1, 2, 6, 5), (21, 19), (40, 33)),
    "no_window": ("embed_dim=16 attention.num_heads=8 attention.window_ratio=0", (1, 3, 9, 6), (25, 16), (25, 16)),
    "global": ("embed_dim=16 attention=global unifier.kernel_size=1", (2, 3, 4, 9), (16, 33), (33, 16)),
}


@pytest.mark.parametrize("path", PATHS[:-2])
@pytest.mark.parametrize("name", IDENTITIES)
def test_model_is_the_reference_in_float64(perturbed, name, path):
    overrides, shape, image_size, output_size = IDENTITIES[name]
    model = perturbed(build(overrides.split())).double()
    reference = reference_of(model)
    image, features = torch.randn(shape[0], 3, *image_size).double(), torch.randn(shape).double()
    with torch.no_grad():
        expected = reference(image, features, output_size)
    assert expected.dtype == torch.float64
    assert expected.std() > 0.01
    assert relative(run(path, model, reference, image, features, output_size), expected) < 1e-10


def test_the_reference_has_the_published_names_and_size(perturbed):
    reference = ReferenceAnyUp()
    assert sum(parameter.numel() for parameter in reference.parameters()) == 878_080
    dead = sum(p.numel() for p in AnyUp().parameters()) - 878_080
    assert dead == -(33_024 + 128)  # value and output projections, and the key bias
    model = perturbed(AnyUp())
    state, _ = rename_published(to_published(model.state_dict()))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_every_weight_of_the_model_reaches_the_reference(perturbed):
    """Guards the identity tests: a weight that both ignored would make them blind."""
    model = perturbed(build(["embed_dim=16", "unifier.num_basis=8"])).double()
    image, features = torch.randn(1, 3, 18, 14).double(), torch.randn(1, 3, 3, 4).double()
    names = dict(model.named_parameters())
    before = reference_of(model)(image, features)
    for name, parameter in names.items():
        with torch.no_grad():
            kept = parameter.clone()
            parameter.mul_(1.1).add_(0.01 * torch.randn_like(parameter))
            moved = (reference_of(model)(image, features) - before).abs().max()
            parameter.copy_(kept)
        assert moved > 1e-7, name


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (3, 4), (2, 1, 3, 3)])
@pytest.mark.parametrize("start", [torch.zeros, torch.ones, torch.randn])
def test_perturbing_moves_every_weight(perturbed, shape, start):
    """One value alone has no spread, nor have equal ones: they are moved all the same, and stay finite."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(start(shape))
    before = layer.weight.detach().clone()
    moved = perturbed(layer).weight
    assert moved.isfinite().all()
    assert (moved != before).all()


def test_only_the_baseline_has_a_reference():
    with pytest.raises(ValueError, match=r"the reference is the baseline only .* got unifier=none, attention=window"):
        reference_of(build(["unifier=none", "embed_dim=8", "attention.num_heads=1"]))
