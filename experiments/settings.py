"""Settings that several commands share: their meaning, and checks of their values."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import ListConfig

from experiments.errors import Told

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class SettingError(Told, ValueError):
    """A setting that cannot work, found before anything is computed."""


def output_grid(
    setting: int | Sequence[int] | None, image_size: tuple[int, int], name: str = "output_size"
) -> tuple[int, int]:
    """(Qh,Qw) of one image. None: its own size; a number: its proportions with that longer side; a pair: as given.

    Raises:
        SettingError: not positive whole numbers. The message calls the setting `name`.
    """
    if setting is None:
        return image_size
    values = [setting] if isinstance(setting, int) else list(setting) if isinstance(setting, Sequence) else []
    if len(values) not in (1, 2) or not all(isinstance(value, int) and value > 0 for value in values):
        raise SettingError(f"{name} must be null, a positive number, or [rows, columns], got {setting}")
    if len(values) == 2:
        return values[0], values[1]
    scale = values[0] / max(image_size)
    return max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale))


def pick_device(setting: str) -> torch.device:
    """The device of a setting; `auto` is the GPU where there is one.

    Raises:
        SettingError: PyTorch knows no such device, or the machine has none.
    """
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=setting).device
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"device={setting} cannot be used: {str(error).splitlines()[0]}") from error


def check_writable(folder: Path, setting: str = "out_dir") -> None:
    """Makes the folder if it is missing, and checks that files can be written to it; `setting` names it in errors.

    Raises:
        SettingError: it cannot be made, is a file, or is read-only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SettingError(f"{setting}={folder} cannot be written to: {error.strerror}") from error


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises SettingError when `value` is none of `choices`."""
    if value not in choices:
        raise SettingError(f"{name} must be one of {', '.join(choices)}, got {value}")


def check_name(name: object) -> None:
    """Refuses a `name` that cannot begin the names of files in one folder.

    Raises:
        SettingError: it is not text, is empty, or contains a folder.
    """
    if not isinstance(name, str):
        raise SettingError(f"name must be a file name, got {name}, which is not text: write 'name=\"{name}\"'")
    if name in ("", ".", "..") or Path(name).name != name:
        raise SettingError(f"name must be a file name without folders, got {name!r}")


def check_seeds(seeds: object) -> None:
    """Refuses `seeds` that are not a list of different whole numbers from 0.

    Raises:
        SettingError: names the values.
    """
    if not isinstance(seeds, list | ListConfig) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise SettingError(f"seeds must be a list of whole numbers from 0, got {seeds}")
    check_once("seeds", seeds)


def check_once(name: str, values: Sequence[object]) -> None:
    """Raises SettingError when a value occurs twice."""
    if len(set(values)) < len(values):
        raise SettingError(f"{name}={list(values)} names one twice: it would be counted twice")


def check_confidence(confidence: object) -> None:
    """Raises SettingError when the `confidence` of intervals is not a number between 0.5 and 1."""
    if not isinstance(confidence, int | float) or not 0.5 < confidence < 1:
        raise SettingError(f"confidence must lie between 0.5 and 1, got {confidence}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises SettingError when `value` is not a whole number from `least` up."""
    if type(value) is not int or value < least:
        raise SettingError(f"{name} must be a whole number from {least} up, got {value}")


def one_number(values: Any) -> Any:
    """JSON values with whole numbers as integers: 1 and 1.0 are one setting, however it was written."""
    if isinstance(values, Mapping):
        return {key: one_number(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [one_number(value) for value in values]
    return int(values) if isinstance(values, float) and values.is_integer() else values
