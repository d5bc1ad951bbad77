"""Reading weight files safely: safetensors, or pickles of which only tensors are taken."""

import hashlib
import pickle
import struct
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PICKLED = (".pth", ".pt", ".bin")
DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
"""What torch's reader raises for cut or altered files, found by cutting and altering them."""


class WeightsError(ValueError):
    """A weight file that cannot be used: damaged, unsafe, or of another model."""


def content_digest(path: Path) -> str:
    """Hexadecimal digest of what a file holds; read again only when it was changed."""
    stat = path.stat()
    return _content(path, stat.st_mtime_ns, stat.st_size)


@cache
def _content(path: Path, _changed: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(
    path: str | Path, nests: Sequence[str] = ("state_dict", "model"), trusted: Sequence[type] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a weight file by name, on the CPU, and (safetensors) its metadata.

    Args:
        nests: keys under which a pickle may hold the state dict, instead of being one.
        trusted: classes that a pickle may hold beside tensors. Nothing else in it is ever executed.

    Raises:
        FileNotFoundError: no such file. WeightsError: damaged, unsafe, no state dict, or of unknown kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights {path}: there is no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise WeightsError(f"weights {path}: truncated or damaged ({error})") from error
    if path.suffix not in PICKLED:
        raise WeightsError(f"weights {path}: cannot read {path.suffix!r}, only .safetensors, {', '.join(PICKLED)}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(trusted)):
            warnings.simplefilter("ignore")  # torch's remarks on odd files: what is wrong is said below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights {path}: refused, it holds more than tensors (loading it would run code) or is damaged; nothing "
            "was executed"
        ) from error
    except DAMAGED as error:
        raise WeightsError(f"weights {path}: truncated or damaged ({type(error).__name__})") from error
    return _state_dict(state, nests, path), {}


def _state_dict(state: object, nests: Sequence[str], path: Path) -> dict[str, Tensor]:
    for nest in nests:
        if isinstance(state, dict) and isinstance(state.get(nest), dict):
            state = state[nest]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(
            f"weights {path}: no state dict (parameter names and tensors), bare or under {', '.join(nests)}"
        )
    return state
