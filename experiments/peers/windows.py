"""Which low-resolution cells lie around each output position."""

import torch
from torch import Tensor


def nearby(length: int, outputs: int, window: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis, the `window` cells around the cell that each output position lies in.

    Returns:
        (outputs,window) int64 indices of the cells, where a cell outside is replaced by the outermost one;
        (outputs,window) bool, whether the cell is inside; (outputs,window) float64 distance from the position to the
        cell's centre (also for cells outside), in cells.

    Raises:
        ValueError: the window is not odd and so has no middle.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"a window must be a positive odd number of cells, got {window}")
    middle = (torch.arange(outputs, device=device) * 2 + 1) * length // (2 * outputs)  # (outputs,): exact
    cells = middle[:, None] + torch.arange(window, device=device) - window // 2  # (outputs,window)
    position = (torch.arange(outputs, device=device, dtype=torch.float64) + 0.5) * length / outputs
    distance = cells + 0.5 - position[:, None]
    return cells.clamp(0, length - 1), (cells >= 0) & (cells < length), distance
