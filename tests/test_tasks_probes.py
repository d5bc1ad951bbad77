"""Probes: what they learn and measure, against known answers; segmentation, depth, normals."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score
from torch import nn

from core.backbones import Backbone
from experiments.data import IGNORE, DataSet, Sample
from experiments.data.feature_cache import FeatureCache
from experiments.measuring.bench import Bench, EncodedImages, Encoder, Memory, Sizes, cut, flip
from experiments.measuring.heads import DPTHead, at_positions, enlarged
from experiments.measuring.probe_training import ProbeSettings
from experiments.measuring.tasks import EvaluationError, make_task, tasks
from experiments.measuring.tasks.geometry import angular_measures, depth_measures, gradient_loss, scale_invariant_loss
from experiments.measuring.tasks.segmentation import boundary_f, near_boundary
from experiments.peers.interpolation import Bilinear, Nearest
from experiments.settings import SettingError
from experiments.statistics.scores import frame, image_rows, sums, value

CPU = torch.device("cpu")


class Patches(Backbone):
    """Features of a cell: its mean colour, and channels in which nothing is."""

    def __init__(self, stride=4, num_layers=1):
        super().__init__("patches", (5,) * num_layers, (stride,) * num_layers, (0.0,) * 3, (1.0,) * 3)
        self.calls = 0

    def features(self, image, layer):
        self.calls += len(image)
        colours = F.avg_pool2d(image, self.patch_size) * 4 - 2  # (B,3,h,w)
        return F.pad(colours, (0, 0, 0, 0, 0, 2)) + layer


class Blocks(DataSet):
    """Images of coloured blocks as large as two cells; the colour says class, depth and normal."""

    choice = "blocks"
    classes = ("red", "green", "blue")

    def __init__(self, num=6, size=(16, 24), seed=0, **changed):
        self.names = [f"{seed}/{i}" for i in range(num)]
        self.fingerprint, self.size, self.seed, self.changed = f"{seed}", size, seed, changed

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(100 * self.seed + index)
        blocks = torch.randint(3, (1, 1, self.size[0] // 8, self.size[1] // 8), generator=generator).float()
        labels = F.interpolate(blocks, self.size, mode="nearest-exact")[0, 0].long()  # (H,W)
        image = F.one_hot(labels, 3).permute(2, 0, 1).float()
        normals = F.normalize(torch.eye(3) - 2 * torch.tensor([0.0, 0, 1]), dim=0)[:, labels]
        sample = Sample(self.names[index], image, labels, 1.0 + 2 * labels, normals)
        return replace(sample, **{key: change(index, getattr(sample, key)) for key, change in self.changed.items()})


def bench(train=None, val=None, backbone=None, output=None, image=(16, 24), layers=None, memory=1.0):
    train, val = train or Blocks(), val or Blocks(3, seed=1)
    encoder = Encoder(backbone or Patches(), FeatureCache(None), layers)
    sizes, memory = Sizes(image, image, image, output or image), Memory(memory)
    made = [EncodedImages(data, None, encoder, sizes, memory, CPU) for data in (train, val)]
    return Bench(*made, encoder, sizes, memory, 2, CPU)


def measured(task, model, where, seed=0):
    """(kind, measure) -> value over the set."""
    scores = frame(list(task.rows(model, seed, where)), {"data": "d", "backbone": "b", "arm": "a", "seed": seed})
    found = {}
    for (name, measure), rows in scores.groupby(["task", "measure"]):
        found[name.split("/")[1], measure] = float(value(*sums(rows)[:2])[0])
    return found


def quick(name="segmentation", **settings):
    return make_task({"name": name, "lr": 0.05, "epochs": 30, "batch_size": 2, "pixels_per_image": 64, **settings})


class Interpolated(nn.Module):
    """Bilinear interpolation that is not known to be it."""

    def forward(self, image, features, output_size):
        return F.interpolate(features, output_size, mode="bilinear")


@pytest.mark.parametrize("pixels", [64, None])
def test_classes_that_the_features_hold_are_found(pixels):
    found = measured(quick(pixels_per_image=pixels), Nearest(), bench())
    assert found["upsampled", "miou"] == found["upsampled", "accuracy"] == 1
    assert found["upsampled", "boundary_miou"] == 1
    assert found["transferred", "accuracy"] > 0.95


@pytest.mark.parametrize("pixels", [200, None])
def test_depth_and_normals_that_the_features_hold_are_found(pixels):
    depth = measured(quick("depth", pixels_per_image=pixels, lr=0.2), Nearest(), bench(Blocks(4)))
    assert depth["upsampled", "rmse"] < 0.4  # of depths 1, 3 and 5
    assert depth["upsampled", "delta1"] > 0.98
    normals = measured(quick("normals", pixels_per_image=pixels), Nearest(), bench(Blocks(4)))
    assert normals["upsampled", "angular_rmse"] < 3
    assert normals["upsampled", "within_11_25"] == 1


def test_features_without_the_classes_give_none():
    class Blank(nn.Module):
        def forward(self, image, features, output_size):
            return torch.ones(*features.shape[:2], *output_size)

    found = measured(quick(), Blank(), bench())
    assert found["upsampled", "miou"] < 0.2  # one class everywhere: a third of the pixels, of three classes


def test_miou_and_accuracy_are_those_of_scikit_learn():
    task, generator = quick(boundary=1), torch.Generator().manual_seed(0)
    labels = torch.randint(4, (5, 1, 12, 9), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    labels[:, :, :3] = torch.where(labels[:, :, :3] == IGNORE, IGNORE, 2)
    logits = torch.randn(5, 5, 12, 9, generator=generator)  # class 4 occurs in predictions only
    rows = []
    for i in range(5):
        rows += image_rows(f"i{i}", task.measures(logits[i : i + 1], labels[i : i + 1].to(torch.uint8)))
    scores = frame(rows, {"task": "t", "data": "d", "backbone": "b", "arm": "a", "seed": 0})
    found = {measure: float(value(*sums(part)[:2])[0]) for measure, part in scores.groupby("measure")}
    predicted, truth = logits.argmax(1), labels[:, 0]
    known = truth != IGNORE
    assert found["miou"] == pytest.approx(jaccard_score(truth[known], predicted[known], average="macro"))
    assert found["accuracy"] == pytest.approx((predicted == truth)[known].double().mean().item())
    near = near_boundary(truth, 1)
    assert found["boundary_miou"] == pytest.approx(jaccard_score(truth[near], predicted[near], average="macro"))


def test_boundaries_by_a_loop():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (1, 4, 5), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[0, 5:9, 3:12] = IGNORE
    for distance in (1, 3):
        found = near_boundary(labels, distance)
        for i in range(labels.shape[1]):
            for j in range(labels.shape[2]):
                rows = slice(max(0, i - distance), i + distance + 1)
                window = labels[0, rows, max(0, j - distance) : j + distance + 1].flatten().tolist()
                own = labels[0, i, j].item()
                expected = own != IGNORE and any(other not in (own, IGNORE) for other in window)
                assert found[0, i, j] == expected


def test_measures_of_depth_by_hand():
    ours, theirs = torch.tensor([1.0, 2.2, 3.0, 9.0]).double(), torch.tensor([1.0, 2.0, 4.0, 5.0]).double()
    found = depth_measures(ours, theirs)
    assert found["rmse"] == pytest.approx(math.sqrt((0 + 0.04 + 1 + 16) / 4))
    ratios = [1, 1.1, 4 / 3, 9 / 5]
    for k in (1, 2, 3):
        assert found[f"delta{k}"] == sum(ratio < 1.25**k for ratio in ratios) / 4
    aligned = [value * 2 / 2.2 for value in ours.tolist()]  # the lower of two middle values is torch's median
    errors = [(a - b) ** 2 for a, b in zip(aligned, theirs.tolist(), strict=True)]
    assert found["rmse_aligned"] == pytest.approx(math.sqrt(sum(errors) / 4))
    worse = [max(a / b, b / a) for a, b in zip(aligned, theirs.tolist(), strict=True)]
    assert found["delta1_aligned"] == sum(ratio < 1.25 for ratio in worse) / 4
    assert depth_measures(3 * theirs, theirs)["rmse_aligned"] == pytest.approx(0)


def test_depth_that_is_unknown_or_too_far_does_not_count():
    task = quick("depth", max_depth=10.0)
    target = torch.tensor([[[[1.0, 2.0, 0.0, 50.0]]]])
    prediction = torch.tensor([[[[1.0, 2.0, 7.0, 9.0]]]])
    assert task.measures(prediction, target)["rmse"] == 0
    assert task.measures(prediction, torch.zeros(1, 1, 1, 4)) == {}
    assert task.loss(prediction, target) < 1e-4


def test_measures_of_normals_by_hand():
    angles = [0, 10, 20, 25, 90]
    theirs = torch.tensor([[0.0, 0, -1]] * 5).double().T
    ours = torch.tensor([[math.sin(math.radians(a)), 0, -math.cos(math.radians(a))] for a in angles]).double().T * 7
    found = angular_measures(ours, theirs)
    assert found["angular_rmse"] == pytest.approx(math.sqrt(sum(a * a for a in angles) / 5))
    assert [found[key] for key in ("within_11_25", "within_22_5", "within_30")] == [0.4, 0.6, 0.8]


def test_losses_of_depth_by_loops():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(2, 1, 14, 13, generator=generator) * 5 + 0.1 for _ in range(2))
    known = torch.rand(2, 1, 14, 13, generator=generator) < 0.7
    log = (ours + 1e-3).log() - (theirs + 1e-3).log()
    expected = 0.0
    for step in (1, 2, 4, 6):
        total, count = 0.0, 0
        for b in range(2):
            ratio, valid = log[b, 0, ::step, ::step], known[b, 0, ::step, ::step]
            count += int(valid.sum())
            for i in range(ratio.shape[0]):
                for j in range(ratio.shape[1]):
                    for k, m in ((i + 2, j), (i, j + 2)):
                        if k < ratio.shape[0] and m < ratio.shape[1] and valid[i, j] and valid[k, m]:
                            total += abs(float(ratio[i, j] - ratio[k, m]))
        expected += total / count
    assert float(gradient_loss(ours, theirs, known)) == pytest.approx(expected, rel=1e-5)
    g = log[known]
    by_hand = math.sqrt(float((g**2).mean() - 0.85 * g.mean() ** 2))
    assert float(scale_invariant_loss(ours[known], theirs[known])) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("output", [(16, 24), (8, 12)])
@pytest.mark.parametrize("name", ["segmentation", "depth", "normals"])
@pytest.mark.parametrize("pixels", [40, None])
def test_a_linear_probe_commutes_with_bilinear_interpolation(name, pixels, output):
    task = quick(name, pixels_per_image=pixels, epochs=4, lr=0.01)
    shortcut = measured(task, Bilinear(), bench(output=output))
    plain = measured(task, Interpolated(), bench(output=output))
    assert set(shortcut) == set(plain)
    for key, expected in shortcut.items():
        assert plain[key] == pytest.approx(expected, abs=0.01)
    for _, measure in shortcut:
        assert shortcut["upsampled", measure] == shortcut["transferred", measure]


def test_the_transferred_probe_never_sees_the_arm():
    """Features that say the same in other words: a probe of their own reads them, that of the encoder's cannot."""

    class Negated(nn.Module):
        def forward(self, image, features, output_size):
            return -F.interpolate(features, output_size, mode="nearest-exact")

    found = measured(quick(), Negated(), bench())
    assert found["upsampled", "accuracy"] == 1
    assert found["transferred", "accuracy"] < 0.5


def test_a_probe_of_cells():
    task = quick(low_labels="cells")
    labels = torch.tensor([[0, 0, 1, 1], [0, 2, IGNORE, IGNORE], [1, 1, 2, 2], [1, 1, 0, 2]], dtype=torch.uint8)
    labels[1, 2] = 1
    assert task.of_cells(labels[None, None], (2, 2)).tolist() == [[[[0, 1], [1, 2]]]]
    labels[0, 2] = IGNORE
    labels[1, 2] = IGNORE
    assert task.of_cells(labels[None, None], (2, 2))[0, 0, 0, 1] == IGNORE
    found = measured(task, Nearest(), bench())
    assert found["transferred", "accuracy"] == 1  # blocks are made of whole cells
    bilinear = measured(quick(low_labels="cells", epochs=3), Bilinear(), bench())
    assert bilinear["transferred", "miou"] != bilinear["upsampled", "miou"]


@pytest.mark.parametrize("pixels", [40, None])
def test_the_same_again_and_another_seed(pixels):
    def rows(seed):
        return list(quick(pixels_per_image=pixels, epochs=2, lr=0.01).rows(Nearest(), seed, bench()))

    torch.manual_seed(1)
    first = rows(3)
    torch.manual_seed(2)
    assert rows(3) == first
    assert rows(4) != first


def test_pixels_between_features_are_interpolated():
    generator = torch.Generator().manual_seed(0)
    values, size = torch.randn(1, 3, 5, 4, generator=generator), (13, 21)
    positions = torch.cartesian_prod(torch.arange(13), torch.arange(21))
    found = at_positions(values, positions, size)
    assert torch.allclose(found, enlarged(values, size)[0].flatten(1), atol=1e-5)
    assert torch.equal(at_positions(values, torch.tensor([[2, 3]]), (5, 4))[:, 0], values[0, :, 2, 3])


def test_few_labelled_pixels_are_drawn_repeatedly():
    def few(index, labels):
        keep = torch.full_like(labels, IGNORE)
        keep[0, :3] = labels[0, :3]
        keep[-1, -3:] = labels[-1, -3:]
        return keep if index else torch.full_like(labels, IGNORE)  # the first has none at all

    found = measured(quick(), Nearest(), bench(Blocks(8, labels=few)))
    assert found["upsampled", "accuracy"] > 0.6


def test_images_are_cut_with_their_labels():
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(60), indexing="ij")
    flow = torch.stack([torch.full((20, 60), 3.0), torch.full((20, 60), -1.0)])
    image = torch.stack([rows / 20, columns / 60, torch.zeros(20, 60)])
    sample = Sample("x", image, columns.long(), 1.0 + rows, torch.ones(3, 20, 60), flow)
    case = cut(sample, (10, 10))  # half the size, the middle third
    assert case.labels.shape == (1, 1, 10, 10)
    assert case.labels[0, 0, 0].tolist() == [2 * j + 1 for j in range(10, 20)]
    assert case.rgb[0, 1].float().mean() == pytest.approx(0.5, abs=0.01)
    assert torch.allclose(case.rgb[0, 1, 0].float(), (case.labels[0, 0, 0] + 0.0) / 60, atol=0.012)
    assert case.flow[0, :, 0, 0].tolist() == [1.5, -0.5]
    mirrored = flip(case)
    assert mirrored.labels[0, 0, 0].tolist() == case.labels[0, 0, 0].tolist()[::-1]
    assert mirrored.normals[0, :, 0, 0].tolist() == [-1, 1, 1]
    assert mirrored.flow[0, :, 0, 0].tolist() == [-1.5, -0.5]


def test_training_images_are_mirrored_before_they_are_encoded():
    where = bench()
    case, mirrored = where.train.get(0), where.train.get(0, flipped=True)
    assert torch.equal(mirrored.rgb, case.rgb.flip(-1))
    assert torch.equal(mirrored.features[0], case.features[0].flip(-1))  # the encoder here looks at single cells
    before = where.encoder.backbone.calls
    quick(pixels_per_image=None, epochs=8, flip=0.5).usable(where.train)
    measured(quick(pixels_per_image=None, epochs=8, flip=0.5), Nearest(), where)
    assert where.encoder.backbone.calls - before == 5 + 5 + 3  # what was not there, in both ways, and validation


def test_what_does_not_fit_into_memory_is_computed_again():
    roomy, tight = bench(), bench(memory=0)
    task = quick(epochs=2)
    assert measured(task, Nearest(), roomy) == measured(quick(epochs=2), Nearest(), tight)
    calls = roomy.encoder.backbone.calls
    measured(task, Nearest(), roomy)
    assert roomy.encoder.backbone.calls == calls == 9 < tight.encoder.backbone.calls


def test_the_dpt_head_learns_from_four_layers():
    layers = DPTHead.layers(12)
    assert layers == [2, 5, 8, 11]
    assert DPTHead.layers(4) == [0, 1, 2, 3]
    where = bench(backbone=Patches(num_layers=12), layers=layers, output=(8, 12))
    assert len({float(layer.float().mean()) for layer in where.val.get(0).features}) == 4
    head = DPTHead([5] * 4, 3, hidden=8)
    assert head([torch.randn(2, 5, 6, 7)] * 4).shape == (2, 3, 6, 7)
    settings = {"epochs": 12, "lr": 5e-3, "batch_size": 2, "warmup_epochs": 0.5, "hidden": 8}
    task = make_task({"name": "depth", "head": "dpt", "pixels_per_image": None, **settings})
    found = measured(task, Nearest(), where)
    assert found["upsampled", "delta1"] > 0.5
    assert found["upsampled", "rmse"] != found["transferred", "rmse"]


def test_rates_of_learning():
    cosine = ProbeSettings(1.0, 0, 4, 20)
    rates = [cosine.rate(step, 100) for step in range(100)]
    assert rates[0] == 1
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.001
    warm = ProbeSettings(1.0, 0, 8, 10, warmup_epochs=1.5)
    rates = [warm.rate(step, 100) for step in range(100)]
    assert rates[14] == 1
    assert rates[:15] == sorted(rates[:15])
    assert rates[15:] == sorted(rates[15:], reverse=True)
    jafar = ProbeSettings(1.0, 0, 4, 20, schedule="legacy_jafar")
    layer = nn.Linear(1, 1)
    adam = torch.optim.SGD(layer.parameters(), 1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=20)
    for step in range(90):
        assert jafar.rate(step, 1000) == pytest.approx(adam.param_groups[0]["lr"], abs=1e-6)
        adam.step()
        theirs.step()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("segmentation", {"schedule": "step"}, "task.schedule must be one of cosine, legacy_jafar, got step"),
        ("segmentation", {"epochs": 0}, "task.epochs must be at least 1"),
        ("segmentation", {"batch_size": 0}, "task.batch_size must be at least 1"),
        ("segmentation", {"pixels_per_image": 0}, "task.pixels_per_image must be null or at least 1"),
        ("segmentation", {"flip": 2.0}, "task.flip must lie between 0 and 1"),
        ("segmentation", {"lr": -1.0}, "task.lr must not be negative"),
        ("segmentation", {"weight_decay": math.inf}, "task.weight_decay must not be negative"),
        ("segmentation", {"boundary": 0}, "task.boundary must be at least 1 pixel"),
        ("segmentation", {"low_labels": "no"}, "task.low_labels must be one of pixels, cells, got no"),
        ("segmentation", {"colour": 1}, "task=segmentation has no setting colour; it has: lr, weight_decay"),
        ("depth", {"hidden": 0}, "task.hidden must be at least 1"),
        ("depth", {"head": "mlp"}, "task.head must be one of linear, dpt, got mlp"),
        ("depth", {"head": "dpt"}, "task.head=dpt looks at neighbours: it needs task.pixels_per_image=null"),
        ("depth", {"warmup_epochs": 10.0}, "below task.epochs=10"),
        ("depth", {"max_depth": 0.0}, "task.max_depth must be above 0.001 metres"),
        (
            "colours",
            {},
            "task=colours is not registered; there are: depth, fidelity, matching, normals, propagation, segmentation, "
            "temporal, uncertainty",
        ),
    ],
)
def test_settings_that_make_no_sense(name, settings, message):
    with pytest.raises(SettingError, match=message.replace("(", r"\(")):
        make_task({"name": name, **settings})


def test_all_tasks_are_registered():
    probes, others = {"segmentation", "depth", "normals"}, {"fidelity", "matching", "propagation", "temporal"}
    assert set(tasks()) == probes | others | {"uncertainty"}


class Unlabelled(Blocks):
    choice, classes = "unlabelled", ()


class OneClass(Blocks):
    choice, classes = "one", ("all",)


def gone(index, values):
    return None


@pytest.mark.parametrize(
    ("name", "train", "val", "message"),
    [
        ("segmentation", Unlabelled(), None, "task=segmentation needs labels, and data=unlabelled has none"),
        ("segmentation", None, Unlabelled(), "needs labels, and val_data=unlabelled has none"),
        ("segmentation", OneClass(), OneClass(), "data=one has the one class all: nothing to tell apart"),
        ("segmentation", OneClass(), None, "data has the classes all, val_data red, green, blue"),
        ("depth", Blocks(depth=gone), None, "task=depth needs depth, and data=blocks gives none"),
        ("normals", None, Blocks(normals=gone), "task=normals needs normals, and val_data=blocks gives none"),
    ],
)
def test_data_without_what_is_to_be_predicted(name, train, val, message):
    with pytest.raises(SettingError, match=message):
        quick(name).check(bench(train, val))


def all_ignored(index, labels):
    return torch.full_like(labels, IGNORE)


@pytest.mark.parametrize(
    ("name", "train", "val", "message"),
    [
        ("segmentation", Blocks(labels=all_ignored), None, "none of 6 training images has a known pixel"),
        (
            "segmentation",
            Blocks(labels=lambda i, x: x * 0 + 1),
            None,
            "all labelled pixels of 6 training images are green",
        ),
        ("segmentation", Blocks(labels=lambda i, x: None if i == 4 else x), None, "image 0/4 has no labels"),
    ],
)
def test_images_from_which_nothing_is_to_be_learnt(name, train, val, message):
    with pytest.raises(EvaluationError, match=message):
        list(quick(name).rows(Nearest(), 0, bench(train, val)))


def test_upsampled_features_that_are_not_finite():
    class Broken(nn.Module):
        def forward(self, image, features, output_size):
            output = F.interpolate(features, output_size)
            return output.masked_fill(image[:, :1] > 2, math.nan)  # where red is

    with pytest.raises(EvaluationError, match=r"image 0/0: \d+ of 1920 upsampled values are not finite"):
        list(quick().rows(Broken(), 0, bench()))


def test_upsampled_features_of_another_size():
    class Small(nn.Module):
        def forward(self, image, features, output_size):
            return features

    with pytest.raises(EvaluationError, match=r"image 0/0: upsampled features are \(1, 5, 4, 6\), asked for were"):
        list(quick().rows(Small(), 0, bench()))


def slow_boundary_f(predicted, labels, distance):
    """By its definition, pixel by pixel."""
    rows, columns = labels.shape
    places = [(i, j) for i in range(rows) for j in range(columns)]

    def outline(classes, label):
        found = []
        for i, j in places:
            if labels[i, j] == IGNORE or classes[i, j] != label:
                continue
            around = [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
            if any((a, b) in places and labels[a, b] != IGNORE and classes[a, b] != label for a, b in around):
                found.append((i, j))
        return found

    def near(one, others):
        return sum(min(math.dist(place, other) for other in others) <= distance for place in one) / len(one)

    found = []
    for label in sorted(set(labels.flatten().tolist()) - {IGNORE}):
        true, ours = outline(labels, label), outline(predicted, label)
        if true:
            p, r = (near(ours, true), near(true, ours)) if ours else (0, 0)
            found.append(2 * p * r / (p + r) if p + r else 0)
    return sum(found) / len(found)


@pytest.mark.parametrize("distance", [1, 2])
def test_boundary_f_is_that_of_a_slow_loop(distance):
    numbers = np.random.default_rng(distance)
    labels = numbers.integers(0, 4, (5, 6)).repeat(3, 0).repeat(3, 1)
    predicted = np.where(numbers.random(labels.shape) < 0.1, numbers.integers(0, 5, labels.shape), labels)
    labels[:4, :5] = IGNORE
    assert boundary_f(predicted, labels, distance) == pytest.approx(slow_boundary_f(predicted, labels, distance))


def test_boundary_f_forgives_a_shift_within_its_tolerance():
    labels = np.zeros((30, 40), np.int64)
    labels[:, 20:] = 1
    found = [boundary_f(np.roll(labels, shift, 1)[:, 8:-8], labels[:, 8:-8], 3) for shift in (0, 2, 5)]
    assert found[0] == found[1] == 1
    assert found[2] == 0
    assert boundary_f(labels, np.zeros_like(labels), 3) is None, "an image of one class has no outline"
    assert boundary_f(np.zeros_like(labels), labels, 3) == 0


def test_features_too_large_for_half_precision():
    class Large(Patches):
        def features(self, image, layer):
            return super().features(image, layer) * 1e5

    with pytest.raises(
        EvaluationError,
        match=r"backbone patches gives features that are NaN, or too large for half precision \(65504\), for 0/0",
    ):
        list(quick().rows(Nearest(), 0, bench(backbone=Large())))


def test_an_encoder_that_gives_nan():
    class Broken(Patches):
        def features(self, image, layer):
            return super().features(image, layer) * math.nan

    with pytest.raises(
        EvaluationError,
        match=r"backbone patches gives features that are NaN, or too large for half precision \(65504\), for 0/0",
    ):
        list(quick().rows(Nearest(), 0, bench(backbone=Broken())))


def test_the_worst_images_are_kept():
    def wrong(index, labels):
        return (labels + 1) % 3 if index in (1, 4) else labels

    task = quick()
    list(task.rows(Nearest(), 0, bench(val=Blocks(6, seed=1, labels=wrong))))
    assert [picture.name for picture in task.worst[:2]] == ["1/1", "1/4"]
    assert len(task.worst) == 3
    assert list(task.worst[0].columns) == ["image", "labels", "prediction"]
    assert all(column.shape == (3, 16, 24) for column in task.worst[0].columns.values())
    assert not torch.equal(task.worst[0].columns["labels"], task.worst[0].columns["prediction"])
    assert torch.equal(task.worst[2].columns["labels"], task.worst[2].columns["prediction"])
    for name in ("depth", "normals"):
        task = quick(name, epochs=2)
        list(task.rows(Nearest(), 0, bench()))
        assert all(0 <= c.min() <= c.max() <= 1 for picture in task.worst for c in picture.columns.values())
