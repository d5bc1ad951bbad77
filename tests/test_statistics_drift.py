"""The causal normaliser against its definition; what it removes, and what it leaves alone."""

import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import core
from core import Context
from core.points import pixel_centres
from extensions.statistics_drift import MAX_GAIN, DriftState, StatisticsDrift

WIDTH = 16


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(filler: StatisticsDrift, frames: list[Tensor], state=None, **told) -> tuple[list[Tensor], DriftState]:
    results = []
    for output in frames:
        size = tuple(output.shape[-2:])
        context = Context(output.new_zeros(len(output), 3, 8, 8), output, pixel_centres(size, like=output))
        result, state = filler(output, context, state.before_next(**told) if told and state else state)
        results.append(result)
    return results, state


def drifting(length: int = 5, channels: int = 4, size: tuple[int, int] = (6, 9)) -> tuple[Tensor, list[Tensor]]:
    """A texture at rest, and frames of it in which each channel is shifted and scaled at random."""
    truth = noise(1, channels, *size)
    frames = []
    for i in range(length):
        shift, scale = (
            0.1 * noise(1, channels, 1, 1, seed=2 * i + 1),
            1 + 0.1 * noise(1, channels, 1, 1, seed=2 * i + 2),
        )
        frames.append(truth * scale + shift)
    return truth, frames


def test_running_statistics_as_defined():
    """By loops over frames and channels."""
    _, frames = drifting()
    outputs, state = run(StatisticsDrift(WIDTH, strength=0.7), frames)
    for c in range(4):
        mean = deviation = None
        for frame, output in zip(frames, outputs, strict=True):
            values = frame[0, c].flatten().tolist()
            now = math.fsum(values) / len(values)
            spread = math.sqrt(math.fsum((v - now) ** 2 for v in values) / len(values))
            mean = now if mean is None else 0.3 * now + 0.7 * mean
            deviation = spread if deviation is None else 0.3 * spread + 0.7 * deviation
            expected = torch.tensor([(v - now) * deviation / spread + mean for v in values], dtype=torch.float64)
            torch.testing.assert_close(output[0, c].flatten(), expected, rtol=1e-9, atol=1e-9)
        assert state.mean[0, c].item() == pytest.approx(mean)
        assert state.deviation[0, c].item() == pytest.approx(deviation)


def test_drift_is_removed_and_noise_is_not():
    _, frames = drifting(20)
    outputs, _ = run(StatisticsDrift(WIDTH, strength=0.9), frames)
    flicker = lambda x: sum((b - a).square().mean().item() for a, b in pairwise(x))  # noqa: E731
    assert flicker(outputs) < 0.03 * flicker(frames)
    truth = noise(1, 4, 40, 50)
    noisy = [truth + 0.3 * noise(1, 4, 40, 50, seed=i) for i in range(1, 10)]
    outputs, _ = run(StatisticsDrift(WIDTH, strength=0.9), noisy)
    assert flicker(outputs) == pytest.approx(flicker(noisy), rel=0.05)


def test_strength_0_is_frame_by_frame_bit_for_bit():
    chosen = [f"embed_dim={WIDTH}", "temporal=statistics_drift", "temporal.strength=0"]
    model, baseline = core.build(chosen).eval(), core.build(chosen[:1]).eval()
    baseline.load_state_dict(model.state_dict())
    state = None
    with torch.no_grad():
        for seed in range(3):
            image, features = noise(2, 3, 14, 18).float(), noise(2, 7, 4, 5, seed=seed).float()
            output, state = model(image, features, state=state, return_state=True)
            assert torch.equal(output, baseline(image, features))
    assert state.message == "strength is 0: frame by frame"


def test_follows_shift_and_scale_of_each_channel():
    _, frames = drifting()
    scale, shift = torch.tensor([2.0, 50, 0.1, 1]).view(4, 1, 1), torch.tensor([0.0, 9, -3, 100]).view(4, 1, 1)
    plain, _ = run(StatisticsDrift(WIDTH, cut_distance=0), frames)
    moved, _ = run(StatisticsDrift(WIDTH, cut_distance=0), [frame * scale + shift for frame in frames])
    for a, b in zip(plain, moved, strict=True):
        torch.testing.assert_close(b, a * scale + shift)


def test_a_nearly_constant_channel_does_not_become_noise():
    first = noise(1, 2, 6, 9)
    second = first * torch.tensor([1, 1e-9]).view(2, 1, 1)
    third = first * torch.tensor([1, 0]).view(2, 1, 1)
    (_, nearly, constant), _ = run(StatisticsDrift(WIDTH), [first, second, third])
    assert nearly[:, 1].std() <= MAX_GAIN * second[:, 1].std() * 1.001
    assert constant.isfinite().all()
    assert constant[:, 1].std() == 0


def test_a_scene_cut_begins_again_in_its_image_only():
    first, second = noise(2, 4, 6, 9), noise(2, 4, 6, 9)
    second[0] += 0.1
    second[1] += 3
    (_, output), state = run(StatisticsDrift(WIDTH, strength=0.5), [first, second])
    assert torch.equal(output[1], second[1])
    torch.testing.assert_close(output[0], second[0] - 0.05)
    assert state.message.startswith("scene cut in image 1 of the batch: its mean moved by ")
    assert "more than cut_distance=0.35, the video begins again" in state.message
    torch.testing.assert_close(state.mean[1], second[1].mean((1, 2), keepdim=True))


@pytest.mark.parametrize("cut_distance", [0, 0.35])
def test_one_bad_frame_does_not_spoil_the_rest(cut_distance):
    _, frames = drifting()
    frames[1][0, 0, 2, 2] = torch.nan
    outputs, state = run(StatisticsDrift(WIDTH, cut_distance=cut_distance), frames)
    assert all(output.isfinite().all() for output in outputs[2:])
    assert not torch.equal(outputs[4], frames[4])
    assert state.message == ""


def test_another_resolution_goes_on():
    _, frames = drifting(2)
    finer = frames[1].repeat_interleave(2, -1)
    (_, expected), _ = run(StatisticsDrift(WIDTH), frames)
    (_, output), state = run(StatisticsDrift(WIDTH), [frames[0], finer])
    torch.testing.assert_close(output, expected.repeat_interleave(2, -1))
    assert state.message == ""


def test_missing_frames_and_other_rates_count_as_time():
    _, frames = drifting(2)
    for gap in (0.5, 3):
        (_, output), state = run(StatisticsDrift(WIDTH, strength=0.8), frames, gap=gap)
        mean = torch.lerp(frames[1].mean((2, 3)), frames[0].mean((2, 3)), 0.8**gap)
        torch.testing.assert_close(output.mean((2, 3)), mean)
        assert state.message == f"a gap of {gap:g} frames: the strength is {0.8**gap:.3g}, not 0.8"
    (_, output), state = run(StatisticsDrift(WIDTH, max_gap=2), frames, gap=3)
    assert torch.equal(output, frames[1])
    assert state.message == "a gap of 3 frames, more than max_gap=2: the video begins again"


def test_a_stopped_video_goes_on_and_the_state_does_not_grow(tmp_path):
    _, frames = drifting(200)
    whole, state = run(StatisticsDrift(WIDTH), frames)
    first, stored = run(StatisticsDrift(WIDTH), frames[:80])
    save_file(stored.tensors(), tmp_path / "state.safetensors")
    last, _ = run(
        StatisticsDrift(WIDTH), frames[80:], DriftState.from_tensors(load_file(tmp_path / "state.safetensors"))
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, first + last, strict=True))
    for kept in (state, stored):
        assert {name: tensor.untyped_storage().nbytes() for name, tensor in kept.tensors().items()} == {
            "mean": 4 * 8,
            "deviation": 4 * 8,
        }


@torch.no_grad()
def test_pictures_show_the_drift_that_was_taken_out():
    filler = StatisticsDrift(WIDTH, strength=0.9, cut_distance=0)
    first = noise(1, 3, 6, 9)
    run(filler, [first])
    assert filler.pictures() == {}
    second = first + torch.tensor([0.0, 2, -0.2]).view(3, 1, 1)
    run(filler, [first, second])
    [shown] = filler.pictures().values()
    assert shown.shape == (3, 16, 3)
    assert shown[:, 0, 0].tolist() == [1, 0, 0]  # up by more than half a deviation: red
    assert shown[2, 0, 1] == 1 > shown[0, 0, 1] > 0  # down by less: bluish
    assert shown[:, 0, 2].min() > 0.99


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (torch.zeros(1, 4, 1, 1), TypeError, "state must be what the call for the previous .* got Tensor"),
        (
            DriftState(mean=torch.zeros(1, 5, 1, 1), deviation=torch.ones(1, 5, 1, 1)),
            ValueError,
            "state is of 1 videos with 5 feature channels, but this frame has 1 and 4: pass state=None to begin",
        ),
        (
            DriftState(mean=torch.zeros(1, 4, 1, 1, device="meta"), deviation=torch.ones(1, 4, 1, 1, device="meta")),
            ValueError,
            r"state is on meta but the frame is on cpu: move its tensors\(\)",
        ),
    ],
)
def test_a_state_of_another_video(state, error, message):
    with pytest.raises(error, match=message):
        run(StatisticsDrift(WIDTH), [torch.zeros(1, 4, 6, 9)], state)


def test_refusals():
    state = DriftState(mean=torch.zeros(1, 4, 1, 1), deviation=torch.ones(1, 4, 1, 1))
    with pytest.raises(ValueError, match="gap must be positive and finite, in frames since the previous one, got -1"):
        state.before_next(gap=-1)
    with pytest.raises(ValueError, match="a saved DriftState has the tensors mean, deviation, got output"):
        DriftState.from_tensors({"output": torch.zeros(1)})
    for setting, message in {
        "strength=1": r"strength must be from 0 \(frame by frame\) to below 1 \(frozen\), got 1",
        "cut_distance=-1": "cut_distance must not be negative, got -1.0; 0: no frame is a scene cut",
        "max_gap=0.5": "max_gap must be at least 1 frame, got 0.5",
    }.items():
        with pytest.raises(ValueError, match=message):
            core.build([f"embed_dim={WIDTH}", "temporal=statistics_drift", f"temporal.{setting}"])
