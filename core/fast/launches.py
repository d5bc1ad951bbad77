"""Where time goes into starting kernels rather than into their work: on a GPU, unless the work is large."""

import torch
from torch import Tensor

SMALL = {False: 2**23, True: 2**25}
"""Numbers in an image-sized tensor up to which plain operations are fastest: without and with gradients, for which
plain operations keep some 40 such tensors. Of larger ones that is too much memory, and PyTorch's GroupNorm uses only 8
processors per image.
"""


def dominate(tensor: Tensor) -> bool:
    """Whether work on this device should be done in few large operations. On CPU small ones, in cache, are faster."""
    return tensor.device.type not in ("cpu", "meta")


def of_small_work_dominate(tensor: Tensor, width: int) -> bool:
    """Whether an encoder with that many channels should run plain operations for these (B,·,H,W) pixels."""
    return dominate(tensor) and len(tensor) * tensor.shape[2:].numel() * width <= SMALL[torch.is_grad_enabled()]
