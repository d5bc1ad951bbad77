"""Warping and the occlusion check against loops from the definition, and the estimators on motion that is known."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.optical_flow import raft_small

from core.optical_flow import estimator
from core.warping import inside, resize_flow, round_trip, warp
from core.weight_files import WeightsError


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flows(batch: int = 2, rows: int = 5, columns: int = 7) -> tuple[Tensor, Tensor]:
    """Two flows of up to some pixels: some leave the image, some agree, some are unknown."""
    there = 1.5 * noise(batch, 2, rows, columns, seed=1)
    back = -there.roll(1, -1) + 0.3 * noise(batch, 2, rows, columns, seed=2)
    there[0, :, 2, 3] = torch.nan
    back[-1, 0, 1, 1] = torch.nan
    return there, back


def fetched(values: Tensor, x: float, y: float) -> Tensor:
    """(C,H,W) at the point (x, y) in pixels, by the definition of bilinear interpolation; constant beyond centres."""
    rows, columns = values.shape[-2:]
    u, v = min(max(x - 0.5, 0), columns - 1), min(max(y - 0.5, 0), rows - 1)
    left, top = min(math.floor(u), max(columns - 2, 0)), min(math.floor(v), max(rows - 2, 0))
    total = torch.zeros(len(values), dtype=values.dtype)
    for i in (top, top + 1):
        for j in (left, left + 1):
            weight = (1 - abs(u - j)) * (1 - abs(v - i))
            if i < rows and j < columns:
                total += weight * values[:, i, j]
    return total


def test_warping_is_bilinear_look_up_at_each_target():
    (there, _), values = flows(), noise(2, 3, 5, 7)
    warped = warp(values, there)
    for n in range(2):
        for i in range(5):
            for j in range(7):
                x, y = (0.0 if math.isnan(d) else d for d in there[n, :, i, j].tolist())
                expected = fetched(values[n], j + 0.5 + x, i + 0.5 + y)
                torch.testing.assert_close(warped[n, :, i, j], expected, rtol=1e-10, atol=1e-10)


def test_whole_pixels_are_copied():
    values = noise(1, 2, 6, 8)
    there = torch.tensor([-2.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 6, 8)
    torch.testing.assert_close(warp(values.float(), there)[:, :, :-1, 2:], values.float()[:, :, 1:, :-2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    (there, _), values = flows(), noise(2, 3, 5, 7).to(dtype)
    expected = warp(values.float(), there.float()).to(dtype)
    assert torch.equal(warp(values, there.float()), expected)


def test_the_occlusion_check_is_that_of_sundaram_et_al():
    there, back = flows()
    ratio, seen = round_trip(there, back), inside(there)
    assert ratio.shape == seen.shape == (2, 1, 5, 7)
    checked = set()
    for n in range(2):
        for i in range(5):
            for j in range(7):
                x, y = there[n, :, i, j].tolist()
                if math.isnan(x):
                    assert ratio[n, 0, i, j].isnan()
                    assert not seen[n, 0, i, j]
                    continue
                bx, by = fetched(back[n], j + 0.5 + x, i + 0.5 + y).tolist()
                assert seen[n, 0, i, j] == (0 <= j + 0.5 + x <= 7 and 0 <= i + 0.5 + y <= 5)
                if math.isnan(bx) or math.isnan(by):
                    assert ratio[n, 0, i, j].isnan()
                    continue
                miss = (x + bx) ** 2 + (y + by) ** 2
                allowed = 0.01 * (x * x + y * y + bx * bx + by * by) + 0.5
                assert ratio[n, 0, i, j].item() == pytest.approx(miss / allowed, rel=1e-9)
                checked.add(miss <= allowed)
    assert checked == {True, False}


def test_resized_flow_is_in_the_pixels_of_its_grid():
    there = torch.tensor([4.0, -6.0]).view(1, 2, 1, 1).repeat(1, 1, 6, 8)
    there[:, :, :, :2] = torch.nan
    for size in ((3, 4), (12, 16), (6, 4)):
        flow = resize_flow(there, size)
        expected = torch.tensor([4.0 * size[1] / 8, -6.0 * size[0] / 6])
        hidden = size[1] // 4
        assert flow[..., :hidden].isnan().all()
        known = flow[0, :, :, hidden:]
        torch.testing.assert_close(known, expected.view(2, 1, 1).expand_as(known))
    assert resize_flow(there, (6, 8)) is there


# --- estimators ------------------------------------------------------------------------------------------------------


def moved(rows: int = 48, columns: int = 56) -> tuple[Tensor, Tensor]:
    """A texture, and the same 2 pixels to the left and 1 down; RGB."""
    texture = torch.rand(1, 3, rows // 4, columns // 4, generator=torch.Generator().manual_seed(3))
    frame = F.interpolate(texture, (rows, columns), mode="bicubic").clamp(0, 1)
    return frame, frame.roll((1, -2), (-2, -1))


def test_tvl1_finds_a_shift():
    frame, following = moved()
    flow = estimator("tvl1")(torch.cat([frame, frame]), torch.cat([following, frame]))
    assert flow.shape == (2, 2, 48, 56)
    assert flow.dtype == torch.float32
    assert flow[0, 0, 8:-8, 8:-8].median() == pytest.approx(-2, abs=0.2)
    assert flow[0, 1, 8:-8, 8:-8].median() == pytest.approx(1, abs=0.2)
    assert flow[1].abs().max() < 0.05


def test_still_is_zero():
    flow = estimator("still")(*moved())
    assert flow.shape == (1, 2, 48, 56)
    assert not flow.any()


def test_opencv_gets_bytes_and_returns_x_and_y(monkeypatch):
    """With a stand-in for OpenCV: it need not be installed here."""
    seen = []

    class Method:
        def calc(self, frame, other, start):
            seen.extend([frame, other])
            assert start is None
            return np.stack([np.full(frame.shape, 3.0, np.float32), np.full(frame.shape, -1.0, np.float32)], -1)

    module = SimpleNamespace(DISOpticalFlow_create=lambda preset: Method(), DISOPTICAL_FLOW_PRESET_MEDIUM=2)
    monkeypatch.setitem(sys.modules, "cv2", module)
    flow = estimator("dis")(torch.zeros(2, 3, 20, 24), torch.ones(2, 3, 20, 24))
    assert flow.shape == (2, 2, 20, 24)
    assert (flow[:, 0] == 3).all()
    assert (flow[:, 1] == -1).all()
    small = estimator("dis")(torch.zeros(1, 3, 4, 8), torch.ones(1, 3, 4, 8))  # is enlarged to 16 x 16
    assert torch.equal(small, torch.tensor([3.0 / 2, -1.0 / 4]).view(1, 2, 1, 1).expand(1, 2, 4, 8))
    del seen[4:]
    assert [image.dtype for image in seen] == [np.uint8] * 4
    assert [int(image.max()) for image in seen] == [0, 255, 0, 255]


def test_real_opencv_finds_a_shift():
    flow = estimator("dis")(*moved(96, 112))
    assert flow[0, 0, 16:-16, 16:-16].median() == pytest.approx(-2, abs=0.3)
    assert flow[0, 1, 16:-16, 16:-16].median() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("size", [(2, 2), (3, 40), (13, 5)])
def test_real_opencv_takes_small_frames(size):
    flow = estimator("dis")(torch.rand(1, 3, *size), torch.rand(1, 3, *size))
    assert flow.shape == (1, 2, *size)
    assert flow.isfinite().all()


def test_without_opencv_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install opencv-python-headless`, or use flow=tvl1"):
        estimator("dis")


def test_raft_is_torchvisions_with_the_files_weights(tmp_path):
    torch.manual_seed(4)
    model = raft_small(weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "raft.pth")
    frame, following = moved(136, 128)
    flow = estimator("raft_small", tmp_path / "raft.pth")(frame, following)
    with torch.no_grad():
        torch.testing.assert_close(flow, model(2 * frame - 1, 2 * following - 1)[-1])
    small = estimator("raft_small", str(tmp_path / "raft.pth"))(*moved(24, 20))
    assert small.shape == (1, 2, 24, 20)
    with pytest.raises(WeightsError, match=r"raft.pth are not those of torchvision's raft_large"):
        estimator("raft_large", tmp_path / "raft.pth")


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("farneback", None, ValueError, "flow=farneback is unknown; .* tvl1, dis, still, raft_small, raft_large"),
        ("raft_large", None, ValueError, "flow=raft_large needs a file of torchvision's weights, or use flow=tvl1"),
        ("tvl1", "raft.pth", ValueError, "flow=tvl1 has no weights, but got raft.pth: .* use raft_small or raft_large"),
        ("raft_small", "nowhere.pth", FileNotFoundError, "nowhere.pth: there is no such file"),
    ],
)  # fmt: skip
def test_refusals(name, weights, error, message):
    with pytest.raises(error, match=message):
        estimator(name, weights)
