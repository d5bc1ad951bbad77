"""What the benchmark measures: its settings and the sizes they name."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import DictConfig, OmegaConf

from core.registry import signature_fields
from experiments.peers import peers
from experiments.settings import DTYPES, SettingError, check_choice, check_name, check_writable, pick_device

READOUT_ARMS = ("head", "readout")
"""They give classes, the others features."""
ARM_NAMES = ("dense", "ours", "compiled", *READOUT_ARMS)
ALL_PEERS = "peers"
"""An arm's name that stands for all peers but those that optimise for each image, or run the encoder."""
FALLBACK_QUERIES = 8192
_CASE = re.compile(r"(\d+)/(\d+)/(\d+)(?:/(\d+))?")


@dataclass(frozen=True)
class Case:
    """One size and dtype."""

    training: bool
    """A training step, or a forward."""
    image: int
    """Side of the image in pixels."""
    patch: int
    """Side in pixels of what one feature vector stands for."""
    channels: int
    output: int
    """Side of the output."""
    batch: int
    dtype: str

    @property
    def grid(self) -> int:
        """Side of the feature grid."""
        return self.image // self.patch

    @property
    def label(self) -> str:
        """Says the size, as in the tables."""
        size = f"{self.image}²/{self.patch}, C={self.channels}"
        size = f"{self.batch} x {size}" if self.batch > 1 else size
        size = f"{size} -> {self.output}²" if self.output != self.image else size
        return f"training {size}" if self.training else size

    @property
    def key(self) -> str:
        """Says all of it, as the name of a metric."""
        kind = "training" if self.training else "forward"
        return f"{kind}_{self.batch}x{self.image}_{self.patch}_{self.channels}_{self.output}_{self.dtype}"


def resolved(config: DictConfig) -> DictConfig:
    """The settings with the preset in place of those that are null, all checked.

    Raises:
        SettingError: names the setting and what it may be.
    """
    values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    device = pick_device(values["device"])
    if device.type not in ("cpu", "cuda"):
        raise SettingError(f"device must be cpu or cuda, where memory can be measured; got {device}")
    presets = values.pop("presets")
    if values["preset"] == "auto":
        values["preset"] = "gpu" if device.type == "cuda" else "cpu"
    check_choice("preset", values["preset"], ("auto", *presets))
    for key, value in presets[values["preset"]].items():
        if values[key] is None:
            values[key] = value
    for key in ("arms", "forward", "training", "dtype"):
        values[key] = [values[key]] if isinstance(values[key], str) else values[key]
    if values["compile"] and "compiled" not in values["arms"]:
        values["arms"] = [*values["arms"], "compiled"]
    values["compile"] = False  # `ours` stays as it is, beside `compiled`
    values["arms"] = [one for arm in values["arms"] for one in (_all_peers() if arm == ALL_PEERS else [arm])]
    values["name"] = values["name"] or f"benchmark_{'peers_' if values['preset'] == 'peers' else ''}{device.type}"
    _check(values)
    return OmegaConf.create(values)


def _all_peers() -> list[str]:
    return [name for name, cls in peers().items() if not cls.optimises and "encoder" not in signature_fields(cls)]


def _check(values: dict[str, Any]) -> None:
    for key, choices in (("arms", (*ARM_NAMES, ALL_PEERS, *peers())), ("dtype", tuple(DTYPES))):
        for value in values[key]:
            check_choice(key, value, choices)
        if not values[key] or len(set(values[key])) < len(values[key]):
            raise SettingError(f"{key} must name one or several different ones of {', '.join(choices)}")
    readout = [name for name in values["arms"] if name in READOUT_ARMS]
    if readout and len(readout) < len(values["arms"]):
        raise SettingError(
            f"arms {' and '.join(READOUT_ARMS)} give classes and the others features: measure them apart"
        )
    if readout and values["training"]:
        raise SettingError(f"arms={values['arms']} are measured in a forward only: add training=[]")
    for key in ("num_runs", "num_threads", "batch_size", "training_batch_size", "num_classes"):
        _check_number(key, values[key], 1)
    _check_number("num_warmup", values["num_warmup"], 0)
    for key in ("max_seconds", "memory_limit_gb", "tolerance"):
        if values[key] is not None and not (isinstance(values[key], (int, float)) and values[key] > 0):
            raise SettingError(f"{key} must be a positive number or null, got {values[key]}")
    if values["queries_at_once"] not in ("auto", "all"):
        _check_number("queries_at_once", values["queries_at_once"], 1, "all, auto or ")
    if values["training"] and "float16" in values["dtype"]:
        raise SettingError("a training step in float16 needs a gradient scaler, which is not here: add training=[]")
    check_name(values["name"])
    check_writable(Path(values["out_dir"]))


def _check_number(key: str, value: Any, least: int, others: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SettingError(f"{key} must be {others}a whole number from {least} up, got {value}")


def cases_of(config: DictConfig) -> list[Case]:
    """All sizes in all dtypes, forwards first.

    Raises:
        SettingError: a size that is none, or no size at all.
    """
    cases = [
        _case(key, text, config[batch], dtype)
        for key, batch in (("forward", "batch_size"), ("training", "training_batch_size"))
        for text in config[key]
        for dtype in config.dtype
    ]
    if not cases:
        raise SettingError("nothing to measure: give forward=[IMAGE/PATCH/CHANNELS] or training=[...]")
    return cases


def _case(key: str, text: str, batch: int, dtype: str) -> Case:
    found = _CASE.fullmatch(str(text))
    if not found:
        raise SettingError(f"{key} must list sizes as IMAGE/PATCH/CHANNELS or IMAGE/PATCH/CHANNELS/OUTPUT, got {text}")
    image, patch, channels, output = (int(number or found[1]) for number in found.groups())
    if min(channels, output, patch) < 1 or image % patch or image < 2 * patch:
        raise SettingError(f"{key}={text}: the image must be a whole number of patches, two at least, and nothing 0")
    return Case(key == "training", image, patch, channels, output, batch, dtype)


def dense_bytes(case: Case, num_heads: int, queries: int) -> tuple[int, int]:
    """What the dense algorithm holds at least: (its mask while it is made, in RAM; mask, logits and output).

    One byte per query and key for the mask, and twice that while it is inverted; scores and weights of `queries`
    queries at a time; the parts of the output and the output.
    """
    pixels, keys = case.output**2, case.grid**2
    size = DTYPES[case.dtype].itemsize
    logits = 2 * case.batch * num_heads * min(queries, pixels) * keys * size
    output = case.batch * pixels * case.channels * size
    return 2 * pixels * keys, pixels * keys + max(logits + output, 2 * output)


def queries_at_once(case: Case, config: DictConfig, device: torch.device) -> int | None:
    """How many queries the dense arm attends with at a time; None: all."""
    if config.queries_at_once == "all" or case.training:
        return None
    if config.queries_at_once != "auto":
        return config.queries_at_once
    cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total
    fits = dense_bytes(case, config.attention.num_heads, case.output**2)[1] < total / 2
    return None if fits else FALLBACK_QUERIES
