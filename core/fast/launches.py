"""Where time goes into starting kernels rather than into their work: on a GPU, unless the work is large."""

from torch import Tensor


def dominate(tensor: Tensor) -> bool:
    """Whether work on this device should be done in few large operations. On CPU small ones, in cache, are faster."""
    return tensor.device.type not in ("cpu", "meta")
