"""Reads weight files safely: safetensors, or pickles from which only tensors are taken."""

import hashlib
import pickle
import struct
import time
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PICKLED = (".pth", ".pt", ".ckpt", ".bin")
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
"""What torch's reader raises for truncated or altered files, found by experiment."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and `torch.compile` add to each name."""
_ANEW = "copy or download it again, or save it again"
_TICK_NS = 2 * 10**9
"""No file system's clock is coarser."""


class WeightsError(ValueError):
    """A weight file that cannot be used: damaged, unsafe, or of another model."""


def content_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; the file is read again only if its time or size changed."""
    stat = path.stat()
    recent = abs(time.time_ns() - stat.st_mtime_ns) < _TICK_NS  # changed once more, it may have the same time
    read = _content.__wrapped__ if recent else _content
    return read(path, stat.st_mtime_ns, stat.st_size)


@cache
def _content(path: Path, _changed: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(
    path: str | Path, nests: Sequence[str] = ("state_dict", "model"), trusted: Sequence[type] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a weight file -> tensors by name, on the CPU, and the metadata of a safetensors file (else empty).

    Prefixes of DataParallel and `torch.compile` are removed if all names have them.

    Args:
        nests: keys under which a pickle may contain the state dict, if it is not one itself.
        trusted: classes that a pickle may contain beside tensors. Nothing else in it is ever executed.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: the file is damaged or unsafe, has no state dict, or is of an unknown kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights {path}: there is no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return _unwrapped(state), file.metadata() or {}
        except SafetensorError as error:
            raise WeightsError(f"weights {path}: truncated or damaged ({error}): {_ANEW}") from error
    if path.suffix not in PICKLED:
        raise WeightsError(f"weights {path}: cannot read {path.suffix!r}, only .safetensors, {', '.join(PICKLED)}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(trusted)):
            warnings.simplefilter("ignore")  # torch warns about odd files; the errors below say what is wrong
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights {path}: refused, it holds more than tensors (loading it would run code) or is damaged; nothing "
            "was executed. Save only the tensors where the file was made: torch.save(model.state_dict(), FILE)"
        ) from error
    except DAMAGED as error:
        raise WeightsError(f"weights {path}: truncated or damaged ({type(error).__name__}): {_ANEW}") from error
    return _unwrapped(_state_dict(state, nests, path)), {}


def outer_names(state: Iterable[str], wanted: Iterable[str]) -> str:
    """Advice for an error message, if a state dict has all `wanted` names under a prefix such as `teacher.`.

    Returns:
        The end of the message; empty if there is no such prefix.
    """
    names, wanted = set(state), list(wanted)
    if not wanted:
        return ""
    ends = [name.removesuffix(wanted[0]) for name in names if name.endswith(f".{wanted[0]}")]
    found = sorted(end for end in ends if all(end + name in names for name in wanted))
    if not found:
        return ""
    return (
        f". The file has these weights under {', '.join(found)}: save them alone, without the prefix: "
        f"torch.save({{name.removeprefix({found[0]!r}): tensor for name, tensor in STATE.items() if "
        f'name.startswith({found[0]!r})}}, "FILE.pth")'
    )


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in WRAPPERS * 2:  # either may be inside the other
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _state_dict(state: object, nests: Sequence[str], path: Path) -> dict[str, Tensor]:
    for nest in nests:
        if isinstance(state, dict) and isinstance(state.get(nest), dict):
            state = state[nest]
    if _is_state_dict(state):
        return state
    reason = f"weights {path}: no state dict (parameter names and tensors), bare or under {', '.join(nests)}"
    inner = [key for key, value in state.items() if _is_state_dict(value)] if isinstance(state, dict) else []
    if inner:
        reason += (
            f"; it has one under each of {', '.join(map(str, inner))}: save the one that you want alone, "
            f'torch.save(torch.load({path.name!r}, weights_only=True)[{inner[0]!r}], "FILE.pth")'
        )
    raise WeightsError(reason)


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())
