"""Videos through the upsample command: a state from frame to frame, lasting colours, resumed where it stopped."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import load_file, save_file

import core
from core.passthrough import NoTemporal
from core.video_state import VideoState
from experiments.data.image_files import read
from experiments.data.video_files import UnreadableVideo, open_video
from experiments.settings import SettingError
from experiments.upsampling import frames as module
from experiments.upsampling.upsample import upsample

ROOT = Path(__file__).parent.parent
QUICK = ("tracking.enabled=false", "backbone=hog8", "checkpoint=null", "video=clip", "output_size=20", "save_every=2")
MIXED = ("temporal=statistics_drift", "temporal.strength=0.5")


def config(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("upsample", [*QUICK, *overrides])


@pytest.fixture(autouse=True)
def clip(tmp_path, monkeypatch):
    """A folder of seven frames, of which number 4 is missing."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "clip"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    for i in (0, 1, 2, 3, 5, 6, 7):
        Image.fromarray(np.ascontiguousarray(noise[:, 3 * i : 3 * i + 48])).save(folder / f"{i}.png")
    return folder


def features(out_dir):
    return {path.stem: load_file(path)["features"] for path in sorted(Path(out_dir, "clip").glob("??????.safetensors"))}


def stopped_at(frame, monkeypatch, *overrides):
    """Runs until the frame, and is killed there."""

    def killed(image, name, *rest):
        if name.endswith(f"{frame:06d}"):
            raise KeyboardInterrupt
        return module_upsample_one(image, name, *rest)

    module_upsample_one = module.upsample_one
    with monkeypatch.context() as patch:
        patch.setattr(module, "upsample_one", killed)
        with pytest.raises(KeyboardInterrupt):
            upsample(config(*overrides))


def test_every_frame_is_upsampled_and_shown(clip):
    summary = upsample(config("features=safetensors"))
    assert [done.name for done in summary.done] == [f"clip/{i:06d}" for i in range(7)]
    found = features("outputs/upsample")
    backbone, model = core.load_backbone("hog8"), core.build().eval()
    for i, file in enumerate(open_video(clip).files):
        rgb = read(file)
        with torch.no_grad():
            expected = model(core.imagenet_normalize(rgb), backbone(rgb), (17, 20))[0]
        torch.testing.assert_close(found[f"{i:06d}"], expected, atol=1e-4, rtol=1e-4)
    film = open_video("outputs/upsample/clip.mp4")
    assert (film.count, film.rate) == (7, 25)
    assert list(summary.skipped.values()) == ["1 frames are missing between the 7 of clip"]
    assert summary.exit_code == 1


def test_equal_frames_have_equal_colours_whatever_the_others_are(clip, monkeypatch):
    Image.open(clip / "0.png").save(clip / "7.png")
    calls = []
    fit = module.fit_colours
    monkeypatch.setattr(module, "fit_colours", lambda columns: calls.append(len(columns)) or fit(columns))
    upsample(config())
    assert calls == [7]
    first, last = (np.asarray(Image.open(f"outputs/upsample/clip/{i:06d}.png")) for i in (0, 6))
    np.testing.assert_array_equal(first, last)


@pytest.mark.parametrize("overrides", [(), MIXED], ids=["frame_by_frame", "with_a_state"])
@pytest.mark.parametrize("frame", [1, 5])
def test_a_video_that_was_killed_goes_on_with_the_same_frames(frame, overrides, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    settings = ("features=safetensors", *overrides)
    upsample(config(*settings, "out_dir=whole"))
    stopped_at(frame, monkeypatch, *settings)
    assert not Path("outputs/upsample/clip.mp4").exists()
    caplog.clear()
    summary = upsample(config(*settings))
    kept = frame // 2 * 2  # a bookmark every two frames
    assert [done.name for done in summary.done] == [f"clip/{i:06d}" for i in range(kept, 7)]
    assert ("clip goes on with frame" in caplog.text) == bool(kept)
    whole, resumed = features("whole"), features("outputs/upsample")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert open_video("outputs/upsample/clip.mp4").count == 7
    assert upsample(config(*settings)).done == []  # nothing is left to do


def test_the_state_is_told_of_missing_frames(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    gaps = []
    before_next = VideoState.before_next
    monkeypatch.setattr(VideoState, "before_next", lambda state, gap: gaps.append(gap) or before_next(state, gap))
    upsample(config(*MIXED))
    assert gaps == [1, 1, 1, 2, 1, 1]
    assert "a gap of 2 frames: the strength is 0.25, not 0.5" in caplog.text


def test_a_frame_that_cannot_be_encoded_leaves_a_gap(clip, monkeypatch):
    Image.new("RGB", (8, 8)).save(clip / "2.png")
    gaps = []
    before_next = VideoState.before_next
    monkeypatch.setattr(VideoState, "before_next", lambda state, gap: gaps.append(gap) or before_next(state, gap))
    summary = upsample(config(*MIXED))
    assert gaps == [1, 2, 2, 1, 1]
    assert "frame 2 of clip: 8 x 8 pixels are too few" in summary.skipped["clip/000002"]


def test_other_settings_begin_again_and_leave_no_old_frame(monkeypatch, caplog):
    stopped_at(5, monkeypatch)
    (clip_folder := Path("outputs/upsample/clip")).joinpath("000099.png").write_text("of a longer video")
    clip_folder.joinpath("notes.txt").write_text("the user's")
    summary = upsample(config("output_size=24"))
    assert len(summary.done) == 7
    assert "made with other settings: the video begins again" in caplog.text
    assert not clip_folder.joinpath("000099.png").exists()
    assert clip_folder.joinpath("notes.txt").exists()
    clip_folder.joinpath("bookmark.safetensors").write_text("damaged")
    assert len(upsample(config("output_size=24")).done) == 7
    assert "bookmark.safetensors cannot be read" in caplog.text


def test_a_state_that_cannot_be_saved_begins_again(monkeypatch, own_registry):
    @core.register("counts")
    class Counts(core.Temporal):
        def __init__(self, embed_dim: int):
            super().__init__()

        def forward(self, output, context, state):
            return output, (state or 0) + 1

    stopped_at(5, monkeypatch, "temporal=counts")
    assert not Path("outputs/upsample/clip/bookmark.safetensors").exists()
    assert len(upsample(config("temporal=counts")).done) == 7
    assert NoTemporal.state_type is None


def test_frames_of_another_size_begin_a_new_video(clip, caplog):
    caplog.set_level(logging.INFO)
    for i in (5, 6, 7):
        Image.open(clip / f"{i}.png").resize((40, 40)).save(clip / f"{i}.png")
    summary = upsample(config(*MIXED, "features=safetensors"))
    assert "the frames have another size from here on: a new video begins" in caplog.text
    assert {tuple(x.shape[-2:]) for x in features("outputs/upsample").values()} == {(17, 20), (20, 20)}
    assert len(summary.done) == open_video("outputs/upsample/clip.mp4").count == 7


def test_a_bookmark_of_another_filler_is_not_taken(monkeypatch):
    stopped_at(5, monkeypatch, *MIXED)
    path = Path("outputs/upsample/clip/bookmark.safetensors")
    save_file({"other": torch.zeros(1)}, path, {"frame": "4", "made_with": "another"})
    assert len(upsample(config(*MIXED)).done) == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("images=clip", "images=clip and video=clip are both given: leave out one"),
        ("fps=0", "fps must be null or a number of frames per second"),
        ("save_every=0", "save_every must be a whole number from 1 up, got 0"),
    ],
)
def test_settings_that_cannot_work(override, message):
    with pytest.raises(SettingError, match=message):
        upsample(config(override))


def test_no_video(clip):
    with pytest.raises(UnreadableVideo, match="there is no video absent"):
        upsample(config("video=absent.mp4"))
    for path in clip.iterdir():
        Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(UnreadableVideo, match="refuses all frames of clip: frame 6 of clip: 8 x 8 pixels are too few"):
        upsample(config())
