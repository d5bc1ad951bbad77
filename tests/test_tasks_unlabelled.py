"""Tasks without labels: fidelity, and consistency in time."""

import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import core
from core.hooks import Temporal
from experiments.data import DataSet, Sample, open_data
from experiments.data.feature_cache import FeatureCache
from experiments.measuring.bench import Bench, EncodedImages, Encoder, Memory, Sizes, cut
from experiments.measuring.metrics import fidelity, fidelity_case
from experiments.measuring.tasks import Ceiling, EvaluationError, make_task
from experiments.measuring.tasks.segmentation import near_boundary
from experiments.measuring.tasks.temporal import MEASURED, estimated_flow, on_grid, warping_error
from experiments.peers.interpolation import Bicubic, Bilinear, Nearest
from experiments.settings import SettingError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def video():
    """Two exact frames of a scene, rendered once."""
    data = open_data({"name": "scenes", "num": 1, "size": [48, 64], "frames": 2, "supersampling": 1})
    return data, [data[0], data[1]]


class Listed(DataSet):
    choice = "listed"

    def __init__(self, samples, videos=None, classes=()):
        self.samples, self.names, self.videos = samples, [sample.name for sample in samples], videos
        self.fingerprint, self.classes = "0", classes

    def __getitem__(self, index):
        return self.samples[index]


def bench(data, backbone="hog8", image=(48, 64), output=None):
    encoder = Encoder(core.load_backbone(backbone), FeatureCache(None))
    sizes, memory = Sizes(image, image, image, output or image), Memory(1.0)
    return Bench(None, EncodedImages(data, None, encoder, sizes, memory, CPU), encoder, sizes, memory, 2, CPU)


def test_fidelity_says_which_images_are_enlarged(caplog):
    listed = Listed([Sample(f"{side}", torch.rand(3, side, side + 8)) for side in (40, 64, 100)])
    listed.shorter_sides = [40, 64, 100]
    task = make_task({"name": "fidelity", "scales": [2, 4], "view": 32, "guidance": 32})
    task.check(bench(listed))
    near, far = task.notes
    assert near.startswith(
        "at 2x 1 of 3 images are smaller than 64 pixels (2 x view) and are enlarged, in the median 1.0"
    )
    assert far.startswith(
        "at 4x 3 of 3 images are smaller than 128 pixels (4 x view) and are enlarged, in the median 2.0"
    )
    assert "a smaller task.view" in caplog.text


class Painter(nn.Module):
    """Gives its n-th call the n-th painting."""

    def __init__(self, paintings):
        super().__init__()
        self.paintings = list(paintings)

    def forward(self, image, features, output_size):
        return self.paintings.pop(0)


def classes_of(sample, count):
    return F.one_hot(sample.labels, count).permute(2, 0, 1)[None].float()


def test_what_is_painted_on_surfaces_has_no_error(video):
    data, (first, second) = video
    paintings = [classes_of(sample, len(data.classes)) for sample in (first, second)]
    error, visible = warping_error(*paintings, cut(first, (48, 64)).flow)
    near = near_boundary(first.labels[None], 2)[0] | near_boundary(second.labels[None], 2)[0]
    assert (visible & ~near).float().mean() > 0.3
    assert error[visible & ~near].max() < 1e-10
    still, _ = warping_error(*paintings, torch.zeros(1, 2, 48, 64))
    assert error[visible].mean() < 0.8 * still[visible].mean()
    hidden = first.flow.isnan().any(0)
    assert not visible[hidden].any()


def test_world_coordinates_stay_where_they_are(video):
    data, samples = video
    painted = []
    for i, sample in enumerate(samples):
        intrinsics, pose = data.camera(i)
        y, x = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
        rays = torch.stack([(x - intrinsics[0, 2]) / intrinsics[0, 0], (y - intrinsics[1, 2]) / intrinsics[1, 1]])
        points = torch.cat([rays, torch.ones(1, 48, 64)]).double() * sample.depth
        painted.append((torch.einsum("ij,jhw->ihw", pose[:3, :3], points) + pose[:3, 3, None, None])[None].float())
    error, visible = warping_error(*painted, cut(samples[0], (48, 64)).flow)
    assert error[visible & (samples[0].depth > 0)].median() < 1e-5  # square metres


def test_integer_shifts_by_hand():
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(1, 3, 8, 9, generator=generator)
    following = ours.roll((1, -2), (2, 3))
    flow = torch.tensor([-2.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 8, 9)
    error, visible = warping_error(ours, following, flow)
    assert visible.tolist() == [[j >= 2 and i < 7 for j in range(9)] for i in range(8)]
    assert error[visible].max() < 1e-10
    twice, _ = warping_error(ours, following + 2, flow)
    assert torch.allclose(twice[visible], torch.tensor(3 * 4.0), atol=1e-4)


def test_flow_on_another_grid():
    flow = torch.tensor([4.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 8, 12).clone()
    flow[..., 0, 0] = math.nan
    coarse = on_grid(flow, (4, 4))
    assert coarse[0, :, 3, 3].tolist() == pytest.approx([4 * 4 / 12, -2 * 4 / 8])
    assert on_grid(flow, (8, 12)) is flow


def test_estimated_flow_finds_a_shift():
    generator = torch.Generator().manual_seed(0)
    texture = F.interpolate(torch.rand(1, 3, 12, 14, generator=generator), (48, 56), mode="bicubic").clamp(0, 1)
    frame, following = texture[..., 4:44, 4:52], texture[..., 3:43, 6:54]  # 1 down, 2 to the left
    flow = estimated_flow(frame, following)[0, :, 8:-8, 8:-8]
    assert flow.isfinite().float().mean() > 0.9
    assert torch.nanmedian(flow[0]) == pytest.approx(-2, abs=0.2)
    assert torch.nanmedian(flow[1]) == pytest.approx(1, abs=0.2)
    unrelated = torch.rand(1, 3, 40, 48, generator=generator)
    assert estimated_flow(frame, unrelated).isnan().float().mean() > 0.3


def test_the_task_measures_each_pair_of_frames(video):
    data, samples = video
    where, task = bench(data), make_task({"name": "temporal"})
    task.check(where)
    paintings = [classes_of(sample, len(data.classes)) for sample in samples]
    low = where.val.get(0).features[0].float()
    painter = Painter(F.pad(p, (0, 0, 0, 0, 0, low.shape[1] - p.shape[1])) for p in paintings)
    rows = {row["measure"]: row for row in task.rows(painter, 0, where)}
    row = rows["warping_error"]
    error, visible = warping_error(*paintings, cut(samples[0], (48, 64)).flow)
    variance = (low - low.mean((2, 3), keepdim=True)).square().sum(1).mean()
    assert (row["task"], row["image"]) == ("temporal", data.names[0])
    assert row["numerator"] == pytest.approx((error[visible].mean() / variance).item(), rel=1e-5)
    bilinear, ceiling = (values(task.rows(model, 0, where)) for model in (Bilinear(), Ceiling("encoder")))
    assert 0 < bilinear["warping_error"] != ceiling["warping_error"] > 0
    coarse = values(task.rows(Bilinear(), 0, bench(data, output=(24, 32))))
    assert coarse["warping_error"] == pytest.approx(bilinear["warping_error"], rel=0.5)
    assert {key: ceiling[key] for key in MEASURED[1:]} == pytest.approx(
        {"change_error": 0, "reference_detail": 1, "reference_cosine": 1}, abs=1e-6
    )
    assert bilinear["change_error"] > 0
    assert bilinear["reference_detail"] < bilinear["reference_cosine"] < 1


def test_a_frozen_output_is_stable_and_changes_wrongly(video):
    """By hand: the change of the encoder is missing from it."""
    data, _ = video
    where, task = bench(data), make_task({"name": "temporal", "flow": "estimated"})
    frozen = torch.randn(1, where.val.get(0).features[0].shape[1], 1, 1).expand(-1, -1, 48, 64)
    found = values(task.rows(Painter([frozen] * 2), 0, where))
    fine = [where.upsample(Bilinear(), [where.val.get(i, scale=2)])[0] for i in range(2)]
    assert found["warping_error"] == pytest.approx(0, abs=1e-6)
    assert found["change_error"] == pytest.approx((1 - F.cosine_similarity(*fine)).mean().item(), rel=1e-4)
    assert found["reference_detail"] == 0


def values(rows):
    return {row["measure"]: row["numerator"] for row in rows}


def test_videos_of_estimated_flow_and_models_with_a_state(video, own_registry):
    @core.register("remembers")
    class Remembers(Temporal):
        seen: ClassVar[list] = []

        def __init__(self, embed_dim: int):
            super().__init__()

        def forward(self, output, context, state):
            Remembers.seen.append(state)
            return output, (0 if state is None else state + 1)

    _, samples = video
    frames = [Sample(f"{v}/{i}", samples[i % 2].image) for v in "ab" for i in range(3)]
    where = bench(Listed(frames, {"a": range(3), "b": range(3, 6)}), image=(32, 32))
    task = make_task({"name": "temporal", "flow": "estimated"})
    task.check(where)
    model = core.build(["temporal=remembers", "embed_dim=8", "attention.num_heads=1", "unifier.num_basis=8"]).eval()
    rows = list(task.rows(model, 0, where))
    assert list(dict.fromkeys(row["image"] for row in rows)) == ["a/0", "a/1", "b/0", "b/1"]
    assert Remembers.seen == [None, 0, 1, None, 0, 1]  # anew for each video


@pytest.mark.parametrize(
    ("samples", "videos", "flow", "message"),
    [
        (2, None, "exact", "task=temporal needs videos, and val_data=listed has none: use data@val_data=frames"),
        (2, {"a": range(1)}, "exact", "task=temporal needs videos"),
        (2, {"a": range(2)}, "exact", "val_data=listed knows no exact flow: set task.flow=estimated"),
    ],
)
def test_data_that_do_not_move(samples, videos, flow, message):
    data = Listed([Sample(str(i), torch.rand(3, 16, 16)) for i in range(samples)], videos)
    with pytest.raises(SettingError, match=message):
        make_task({"name": "temporal", "flow": flow}).check(bench(data, image=(16, 16)))


def test_another_flow():
    with pytest.raises(SettingError, match=r"task.flow must be one of exact, estimated, got raft"):
        make_task({"name": "temporal", "flow": "raft"})


def test_a_frame_without_any_features(video):
    frames = [Sample(str(i), torch.full((3, 16, 16), 0.5)) for i in range(2)]
    where = bench(Listed(frames, {"a": range(2)}), image=(16, 16))
    with pytest.raises(EvaluationError, match="image 0: its features are the same everywhere"):
        list(make_task({"name": "temporal", "flow": "estimated"}).rows(Bilinear(), 0, where))


@pytest.fixture(scope="module")
def photos():
    generator = torch.Generator().manual_seed(0)
    coarse = [torch.rand(1, 3, 6, 7, generator=generator) for _ in range(2)]
    images = [F.interpolate(values, (72, 84), mode="bicubic").clamp(0, 1)[0] for values in coarse]
    return Listed([Sample(f"p{i}", image) for i, image in enumerate(images)])


def test_fidelity_is_that_of_the_metric(photos):
    where, task = bench(photos), make_task({"name": "fidelity", "scales": [2, 3], "view": 24, "guidance": 16})
    rows = list(task.rows(Bicubic(), 0, where))
    backbone = core.load_backbone("hog8")
    for i, name in enumerate(photos.names):
        for scale in (2, 3):
            case = fidelity_case(photos[i].image, backbone, scale, 24, 16)
            expected = fidelity(Bicubic()(case.guidance, case.features, case.output_size), case)
            found = {
                r["measure"]: r["numerator"] for r in rows if (r["task"], r["image"]) == (f"fidelity/{scale}x", name)
            }
            controls = {name for name in found if name.endswith("_blurred")}
            assert {"detail_blurred", "cosine_blurred", "error_blurred"} <= controls
            assert {name: found[name] for name in found if name not in controls} == pytest.approx(expected, abs=2e-3)


def test_fidelity_shares_its_cases_and_knows_ceilings(photos, monkeypatch):
    where, task = bench(photos), make_task({"name": "fidelity", "view": 24})
    seen, backbone = [], where.encoder.backbone
    own = backbone.features
    monkeypatch.setattr(backbone, "features", lambda image, layer: seen.append(len(image)) or own(image, layer))
    measured = {}
    for name in ("bilinear", "nearest", "encoder", "oracle_cosine", "oracle_error"):
        model = {"bilinear": Bilinear(), "nearest": Nearest()}.get(name) or Ceiling(name)
        measured[name] = [(r["measure"], r["numerator"]) for r in task.rows(model, 0, where)]
    # low and crops of two images, once, the fields of a chessboard after one another; then the ceiling's whole images
    assert seen == [1, 5, 4] * 2 + [1] * 2
    cosine, error = ({n: dict(rows)[m] for n, rows in measured.items()} for m in ("cosine", "error"))
    assert cosine["oracle_cosine"] > max(cosine["bilinear"], cosine["nearest"])
    assert error["oracle_error"] < min(error["bilinear"], error["nearest"])
    assert cosine["encoder"] != cosine["bilinear"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": []}, "task.scales must be different whole numbers from 2"),
        ({"scales": [2, 2]}, "task.scales must be different whole numbers from 2"),
        ({"scales": [1]}, "task.scales must be different whole numbers from 2"),
        ({"view": 0}, "task.view must be at least 1"),
        ({"guidance": 1000}, "task.guidance null or up to 448"),
    ],
)
def test_fidelity_settings_that_make_no_sense(settings, message):
    with pytest.raises(SettingError, match=message):
        make_task({"name": "fidelity", **settings})


def test_fidelity_that_is_not_defined(photos):
    class Broken(nn.Module):
        def forward(self, image, features, output_size):
            return torch.full((*features.shape[:2], *output_size), math.nan)

    task = make_task({"name": "fidelity", "view": 24})
    with pytest.raises(EvaluationError, match=r"image p0 at 2x: \d+ of \d+ values .* are not finite"):
        list(task.rows(Broken(), 0, bench(photos)))
    with pytest.raises(SettingError, match=r"task.view=12: backbone=hog8 needs at least 16 pixels"):
        make_task({"name": "fidelity", "view": 12}).check(bench(photos))
    blank = Listed([Sample("grey", torch.full((3, 48, 48), 0.5))])
    with pytest.raises(EvaluationError, match=r"image grey at 2x: .*the same everywhere"):
        list(task.rows(Bilinear(), 0, bench(blank)))
