"""What the tests share: determinism, the shared folder, and models whose every weight matters."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core import registry

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("ANYUP_SHARED", ROOT.parent / "shared"))

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None, print_blob=False, max_examples=20
)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser):
    parser.addoption("--screenshot", help="write a picture of the demo page to this file (tests/test_demo_browser.py)")


def pytest_configure():
    torch.set_num_threads(1)  # tensors here are small: more threads wait for each other, most of all on a busy machine
    registry.discover()  # installed extensions are part of what is tested


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """name -> path below the shared folder; skips where it is absent."""

    def locate(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs {name} of the shared folder (beside the repository, or ANYUP_SHARED)")
        return path

    return locate


@pytest.fixture(scope="session")
def perturbed() -> Callable[[nn.Module], nn.Module]:
    """Moves every weight of a model off its initial value, so that no gain is 1 and no bias 0; returns the model."""

    def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                alike = parameter.dim() < 2 or bool((parameter == parameter.flatten()[0]).all())  # no spread to go by
                scale = 0.3 if alike else 0.3 * parameter.std()
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((scale * noise).to(parameter.dtype))
        return model

    return perturb


@pytest.fixture
def own_registry(monkeypatch) -> Iterator[None]:
    """Forgets what a test registers: all choices and Hydra's store are as before once the test is over."""
    from hydra.core.config_store import ConfigStore

    registry.discover()  # a module registers once: what a test is the first to import must stay
    for group in registry._groups:
        monkeypatch.setattr(group, "known", dict(group.known))
    store = ConfigStore.instance()
    groups = {group.group: dict(store.repo.get(group.group, {})) for group in registry._groups}
    yield
    for group, nodes in groups.items():
        store.repo[group] = nodes


class LargestTensor(TorchDispatchMode):
    """Values in the largest storage that any operation returned."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.fixture
def largest_tensor() -> type[LargestTensor]:
    """An instance is entered around what is watched."""
    return LargestTensor
