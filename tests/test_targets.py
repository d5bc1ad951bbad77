"""Targets averaged over overlapping crops, their halves, and blurred controls."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import gaussian_blur

import core
from core.backbones import Backbone
from experiments.data.feature_cache import CachedBackbone, FeatureCache
from experiments.measuring.blur import WIDTHS, at_best_width, blurred
from experiments.measuring.ceilings import CEILINGS
from experiments.measuring.metrics import FidelityError, fidelity, fidelity_case
from experiments.measuring.targets import CropSettings, crop_corners, crop_counts
from experiments.settings import SettingError


def context(image):
    """(B,3,1,1), as good as noise."""
    return torch.sin(300 * image.double().mean((2, 3), keepdim=True)).float()


class Contextual(Backbone):
    """Each cell's mean colour, and something that depends on all that the encoder sees."""

    def __init__(self, stride=4, seen=None):
        super().__init__("contextual", (3,), (stride,), (0.0,) * 3, (1.0,) * 3)
        self.seen = [] if seen is None else seen

    def features(self, image, layer):
        self.seen.append(len(image))
        cells = F.interpolate(image, [side // self.patch_size for side in image.shape[-2:]], mode="area")
        return cells + context(image)


@pytest.mark.parametrize("settings", [CropSettings(1), CropSettings(2), CropSettings(3), CropSettings(2, 12)])
def test_the_target_is_the_mean_of_a_slow_loop(settings):
    image, view, scale = torch.rand(1, 3, 48, 48), 16, 3
    case = fidelity_case(image, Contextual(), scale, view, crops=settings)
    total, count = torch.zeros(1, 3, 12, 12), torch.zeros(12, 12)
    for row, column in itertools.chain(*crop_corners((4, 4), scale, settings)):
        crop = image[..., 4 * row : 4 * row + 16, 4 * column : 4 * column + 16]
        total[..., row : row + 4, column : column + 4] += F.avg_pool2d(crop, 4) + context(crop)
        count[row : row + 4, column : column + 4] += 1
    assert count.min() >= 1
    torch.testing.assert_close(case.target, total / count)
    torch.testing.assert_close(crop_counts((4, 4), scale, settings).sum(0), count)


@pytest.mark.parametrize("grid", [(4, 4), (13, 13), (7, 5)])
@pytest.mark.parametrize("scale", [2, 3, 8])
@pytest.mark.parametrize(
    "settings", [CropSettings(None), CropSettings(2), CropSettings(2, None), CropSettings(3, 40), CropSettings(50, 1)]
)
def test_every_cell_is_shown_whatever_the_grid(grid, scale, settings):
    corners = list(itertools.chain(*crop_corners(grid, scale, settings)))
    assert len(set(corners)) == len(corners)
    assert (crop_counts(grid, scale, settings).sum(0) >= 1).all()
    for corner in corners:
        assert all(0 <= at <= (scale - 1) * cells for at, cells in zip(corner, grid, strict=True))
    if settings.step and settings.step < min(grid) and settings.most is None:
        assert len(corners) > scale**2


def test_fewer_crops_are_drawn_when_asked_and_the_same_each_time():
    few = crop_corners((14, 14), 4, CropSettings(2, 100))
    assert sum(map(len, few)) == 100
    crop_corners.cache_clear()
    assert crop_corners((14, 14), 4, CropSettings(2, 100)) == few
    assert sum(map(len, crop_corners((14, 14), 2, CropSettings(2)))) == 64


def test_halves_share_no_crop_and_are_the_ceiling():
    even, odd = crop_corners((6, 6), 2, CropSettings(2))
    assert not set(even) & set(odd)
    found = {1: [], 3: []}
    for seed in range(6):
        image = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
        image = F.interpolate(image, (48, 48), mode="bicubic").clamp(0, 1)
        for step, measured in found.items():
            case = fidelity_case(image, Contextual(), 2, 24, crops=CropSettings(step))
            output, against = CEILINGS["split_half"](case, None)
            measured.append(fidelity(output, against)["detail"])
    assert 0.3 < sum(found[3]) < sum(found[1]) < 6, "means over more crops agree better"
    assert not against.counted[0, 0], "only one crop shows this corner"
    assert against.counted[3:9, 3:9].all()
    single = fidelity_case(image, Contextual(), 2, 24, crops=CropSettings(None))
    with pytest.raises(FidelityError, match="split_half needs crops that overlap"):
        CEILINGS["split_half"](single, None)


def test_the_cache_keeps_the_mean_and_tells_targets_apart(tmp_path):
    seen, image = [], torch.rand(1, 3, 48, 48)
    backbone, cache = Contextual(seen=seen), FeatureCache(tmp_path)
    encoder = CachedBackbone(backbone, cache, "image")
    first = fidelity_case(image, encoder, 2, 24)
    encoded = sum(seen)
    assert encoded == 1 + 16
    again = fidelity_case(image, encoder, 2, 24)
    assert sum(seen) == encoded, "nothing is encoded again"
    torch.testing.assert_close(again.target, first.target, rtol=0, atol=0)
    other = fidelity_case(image, encoder, 2, 24, crops=CropSettings(3))
    assert sum(seen) > encoded
    assert not torch.equal(other.target, first.target)


@pytest.mark.parametrize("wrong", [{"step": 0}, {"step": 1.5}, {"most": 0}, {"most": True}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(SettingError, match="must be null or a whole number from 1"):
        CropSettings(**wrong)


def test_a_stride_that_does_not_divide_the_view():
    case = fidelity_case(torch.rand(1, 3, 120, 120), core.load_backbone("squeezenet", "random"), 2, 60)
    grid = case.features.shape[-2:]
    assert case.target.shape[-2:] == (2 * grid[0], 2 * grid[1])
    assert case.target.isfinite().all()


def test_blur_is_a_gaussian_of_so_many_coarse_cells():
    spike = torch.zeros(1, 2, 41, 41)
    spike[..., 20, 20] = 1
    for width in WIDTHS[1:]:
        out = blurred(spike, (10, 10), width)[0, 0].double()
        places = torch.arange(41) - 20.0
        assert out.sum().item() == pytest.approx(1, abs=1e-5)
        spread = (out.sum(0) * places**2).sum().sqrt().item()
        assert spread == pytest.approx(4.1 * width, rel=0.03)
    assert blurred(spike, (10, 10), 0.0) is spike
    small = torch.rand(1, 3, 4, 4)
    assert blurred(small, (2, 2), 1.0).shape == small.shape


@pytest.mark.parametrize(
    ("shape", "grid", "width", "size"), [((1, 3, 14, 18), (7, 9), 0.5, 7), ((1, 2, 5, 3), (5, 3), 2.0, 5)]
)
def test_the_blur_is_torchvisions(shape, grid, width, size):
    """Computed as two products of matrices; the second kernel is cut where the shorter side ends."""
    x, sigma = torch.randn(shape, dtype=torch.float64), width * shape[2] / grid[0]
    expected = gaussian_blur(x, [size, size], [sigma, sigma])
    torch.testing.assert_close(blurred(x, grid, width), expected, rtol=0, atol=1e-14)


def test_the_width_is_chosen_on_other_images():
    """Three images; width 1 is best on a and b, and 0 on c, by more than both together."""
    values = {"a": (0.0, 1.0), "b": (0.0, 1.0), "c": (5.0, 0.0)}
    measured = {image: [{"cosine": value} for value in of_widths] for image, of_widths in values.items()}
    found = at_best_width(measured, {"cosine": +1})
    assert found == {"a": {"cosine": 0.0}, "b": {"cosine": 0.0}, "c": {"cosine": 0.0}}
    lower = at_best_width(measured, {"cosine": -1})
    assert lower == {"a": {"cosine": 1.0}, "b": {"cosine": 1.0}, "c": {"cosine": 5.0}}
    assert at_best_width({"a": [{"cosine": 1.0}]}, {"cosine": +1}) == {"a": {}}
