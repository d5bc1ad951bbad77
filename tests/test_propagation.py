"""Labels that are propagated over a video by the similarity of features."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import nn

import core
from core.registry import discover
from experiments.data import DataSet, Sample
from experiments.data.feature_cache import FeatureCache
from experiments.measuring.bench import Bench, EncodedImages, Encoder, EvaluationError, Memory, Sizes
from experiments.measuring.evaluation import evaluate
from experiments.measuring.tasks import make_task
from experiments.measuring.tasks import propagation as module
from experiments.measuring.tasks.propagation import contour_f, propagate, radius_in_cells, region_j
from experiments.settings import SettingError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SIZE = (24, 32)


class Listed(DataSet):
    choice = "listed"

    def __init__(self, labels, classes=("background", "object 1", "object 2"), videos=True):
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(3, *SIZE, generator=generator)
        self.samples = [Sample(str(i), image, one) for i, one in enumerate(labels)]
        self.names, self.classes, self.fingerprint = [s.name for s in self.samples], classes, "0"
        self.videos = {"v": range(len(labels))} if videos is True else videos

    def __getitem__(self, index):
        return self.samples[index]


class Painter(nn.Module):
    """Gives its n-th call the n-th painting, or the last."""

    def __init__(self, *paintings):
        super().__init__()
        self.paintings = list(paintings)

    def forward(self, image, features, output_size):
        painting = self.paintings.pop(0) if len(self.paintings) > 1 else self.paintings[0]
        return F.pad(painting, (0, 0, 0, 0, 0, features.shape[1] - painting.shape[1]))


def bench(data, output=SIZE, limit=None):
    encoder, sizes = Encoder(core.load_backbone("hog8"), FeatureCache(None)), Sizes(SIZE, SIZE, SIZE, output)
    memory = Memory(1.0)
    return Bench(None, EncodedImages(data, limit, encoder, sizes, memory, CPU), encoder, sizes, memory, 2, CPU)


def codes(size=SIZE, seed=0):
    """(1,16,*size) random unit vectors: no two cells are alike."""
    return F.normalize(torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(seed)), dim=1)


def squares(shift=0):
    labels = torch.zeros(SIZE, dtype=torch.long)
    labels[4:12, 6:14] = 1
    labels[12:20, 10:16] = 2
    return labels.roll(shift, 1)


def measured(task, model, where):
    task.check(where)
    rows = list(task.rows(model, 0, where))
    return [(row["image"], row["measure"], row["numerator"]) for row in rows]


def test_a_static_video_keeps_its_labels():
    task = make_task({"name": "propagation", "radius": 8.0, "topk": 1})
    found = measured(task, Painter(codes()), bench(Listed([squares()] * 3)))
    measures = ("j_and_f", "region_j", "contour_f")
    assert found == [(image, measure, 1.0) for image in "12" for measure in measures]


def test_labels_move_with_the_features():
    shifts = (0, 3, 6, 9)
    background = F.one_hot(torch.tensor(15), 16).float().view(1, 16, 1, 1)
    paintings = [torch.where(squares() > 0, codes(), background).roll(shift, 3) for shift in shifts]
    where = bench(Listed([squares(shift) for shift in shifts]))

    def regions(radius, context=7):
        task = make_task({"name": "propagation", "radius": radius, "topk": 1, "context": context})
        return [v for _, measure, v in measured(task, Painter(*paintings), where) if measure == "region_j"]

    assert regions(3.0, context=1) == [1, 1, 1]  # the frame before is near enough
    assert regions(9.0, context=0) == [1, 1, 1]  # so is the first one
    assert regions(3.0, context=0)[-1] < 0.5
    assert regions(2.0)[0] < 0.9


def test_only_so_many_frames_are_searched(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "propagate", lambda output, before, *_: seen.append(before) or before[0][1] * len(seen))
    where = bench(Listed([squares()] * 6))
    for context in (0, 1, 2):
        seen.clear()
        measured(make_task({"name": "propagation", "context": context}), Painter(codes()), where)
        numbers = [[int(labels.max()) for _, labels in before] for before in seen]  # 1: the first frame's own
        assert numbers == [[1, *range(max(1, n - context + 1), n + 1)] for n in range(5)]


def test_the_radius_is_that_of_the_image():
    assert radius_in_cells(48.0, (224, 224), (14, 28)) == (3, 6)
    assert radius_in_cells(48.0, (224, 224), (28, 56)) == (6, 12)


@pytest.mark.parametrize(("topk", "pairs"), [(1, 2**23), (4, 2**23), (4, 1), (200, 3000)])
def test_propagation_by_a_loop(topk, pairs, monkeypatch):
    monkeypatch.setattr(module, "_MAX_PAIRS", pairs)
    size, radius, generator = (7, 9), (2, 3), torch.Generator().manual_seed(1)
    before = [(codes(size, seed), torch.rand(1, 3, *size, generator=generator)) for seed in (1, 2)]
    query = codes(size, 3)
    found = propagate(query, before, radius, topk, 0.2)
    for i in range(size[0]):
        for j in range(size[1]):
            near = [
                (float(query[0, :, i, j].double() @ keys[0, :, k, m].double()), labels[0, :, k, m].double())
                for keys, labels in before
                for k in range(size[0])
                for m in range(size[1])
                if abs(k - i) <= radius[0] and abs(m - j) <= radius[1]
            ]
            near = sorted(near, key=lambda pair: -pair[0])[:topk]
            weights = [math.exp(cosine / 0.2) for cosine, _ in near]
            mean = sum(w * labels for w, (_, labels) in zip(weights, near, strict=True)) / sum(weights)
            assert torch.allclose(found[0, :, i, j].double(), mean, atol=1e-5)


def test_regions_by_hand():
    one, other = torch.tensor([[1, 1, 0, 0]]).bool().numpy(), torch.tensor([[0, 1, 1, 0]]).bool().numpy()
    assert region_j(one, other) == pytest.approx(1 / 3)
    assert region_j(one & ~one, other & ~other) == 1
    assert region_j(one & ~one, other) == 0


def official_contour(mask):
    """DAVIS' definition, pixel by pixel: the right, lower and lower right neighbour, the image's last row and column
    compared along themselves only."""
    rows, columns = mask.shape
    found = np.zeros_like(mask)
    for i in range(rows):
        for j in range(columns):
            around = [(i, j + 1), (i + 1, j), (i + 1, j + 1)]
            found[i, j] = any(mask[k, m] != mask[i, j] for k, m in around if k < rows and m < columns)
    return found


def test_contours_by_a_loop():
    rng = np.random.default_rng(0)
    seen = set()
    for size in (5, 20):
        true, predicted = (np.kron(rng.random((4, 6)) < 0.4, np.ones((size, size))) > 0 for _ in range(2))
        predicted[:, : 3 * size] = np.roll(true, 1, axis=1)[:, : 3 * size]
        reach = math.ceil(0.008 * math.hypot(*true.shape))
        ours, theirs = (np.argwhere(official_contour(mask)) for mask in (predicted, true))
        near = np.linalg.norm(ours[:, None] - theirs[None], axis=-1) <= reach
        precision, recall = near.any(1).mean(), near.any(0).mean()
        found = contour_f(predicted, true)
        assert found == pytest.approx(2 * precision * recall / (precision + recall))
        seen.add(found)
    assert all(0 < found < 1 for found in seen)


def test_contours_that_are_missing():
    mask = squares().bool().numpy()
    none = mask & ~mask
    assert contour_f(mask, mask) == contour_f(none, none) == 1
    assert contour_f(none, mask) == contour_f(mask, none) == 0


def test_background_counts_only_where_it_is_a_class():
    moved = [squares(), squares(8)]
    task = make_task({"name": "propagation", "radius": 4.0, "topk": 1})
    (_, _, objects), (_, _, classes) = (
        measured(task, Painter(codes()), bench(Listed(moved, names)))[1]
        for names in (("background", "a", "b"), ("floor", "a", "b"))
    )
    each = [region_j(*((x == one).numpy() for x in (squares(), squares(8)))) for one in range(3)]
    assert objects == pytest.approx(np.mean(each[1:]))
    assert classes == pytest.approx(np.mean(each))


def test_a_video_without_objects_is_told():
    task, where = make_task({"name": "propagation"}), bench(Listed([torch.zeros(SIZE, dtype=torch.long)] * 2))
    for _ in range(2):  # of two arms it is the same note
        assert measured(task, Painter(codes()), where) == []
    assert task.notes == ["the first frame of video v has no labelled object, so the video does not count"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0.0}, "task.radius must be above 0 and finite, got 0.0"),
        ({"topk": 0}, "task.topk must be a whole number from 1 up, got 0"),
        ({"context": -1}, "task.context must be a whole number from 0 up, got -1"),
        ({"temperature": 0.0}, "task.temperature must be above 0 and finite, got 0.0"),
        ({"temperature": math.nan}, "task.temperature must be above 0 and finite, got nan"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(SettingError, match=message):
        make_task({"name": "propagation", **settings})


def test_data_without_videos_or_labels():
    task = make_task({"name": "propagation", "radius": 2.0})
    two = [squares()] * 2
    with pytest.raises(SettingError, match="needs videos, and val_data=listed has none: use data@val_data=davis2017"):
        task.check(bench(Listed(two, videos=None)))
    with pytest.raises(SettingError, match="needs videos"):
        task.check(bench(Listed(two, videos={"a": range(1), "b": range(1, 2)})))
    with pytest.raises(SettingError, match="needs labels, and val_data=listed has none: use data@val_data=davis2017"):
        task.check(bench(Listed(two, classes=())))
    with pytest.raises(SettingError, match="max_val_images must be null"):
        task.check(bench(Listed(two), limit=1))
    with pytest.raises(
        SettingError, match=r"task.radius=2.0 pixels is less than a cell .* set at least 8, or a larger"
    ):
        task.check(bench(Listed(two), output=(3, 4)))
    with pytest.raises(EvaluationError, match="image 0 has no labels"):
        measured(task, Painter(codes()), bench(Listed([None, None])))


def test_scenes_are_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["task=propagation", "tracking.enabled=false", "backbone=hog8", "image_size=[32,40]", "output_size=20",
                "data@val_data=scenes", "val_data.size=[36,40]", "val_data.num=1", "val_data.frames=3", "device=cpu",
                "val_data.supersampling=1", "peers=[bilinear,nearest]", "cost=null", "task.radius=16"]  # fmt: skip
    discover()
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        report = evaluate(compose("evaluate", settings))
    scores = report.scores
    assert set(scores["arm"]) == {"bilinear", "nearest", "encoder"}
    assert list(scores["measure"].unique()) == ["j_and_f", "region_j", "contour_f"]
    assert sorted(scores["image"].unique()) == ["scenes/train/000000/0001", "scenes/train/000000/0002"]
    assert scores["numerator"].between(0.1, 1).all()
