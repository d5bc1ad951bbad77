"""What each arm costs: parameters, time and memory of one forward, beside those of the baseline; as tables too."""

import logging
from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd
import torch
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.table import Table
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
from experiments.settings import SettingError

log = logging.getLogger(__name__)

NUM_WARMUP = 2
COLUMNS = ["arm", "parameters", "ms", "times the baseline's", "MB", "memory, times the baseline's"]


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


def cost_markdown(costs: pd.DataFrame) -> str:
    """A section: what was measured, and one line per arm."""
    rule = ["---", *["---:"] * (len(COLUMNS) - 1)]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in (COLUMNS, rule, *_cells(costs)))
    return "\n\n".join(filter(None, ["## Cost of one forward", _conditions(costs), lines]))


def cost_table(costs: pd.DataFrame) -> Table:
    """The same for the terminal."""
    shown = Table(
        title="cost of one forward", title_justify="left", caption=_conditions(costs) or None, box=SIMPLE_HEAD,
        pad_edge=False,
    )  # fmt: skip
    for i, column in enumerate(COLUMNS):
        shown.add_column(column, justify="right" if i else "left", overflow="fold")
    for line in _cells(costs):
        shown.add_row(*line)
    return shown


def _conditions(costs: pd.DataFrame) -> str:
    """What was measured, and on what; nothing of older costs that do not say it."""
    if "num_runs" not in costs:
        return ""
    row = costs.iloc[0]
    grid = row.image // row.patch
    threads = f", {row.threads} thread{'s' if row.threads > 1 else ''}" if row.device == "cpu" else ""
    return (
        f"{grid}x{grid} features of {row.channels} channels to {row.image}x{row.image}, one image, float32; median of "
        f"{row.num_runs} forwards measured in turn, on {row.device}{threads}; memory on top of model and inputs."
    )


def _cells(costs: pd.DataFrame) -> list[list[str]]:
    lines = []
    for row in costs.itertuples():
        ratio = f"{row.time_ratio:.2f} [{row.time_ratio_low:.2f}, {row.time_ratio_high:.2f}]"
        time = _number(row.time_ms, 1) or str(getattr(row, "remark", "out of memory"))
        memory = [_number(row.memory_mb, 0), _number(row.memory_ratio, 2)]
        lines.append([row.arm, f"{row.parameters:,}", time, ratio if row.time_ratio == row.time_ratio else "", *memory])
    return lines


def _number(value: float, digits: int) -> str:
    return "" if value != value else f"{value:.{digits}f}"


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
