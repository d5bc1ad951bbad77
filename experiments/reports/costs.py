"""The cost of each arm (`experiments.cost.arm_cost`) as a table."""

import pandas as pd

from experiments.reports.markdown import Table, number, with_interval

COLUMNS = ["arm", "parameters", "ms", "times the baseline's", "MB", "memory, times the baseline's"]


def cost_section(costs: pd.DataFrame) -> str:
    """A Markdown section: the conditions, and one line per arm."""
    parts = ["## Cost of one forward", conditions(costs), cost_table(costs).markdown()]
    return "\n\n".join(filter(None, parts))


def cost_table(costs: pd.DataFrame) -> Table:
    """One line per arm."""
    rows = []
    for row in costs.itertuples():
        known = row.time_ratio == row.time_ratio  # not NaN
        ratio = with_interval(row.time_ratio, row.time_ratio_low, row.time_ratio_high, 2) if known else ""
        time = number(row.time_ms, 1) or str(getattr(row, "remark", "out of memory"))
        memory = [number(row.memory_mb, 0), number(row.memory_ratio, 2)]
        rows.append([row.arm, f"{row.parameters:,}", time, ratio, *memory])
    return Table(COLUMNS, rows, "cost of one forward", conditions(costs))


def conditions(costs: pd.DataFrame) -> str:
    """The conditions of the measurement; empty for older costs that do not have them."""
    if "num_runs" not in costs:
        return ""
    row = costs.iloc[0]
    grid = row.image // row.patch
    threads = f", {row.threads} thread{'s' if row.threads > 1 else ''}" if row.device == "cpu" else ""
    return (
        f"{grid}x{grid} features of {row.channels} channels to {row.image}x{row.image}, one image, float32; median of "
        f"{row.num_runs} forwards measured in turn, on {row.device}{threads}; memory on top of model and inputs."
    )
