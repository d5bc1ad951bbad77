"""What each arm costs: parameters, time and memory of one forward, beside those of the baseline."""

from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import nn

from experiments.measure import (
    OutOfMemory,
    Times,
    interleave,
    out_of_memory_named,
    paired_ratio,
    peak_memory,
    peak_on_gpu,
)
from experiments.settings import SettingError

NUM_WARMUP = 2


def check_cost(cost: DictConfig | None) -> None:
    """Refuses sizes that cannot be.

    Raises:
        SettingError: names the setting.
    """
    if cost is None:
        return
    for key in ("image", "patch", "channels", "num_runs"):
        if type(cost[key]) is not int or cost[key] < 1:
            raise SettingError(f"cost.{key} must be a whole number from 1, got {cost[key]}")
    if cost.patch > cost.image:
        raise SettingError(f"cost.patch={cost.patch} is larger than cost.image={cost.image}")


@torch.inference_mode()
def measure_costs(
    models: Mapping[str, nn.Module], baseline: str, cost: DictConfig | None, device: torch.device
) -> pd.DataFrame | None:
    """Times one forward of each model in turn, and measures the memory it takes on top of model and inputs.

    Args:
        models: by arm, the baseline among them.
        cost: as in configs/ablate.yaml; None measures nothing.

    Returns:
        One row per arm: arm, parameters, time_ms (median), memory_mb, time_ratio and memory_ratio to the baseline (the
        median over rounds, with time_ratio_low and time_ratio_high); NaN where an arm ran out of memory.
    """
    if cost is None:
        return None
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, cost.image, cost.image, generator=generator).to(device)
    grid = cost.image // cost.patch
    features = torch.randn(1, cost.channels, grid, grid, generator=generator).to(device)
    calls = {name: partial(model.to(device).eval(), image, features) for name, model in models.items()}
    times = interleave(calls, NUM_WARMUP, cost.num_runs, device=device)
    memory = {name: _peak(call, device) for name, call in calls.items()}
    rows = []
    for name, model in models.items():
        row = {"arm": name, "parameters": sum(p.numel() for p in model.parameters()), "memory_mb": memory[name] / 1e6}
        mine, theirs = times[name], times[baseline]
        if isinstance(mine, Times):
            row["time_ms"] = float(pd.Series(mine.time).median())
        if isinstance(mine, Times) and isinstance(theirs, Times):
            ratio = paired_ratio(mine.time, theirs.time)
            row |= {"time_ratio": ratio.median, "time_ratio_low": ratio.low, "time_ratio_high": ratio.high}
        row["memory_ratio"] = memory[name] / memory[baseline] if memory[baseline] else float("nan")
        rows.append(row)
    columns = [
        "arm",
        "parameters",
        "time_ms",
        "memory_mb",
        "time_ratio",
        "time_ratio_low",
        "time_ratio_high",
        "memory_ratio",
    ]
    return pd.DataFrame(rows).reindex(columns=columns)


def _peak(call: Callable[[], object], device: torch.device) -> float:
    try:
        with out_of_memory_named():
            return float(peak_on_gpu(call, device)[0] if device.type == "cuda" else peak_memory(call))
    except OutOfMemory:
        return float("nan")
