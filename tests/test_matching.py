"""Matching under known warps: the same place again, told by position and not by smoothness."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import nn

import core
from core.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from core.points import pixel_centres
from core.registry import discover
from core.streams import generator
from experiments.data import DataSet, Sample, open_data
from experiments.data.feature_cache import FeatureCache
from experiments.measuring.bench import Bench, EncodedImages, Encoder, Memory, Sizes
from experiments.measuring.evaluation import evaluate
from experiments.measuring.tasks import Ceiling, make_task
from experiments.measuring.tasks import matching as module
from experiments.measuring.tasks.matching import Pair, curve, fetched, homography, shares, thin_plate_spline
from experiments.peers.interpolation import Bilinear
from experiments.settings import SettingError

CPU = torch.device("cpu")
SIZE = (48, 64)


class Listed(DataSet):
    choice = "listed"

    def __init__(self, samples, videos=None):
        self.samples, self.names, self.videos = samples, [sample.name for sample in samples], videos
        self.fingerprint, self.classes = "0", ()

    def __getitem__(self, index):
        return self.samples[index]


def bench(data, output=SIZE):
    encoder, sizes, memory = (
        Encoder(core.load_backbone("hog8"), FeatureCache(None)),
        Sizes(SIZE, SIZE, SIZE, output),
        Memory(1),
    )
    return Bench(None, EncodedImages(data, None, encoder, sizes, memory, CPU), encoder, sizes, memory, 2, CPU)


def coordinates() -> torch.Tensor:
    """(3,H,W): every pixel tells its place."""
    rows, columns = pixel_centres(SIZE, torch.empty(0)).unbind(-1)
    return torch.stack([rows, columns, (rows + columns) / 2])


class Placed(nn.Module):
    """In the place of an upsampler: waves of the place that an image of coordinates tells, moved by some cells."""

    def __init__(self, shift=0):
        super().__init__()
        self.shift = shift

    def forward(self, image, features, output_size):
        rgb = image * image.new_tensor(IMAGENET_STD).view(3, 1, 1) + image.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
        places = F.interpolate(rgb, output_size, mode="bilinear", antialias=True)[:, :2]
        waves = torch.cat([wave(k * places) for k in (1, 2) for wave in (torch.sin, torch.cos)], 1)  # (1,8,Qh,Qw)
        waves = waves.repeat(1, -(-features.shape[1] // 8), 1, 1)[:, : 8 * (features.shape[1] // 8)]
        return F.pad(waves, (0, 0, 0, 0, 0, features.shape[1] - waves.shape[1])).roll(self.shift, 3)


class Constant(nn.Module):
    def forward(self, image, features, output_size):
        return torch.ones(1, features.shape[1], *output_size)


def values(rows):
    measures = {row["measure"] for row in rows}
    return {
        name: sum(r["numerator"] for r in rows if r["measure"] == name)
        / sum(r["denominator"] for r in rows if r["measure"] == name)
        for name in measures
    }


@pytest.mark.parametrize("make", [homography, thin_plate_spline])
def test_a_warp_stays_near_the_identity_and_is_the_same_each_time(make):
    place, again = (make(0.1, generator("a warp")) for _ in range(2))
    points = pixel_centres((20, 30), torch.empty(0))
    assert torch.equal(place(points), again(points))
    assert not torch.equal(place(points), make(0.1, generator("another"))(points))
    moved = (place(points) - points).norm(dim=-1)
    assert 0.005 < moved.max() < 0.2
    folded = place(points).diff(dim=0)[..., 0].min(), place(points).diff(dim=1)[..., 1].min()
    assert min(folded) > 0, "rows stay in order, and columns"


def test_a_homography_keeps_straight_lines_and_its_corners_inside():
    place = homography(0.2, generator("lines"))
    line = torch.stack([torch.linspace(0, 1, 9), torch.linspace(0.2, 0.7, 9)], -1).double()
    moved = place(line)
    steps = F.normalize(moved.diff(dim=0), dim=-1)
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), atol=1e-6, rtol=0)
    corners = place(torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]).double())
    assert ((corners >= 0) & (corners <= 1)).all()


@pytest.mark.parametrize("make", [homography, thin_plate_spline])
def test_the_image_is_fetched_from_the_places(make):
    """An image of coordinates, warped, holds the places themselves."""
    rows, columns = pixel_centres((60, 80), torch.empty(0)).unbind(-1)
    place = make(0.1, generator("coordinates"))
    asked = place(pixel_centres((60, 80), torch.empty(0)))
    found = fetched(torch.stack([rows, columns, rows])[None], asked)[0, :2].permute(1, 2, 0)
    inside = ((asked > 0.02) & (asked < 0.98)).all(-1)
    torch.testing.assert_close(found[inside], asked[inside], atol=1e-5, rtol=0)


def test_equally_similar_cells_share_a_point():
    cosines = torch.tensor([[0.1, 0.9, 0.2], [0.5, 0.5 + 1e-7, 0.4], [0.3, 0.3, 0.3], [0.5, 0.50001, 0.4]])
    expected = torch.tensor([[0, 1, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1, 0]])
    torch.testing.assert_close(shares(cosines), expected)


def test_the_curve_of_known_distances():
    """Four points: three find one cell, the last one shares two."""
    distances = torch.tensor([[0.0, 9.0], [1.0, 0.0], [50.0, 3.0], [4.0, 100.0]])
    share = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert curve(distances, share) == {
        "matching_auc": pytest.approx(1 + 7 / 8 + 5 / 8 + 0.5 * 4 / 8),
        "within_1px": 2, "within_2px": 2, "within_4px": 3.5, "within_8px": 3.5,
    }  # fmt: skip


def test_points_are_found_as_by_a_slow_loop(monkeypatch):
    asked, searched = torch.randn(2, 1, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    places = pixel_centres((6, 7), torch.empty(0)) + 0.05
    task = make_task({"name": "matching", "num_points": 1000})
    inside = [(i, j) for i in range(6) for j in range(7) if (places[i, j] <= 1).all()]
    distances = []
    for i, j in inside:
        cosines = F.cosine_similarity(asked[0, :, i, j, None, None], searched[0], dim=0)
        row, column = divmod(cosines.argmax().item(), 7)
        true = places[i, j] * torch.tensor([24.0, 28.0])
        distances.append(math.hypot((row + 0.5) * 4 - true[0].item(), (column + 0.5) * 4 - true[1].item()))
    for at_once in (2**22, 1):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        found = task._measures(Pair("a", asked, searched, places), (24, 28))
        for d in (1, 2, 4, 8):
            assert found[f"within_{d}px"] == (pytest.approx(sum(x <= d for x in distances)), len(inside))
        area = sum(max(0, 1 - x / 8) for x in distances)
        assert found["matching_auc"] == (pytest.approx(area, rel=1e-5), len(inside))
    assert task._measures(Pair("a", asked, searched, places + torch.nan), (24, 28)) == {}


@pytest.mark.parametrize("warp", ["homography", "tps"])
def test_features_that_know_their_place_find_it_and_others_do_not(warp):
    where = bench(Listed([Sample(f"{i}", coordinates()) for i in range(3)]))
    task = make_task({"name": "matching", "warp": warp, "num_points": 100})
    task.check(where)
    exact, constant, bilinear = (values(list(task.rows(m, 0, where))) for m in (Placed(), Constant(), Bilinear()))
    assert exact["within_2px"] > 0.9
    assert exact["matching_auc"] > 0.8
    assert constant["within_2px"] < 0.02
    assert bilinear["matching_auc"] < exact["matching_auc"]
    assert list(task.rows(Bilinear(), 0, where)) == list(task.rows(Bilinear(), 5, where))
    assert values(list(task.rows(Ceiling("encoder"), 0, where)))["matching_auc"] > 0


def test_an_error_of_position_is_seen_in_pixels():
    """Features of the searched view lie some cells further: so far away is what is found."""
    where = bench(Listed([Sample("a", coordinates())]))
    task = make_task({"name": "matching", "num_points": 60})

    class Shifts(Placed):
        calls = 0

        def forward(self, image, features, output_size):
            type(self).calls += 1
            self.shift = 0 if self.calls % 2 else 6  # the asked view comes first
            return super().forward(image, features, output_size)

    found = values(list(task.rows(Shifts(), 0, where)))
    assert found["within_4px"] < 0.2
    assert found["within_8px"] > 0.7


def test_exact_flow_of_scenes():
    data = open_data({"name": "scenes", "num": 1, "size": list(SIZE), "frames": 2, "supersampling": 1})
    where = bench(data)
    task = make_task({"name": "matching", "warp": "flow", "num_points": 80})
    task.check(where)
    rows = list(task.rows(Bilinear(), 0, where))
    assert {row["image"] for row in rows} == {data.names[0]}
    assert values(rows)["within_8px"] > values(list(task.rows(Constant(), 0, where)))["within_8px"]


def test_a_video_model_carries_its_state():
    class Counting(core.AnyUp):
        def forward(self, image, features, output_size=None, *, state=None, return_state=False):
            seen.append(state)
            return features.new_ones(1, features.shape[1], *output_size), len(seen)

    seen = []
    where = bench(open_data({"name": "scenes", "num": 2, "size": list(SIZE), "frames": 3, "supersampling": 1}))
    assert len(list(make_task({"name": "matching", "warp": "flow"}).rows(Counting(), 0, where))) == 2 * 2 * 5
    assert seen == [None, 1, 2, None, 4, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warp": "rotation"}, "task.warp"),
        ({"strength": 0}, "task.strength must lie between"),
        ({"num_points": 0}, "task.num_points must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(SettingError, match=message):
        make_task({"name": "matching", **settings})


def test_flow_needs_videos():
    with pytest.raises(SettingError, match=r"task\.warp=flow needs videos with exact flow"):
        make_task({"name": "matching", "warp": "flow"}).check(bench(Listed([Sample("a", coordinates())])))


def test_it_is_a_task_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    discover()
    with initialize_config_dir(str(Path(__file__).parent.parent / "configs"), version_base=None):
        config = compose(
            "evaluate", ["task=matching", "data@val_data=images", "backbone=hog8", "image_size=[32,40]", "cost=null",
                         "max_val_images=2", "peers=[bilinear,nearest]", "tracking.enabled=false", "device=cpu"]
        )  # fmt: skip
    report = evaluate(config)
    assert {one.measure for one in report.results} >= {"matching_auc", "within_1px"}
    assert report.results[0].measure == "matching_auc"
