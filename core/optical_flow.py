"""Estimates optical flow between two frames by well-kept libraries; `estimator` lists them.

Every estimator maps two batches of frames, (B,3,H,W) RGB in [0,1] each, to the flow from the first to the second: the
displacement (x, y) of each pixel in pixels, (B,2,H,W) in single precision on the frames' device.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.weight_files import WeightsError, read_weights

Estimator = Callable[[Tensor, Tensor], Tensor]
RAFT_SIDE = 128
"""RAFT refuses frames with a shorter side than this, or with sides that are no multiples of 8."""
DIS_SIDE = 16
"""DIS refuses frames that are smaller."""
_GREY = (0.2125, 0.7154, 0.0721)  # ITU-R 709, as skimage.color.rgb2gray


def tvl1(frame: Tensor, other: Tensor) -> Tensor:
    """TV-L1 (Zach, Pock & Bischof 2007) of scikit-image: on the CPU, about 0.3 s for 224x224 pixels."""
    from skimage.registration import optical_flow_tvl1

    found = [np.stack(optical_flow_tvl1(*pair)[::-1]) for pair in zip(_grey(frame), _grey(other), strict=True)]
    return torch.from_numpy(np.stack(found)).to(frame.device, torch.float32)


def dis(frame: Tensor, other: Tensor) -> Tensor:
    """DIS (Kroeger et al., arXiv 1603.03590) of OpenCV, preset MEDIUM: on the CPU. Small frames are enlarged for it.

    Raises:
        ModuleNotFoundError: OpenCV is not installed; the message says how to install it.
    """
    cv2 = _opencv()
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    rows, columns = frame.shape[-2:]
    size = max(DIS_SIDE, rows), max(DIS_SIDE, columns)
    enlarged = [x if size == (rows, columns) else F.interpolate(x, size, mode="bilinear") for x in (frame, other)]
    bytes_of = lambda grey: np.round(255 * grey.clip(0, 1)).astype(np.uint8)  # noqa: E731
    pairs = zip(*(map(bytes_of, _grey(x)) for x in enlarged), strict=True)
    found = np.stack([method.calc(*pair, None) for pair in pairs])  # (B,*size,2)
    flow = torch.from_numpy(found).permute(0, 3, 1, 2).to(frame.device, torch.float32)
    return flow if size == (rows, columns) else _shrunk(flow, (rows, columns))


def still(frame: Tensor, other: Tensor) -> Tensor:
    """Zero: nothing moves. For fixed cameras, and as the control that shows what flow adds."""
    return frame.new_zeros(len(frame), 2, *frame.shape[-2:], dtype=torch.float32)


def raft(frame: Tensor, other: Tensor, model: nn.Module) -> Tensor:
    """RAFT (Teed & Deng, arXiv 2003.12039), given as torchvision's model. Small frames are enlarged for it."""
    rows, columns = frame.shape[-2:]
    size = [max(RAFT_SIDE, -(-side // 8) * 8) for side in (rows, columns)]
    enlarged = [F.interpolate(2 * x.float() - 1, size, mode="bilinear") for x in (frame, other)]
    model.to(frame.device)
    with torch.no_grad(), torch.autocast(frame.device.type, enabled=False):
        flow = model(*enlarged)[-1]  # (B,2,*size); the last of the refinements
    return _shrunk(flow, (rows, columns))


def _shrunk(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,2,H,W) in pixels -> (B,2,*size) in pixels of that grid."""
    factor = flow.new_tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]]).view(2, 1, 1)
    return F.interpolate(flow, size, mode="bilinear") * factor


PLAIN: dict[str, Estimator] = {"tvl1": tvl1, "dis": dis, "still": still}
RAFT = ("raft_small", "raft_large")
NAMES = (*PLAIN, *RAFT)


def estimator(name: str, weights: str | Path | None = None) -> Estimator:
    """The estimator `name`: tvl1, dis, still, raft_small or raft_large.

    Args:
        weights: for RAFT, a file with torchvision's weights (.pth or .safetensors).

    Raises:
        ValueError: another name, RAFT without weights, or weights for another estimator.
        WeightsError, FileNotFoundError: the file has other weights, is damaged, or does not exist.
        ModuleNotFoundError: `dis` without OpenCV.
    """
    if name not in NAMES:
        raise ValueError(f"flow={name} is unknown; there are: {', '.join(NAMES)}")
    if name in RAFT:
        if weights is None:
            raise ValueError(f"flow={name} needs a file of torchvision's weights, or use flow=tvl1, which needs none")
        return partial(raft, model=_raft_model(name, weights))
    if weights is not None:
        raise ValueError(f"flow={name} has no weights, but got {weights}: leave them out, or use {' or '.join(RAFT)}")
    if name == "dis":
        _opencv()
    return PLAIN[name]


def _raft_model(name: str, weights: str | Path) -> nn.Module:
    from torchvision.models import optical_flow

    model = getattr(optical_flow, name)(weights=None)
    state, _ = read_weights(weights)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"weights {weights} are not those of torchvision's {name}: {error}") from error
    return model.eval().requires_grad_(False)


def _opencv():
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "flow=dis needs OpenCV: run `pip install opencv-python-headless`, or use flow=tvl1, which does not"
        ) from error
    return cv2


def _grey(frames: Tensor) -> np.ndarray:
    """(B,3,H,W) RGB -> (B,H,W) single precision."""
    weights = torch.tensor(_GREY, dtype=torch.float64).view(3, 1, 1)
    return (frames.detach().cpu().double() * weights).sum(1).float().numpy()
