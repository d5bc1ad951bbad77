"""The demo page's pictures and models, without its widgets."""

import numpy as np
import pytest
import torch

import core
from core import Attention, register
from experiments.data.video_files import write_video
from experiments.page import clips, engine, models, uploads
from experiments.page.models import Encoders, Variant
from experiments.page.uploads import Refused, Uploads
from experiments.settings import SettingError
from experiments.upsampling.image import UnreadableImage

POINT = (0.3, 0.6)


@pytest.fixture(scope="module")
def encoder():
    return Encoders(None).get("hog8")


@pytest.fixture(scope="module")
def of(encoder):
    return engine.encoded(uploads.example("coffee"), encoder, 72)


@pytest.fixture(scope="module")
def outputs(of):
    chosen = {"A": Variant("bundled"), "B": Variant("bundled", (("attention", "global", ()),))}
    return {name: engine.upsampled(of, models.build(variant)[0], None) for name, variant in chosen.items()}


# Pictures


def test_features_of_all_variants_have_common_colours(of, outputs):
    pictures = engine.feature_pictures(of, outputs)
    assert {name: values.shape for name, values in pictures.items()} == {
        "image": (48, 72, 3),
        "low-res features": (6, 9, 3),
        "bilinear": (48, 72, 3),
        "A": (48, 72, 3),
        "B": (48, 72, 3),
    }
    same = engine.feature_pictures(of, {"A": outputs["A"], "again": outputs["A"]})
    np.testing.assert_array_equal(same["A"], same["again"])
    assert np.abs(pictures["A"] - pictures["B"]).max() > 0.05


def test_similarity_is_brightest_where_it_was_asked_and_in_a_common_range(of, outputs):
    pictures, (low, high) = engine.similarity_pictures(of, outputs, POINT)
    assert list(pictures) == ["before: 6 x 9", "A", "B"]
    assert pictures["before: 6 x 9"].shape == (6, 9, 3)
    assert pictures["A"].shape == (48, 72, 3)
    assert (low < 0.5, high) == (True, 1)
    for picture in pictures.values():
        rows, columns = picture.shape[:2]
        brightness = picture.sum(2)
        assert brightness[int(0.3 * rows), int(0.6 * columns)] > 2.6  # the end of the scale
    assert not np.array_equal(pictures["A"], engine.similarity_pictures(of, outputs, (0.9, 0.1))[0]["A"])


@pytest.mark.parametrize("point", [(0.0, 0.0), (1.0, 1.0)])
def test_the_corners_of_a_picture_are_points_too(of, outputs, point):
    assert engine.similarity_pictures(of, outputs, point)
    assert engine.attention_maps(outputs, point)


def test_attention_lights_cells_in_its_window_only(of, outputs):
    maps = engine.attention_maps(outputs, POINT)
    pictures = engine.attention_pictures(of, maps, opacity=1)
    (narrow, wide) = pictures
    assert narrow.startswith("A (up to 0.")
    assert wide.startswith("B (up to 0.")
    coloured = {name[0]: np.ptp(picture, axis=2) > 0.05 for name, picture in pictures.items()}
    assert not coloured["A"][:, :27].any()  # the window is 0.5 to 0.7 of the width, to whole cells from 32 on
    assert coloured["A"][:, 32:56].any()
    assert coloured["B"][:, :27].any()
    white = (pictures[narrow] == 1).all(2)
    assert white[:, 32].any()  # the frame
    assert engine.attention_pictures(of, maps, opacity=0)[narrow][0, 0] == pytest.approx(
        of.rgb[0, :, 0, 0].mean().item() * 0.6, abs=0.01
    )


def test_attention_without_one_weight_per_cell_is_left_out(of, outputs):
    variant = Variant("bundled", (("attention", "naf", (("value_groups", True),)),))
    without = engine.upsampled(of, models.build(variant)[0], None)
    assert list(engine.attention_maps(outputs | {"N": without}, POINT)) == ["A", "B"]


@pytest.mark.parametrize("measure", engine.MEASURES)
def test_uncertainty_is_shown_in_a_common_range(outputs, measure):
    pictures, (low, high) = engine.uncertainty_pictures(outputs, measure)
    assert list(pictures) == ["A", "B"]
    assert 0 <= low < high
    values = getattr(outputs["A"].uncertainty, measure)[0, 0].numpy()
    bright = engine.uncertainty_pictures(outputs, measure, opacity=1)[0]["A"].sum(2)
    assert np.corrcoef(values.ravel(), bright.ravel())[0, 1] > 0.8
    alone = {"A": engine.Upsampled(outputs["A"].model, outputs["A"].encoded, outputs["A"].output, None, "why")}
    assert engine.uncertainty_pictures(alone, measure) == ({}, None)


def test_an_output_of_another_size(of):
    small = engine.upsampled(of, models.build(Variant("bundled"))[0], 36)
    assert small.output.shape[-2:] == (24, 36)
    with torch.inference_mode():
        expected = core.load("bundled")(of.image, of.features, (24, 36))
    torch.testing.assert_close(small.output, expected, atol=1e-4, rtol=1e-4)


def test_an_output_that_is_too_large_is_refused_with_the_largest_that_is_not(of, monkeypatch):
    with pytest.raises(SettingError, match=r"output of 5333 x 8000 with 87 channels is too large.*at most 1521"):
        engine.checked_size(of, 8000)
    assert engine.checked_size(of, 1521) == (1014, 1521)
    with pytest.raises(SettingError, match="at most 1521"):
        engine.checked_size(of, 1523)
    with pytest.raises(SettingError, match="the output size must be"):
        engine.checked_size(of, -3)


def test_an_image_that_is_too_small_for_the_encoder_is_refused_by_its_name(encoder):
    with pytest.raises(UnreadableImage, match=r"stamp\.png: 12 x 72 pixels are too few"):
        engine.encoded(torch.zeros(1, 3, 12, 72), encoder, 72, "stamp.png")


# Models


def test_the_model_is_the_checkpoints_with_what_was_chosen():
    model, new = models.build(Variant("bundled"))
    assert (new, models.untrained(new)) == ((), "")
    assert models.label(Variant("bundled")) == "bundled"
    variant = Variant(
        "bundled_released",
        (
            ("unifier", "learned_basis", (("ordering", "released"),)),
            ("attention", "bilateral_prior", (("temperature", 2.0), ("sigma_space", 0.7))),
        ),
    )
    model, new = models.build(variant)
    assert model.config["unifier"]["ordering"] == "released"
    assert (model.config["attention"]["name"], model.attention.temperature) == ("bilateral_prior", 2.0)
    assert models.label(variant) == "attention=bilateral_prior, temperature=2.0"
    assert models.untrained(new).startswith("The weights of attention are not trained: 3 tensors")
    trained = core.load("bundled_released").state_dict()
    torch.testing.assert_close(model.state_dict()["attention.conv.weight"], trained["attention.conv.weight"])


def test_a_new_filler_is_offered_with_its_settings(own_registry):
    from enum import Enum

    class Taste(Enum):
        sweet = 1
        sour = 2

    @register("fresh")
    class Fresh(Attention):
        """Fresh from a notebook; see the module's docstring."""

        changeable = ("steps",)

        def __init__(
            self,
            embed_dim: int,
            amount: float = 0.5,
            on: bool = True,
            taste: Taste = Taste.sour,
            steps: int = 3,
            hidden_dim: int = 32,
            file: str = "",
        ):
            super().__init__()

        def forward(self, query, key, value):
            return value

    assert "fresh" in models.offered("attention")
    assert models.purpose("attention", "fresh") == "Fresh from a notebook"
    found = {key: default for key, (_, default) in models.settings_of("attention", "fresh").items()}
    assert found == {"amount": 0.5, "on": True, "taste": "sour", "steps": 3}  # no sizes of weights, no files


def test_encoders_that_need_no_download_are_offered_by_default():
    assert Encoders(None).names == ["embedded", "hog8", "hog16", "daisy8", "daisy16"]
    given = Encoders([{"name": "vit_tiny16", "weights": "random"}])
    assert given.get("vit_tiny16") is given.get("vit_tiny16")


@pytest.mark.parametrize(
    ("nodes", "message"),
    [([], "backbones is empty"), (["hog8"], "each is"), ([{"name": "hog8"}, {"name": "hog8"}], "names hog8 twice")],
    ids=str,
)
def test_encoders_that_cannot_be_offered_are_refused(nodes, message):
    with pytest.raises(SettingError, match=message):
        Encoders(nodes)


# Files


def jpeg(size=(64, 48)):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", size, "orange").save(file, "jpeg")
    return file.getvalue()


def test_an_image_is_taken_whatever_it_is_called(tmp_path):
    let_in = Uploads(tmp_path)
    assert let_in.image("../../etc/passwd", jpeg()).shape == (1, 3, 48, 64)
    assert [path.parent for path in tmp_path.rglob("*") if path.is_file()] == [let_in.folder]
    let_in.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "photo.png: not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "photo.png: not an image"),
        (b"#!/bin/sh\ntouch ran\n", "photo.png: not an image"),
        (jpeg()[:200], "photo.png: "),
        (jpeg((8000, 5001)), "photo.png: 8000 x 5001 pixels are too many, at most 40 million are taken: make it small"),
        (bytes(uploads.MAX_BYTES + 1), "photo.png has 20 MB; at most 20 MB are taken"),
    ],
    ids=["empty", "postscript", "script", "damaged", "many pixels", "many bytes"],
)
def test_what_is_no_image_is_refused_by_the_name_of_the_file(tmp_path, data, message):
    with pytest.raises(Refused) as refused:
        Uploads(tmp_path).image("photo.png", data)
    assert str(refused.value).startswith(message)
    assert str(tmp_path) not in str(refused.value)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_video(path, (Image.new("RGB", (96, 64), (10 * i, 90, 200 - 10 * i)) for i in range(6)), 10)
    return path.read_bytes()


def test_the_first_frames_of_a_video_are_taken(tmp_path, film):
    frames, remark = Uploads(tmp_path).video("holiday.mp4", film, 4, 48)
    assert [frame.image.shape for frame in frames] == [(1, 3, 32, 48)] * 4
    assert remark == "Only the first 4 frames of holiday.mp4 are shown."
    frames, remark = Uploads(tmp_path).video("holiday.mp4", film, 9, 48)
    assert (len(frames), remark) == (6, "")


def test_what_is_no_video_is_refused_by_the_name_of_the_file(tmp_path, film, monkeypatch):
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    with pytest.raises(Refused, match=r"list.mp4 is no MP4, WebM, Matroska or AVI video: convert it"):
        Uploads(tmp_path).video("list.mp4", playlist, 4, 48)
    with pytest.raises(Refused, match=r"^half\.mp4 ") as refused:
        Uploads(tmp_path).video("half.mp4", film[:300], 4, 48)
    assert str(tmp_path) not in str(refused.value)
    monkeypatch.setattr(uploads, "MAX_PIXELS", 6000)
    with pytest.raises(Refused, match=r"big\.mp4: frames of 64 x 96 pixels are too large"):
        Uploads(tmp_path).video("big.mp4", film, 4, 48)


# Clips


@pytest.fixture(scope="module")
def clip():
    return uploads.pan("coffee", 24, 64)[:3]


def test_the_camera_moves_and_repeats_itself(clip):
    assert [frame.image.shape for frame in clip] == [(1, 3, 64, 64)] * 3
    assert not torch.equal(clip[0].image, clip[1].image)
    assert torch.equal(uploads.pan("coffee", 24, 64)[2].image, clip[2].image)


@pytest.mark.parametrize("temporal", models.offered("temporal"))
def test_a_clip_is_upsampled_with_every_temporal_filler(clip, encoder, temporal):
    told = []
    model, _ = models.build(Variant("bundled", (("temporal", temporal, ()),)))
    pictures, changes = clips.clip_pictures(clip, encoder, model, told.append)
    assert told == [1, 2, 3]
    assert [list(one) for one in pictures] == [["image", clips.ALONE, clips.TOGETHER]] * 3
    np.testing.assert_array_equal(pictures[0][clips.ALONE], pictures[0][clips.TOGETHER])
    assert changes[clips.ALONE] > 0
    if temporal == "none":
        assert changes[clips.ALONE] == changes[clips.TOGETHER]
    assert not model.temporal._forward_pre_hooks  # nothing stays on the model


def test_frame_by_frame_is_what_the_model_without_the_filler_gives(clip, encoder):
    model, _ = models.build(Variant("bundled", (("temporal", "temporal_consistency", ()),)))
    plain, _ = models.build(Variant("bundled"))
    pictures, changes = clips.clip_pictures(clip, encoder, model)
    expected, alone = clips.clip_pictures(clip, encoder, plain)
    assert changes[clips.ALONE] == pytest.approx(alone[clips.ALONE], rel=1e-3)
    assert changes[clips.TOGETHER] < 0.95 * changes[clips.ALONE]
    np.testing.assert_allclose(pictures[2][clips.ALONE], expected[2][clips.TOGETHER], atol=1e-3)
