"""What each arm costs: parameters, time and memory of one forward, beside those of the baseline."""

import logging
from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import nn

from experiments.cost.measure import (
    OutOfMemory,
    Times,
    interleave,
    out_of_memory_named,
    paired_ratio,
    peak_memory,
    peak_on_gpu,
)
from experiments.settings import SettingError, check_count

log = logging.getLogger(__name__)

NUM_WARMUP = 2


def check_cost(cost: DictConfig | None) -> None:
    """Refuses sizes that cannot be.

    Raises:
        SettingError: names the setting.
    """
    if cost is None:
        return
    for key in ("image", "patch", "channels", "num_runs"):
        check_count(f"cost.{key}", cost[key])
    if 2 * cost.patch > cost.image:
        raise SettingError(
            f"cost.patch={cost.patch} gives less than 2x2 features of cost.image={cost.image}: nothing can be upsampled"
        )


@torch.no_grad()
def measure_costs(
    models: Mapping[str, nn.Module], baseline: str, cost: DictConfig | None, device: torch.device
) -> pd.DataFrame | None:
    """Times one forward of each model in turn, and measures the memory it takes on top of model and inputs.

    Args:
        models: by arm, the baseline among them.
        cost: as in configs/ablate.yaml; None measures nothing.

    Returns:
        One row per arm: arm, parameters, time_ms (median), memory_mb, time_ratio and memory_ratio to the baseline (the
        median over rounds, with time_ratio_low and time_ratio_high); NaN where `remark` says why; and what was
        measured: image, patch, channels, device, threads, num_runs.
    """
    if cost is None:
        return None
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, cost.image, cost.image, generator=generator).to(device)
    grid = cost.image // cost.patch
    features = torch.randn(1, cost.channels, grid, grid, generator=generator).to(device)
    calls = {name: partial(model.to(device).eval(), image, features) for name, model in models.items()}
    memory, remarks = {}, {}
    for name, call in calls.items():
        memory[name], remarks[name] = _peak(name, call, device)
    able = {name: call for name, call in calls.items() if not remarks[name]}
    times = interleave(able, NUM_WARMUP, cost.num_runs, device=device) if able else {}
    name_of_device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    conditions = {key: cost[key] for key in ("image", "patch", "channels", "num_runs")}
    conditions |= {"device": name_of_device, "threads": torch.get_num_threads()}
    rows = []
    for name, model in models.items():
        row = {"arm": name, "parameters": sum(p.numel() for p in model.parameters()), "memory_mb": memory[name] / 1e6}
        row |= conditions | {"remark": remarks[name]}
        mine, theirs = times.get(name), times.get(baseline)
        if isinstance(mine, OutOfMemory):
            row["remark"] = "out of memory"
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
        *conditions,
        "remark",
    ]
    return pd.DataFrame(rows).reindex(columns=columns)


def _peak(name: str, call: Callable[[], object], device: torch.device) -> tuple[float, str]:
    """(peak in bytes, "") or (NaN, why there is none)."""
    try:
        with out_of_memory_named():
            call()  # what only a first call takes is not what a forward takes
            return float(peak_on_gpu(call, device)[0] if device.type == "cuda" else peak_memory(call)), ""
    except OutOfMemory:
        return float("nan"), "out of memory"
    except Exception as error:  # an arm is somebody's idea: whatever it raises must not cost the tables of the others
        log.error("the cost of arm %s cannot be measured: %s", name, error)
        return float("nan"), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:100]
