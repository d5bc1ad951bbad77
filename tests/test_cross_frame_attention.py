"""Attention over the previous frame's features, against a loop from the definition; its gate, states and refusals."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import core
from core import Batch, Clip, Context
from core.points import pixel_centres, sample
from extensions.cross_frame_attention import CrossFrameAttention, FeatureState

WIDTH = 16


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def opened(gate: float = 0.8, **settings) -> CrossFrameAttention:
    filler = CrossFrameAttention(WIDTH, **settings).double().eval()
    with torch.no_grad():
        filler.gate.fill_(gate)
    return filler


def run(filler: CrossFrameAttention, frames: list[tuple[Tensor, Tensor]], state=None, **told):
    """Outputs of (features, output) frames in order, and the state."""
    results = []
    for features, output in frames:
        coords = pixel_centres(tuple(output.shape[-2:]), like=output)
        context = Context(output.new_zeros(len(output), 3, 8, 8), features, coords)
        result, state = filler(output, context, state.before_next(**told) if told and state else state)
        results.append(result)
    return results, state


def frames(length: int = 2, channels: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(noise(2, channels, 3, 4, seed=2 * i), noise(2, channels, 5, 7, seed=2 * i + 1)) for i in range(length)]


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_mixes_as_defined(radius):
    (before, first), (features, output) = frames()
    with torch.no_grad():
        (_, mixed), state = run(
            opened(0.8, strength=0.7, radius=radius), [(before, first), (features, output)], gap=2.0
        )
    reach, largest = range(-radius, radius + 1), 0.7**2 * math.tanh(0.8)
    for n in range(2):
        mean = output[n].mean((1, 2))
        for i in range(5):
            for j in range(7):
                own, scores, seen = output[n, :, i, j], [10 * 0.5], []
                for down in reach:
                    for right in reach:
                        point = torch.tensor(
                            [[(i + 0.5) / 5 + down / 3, (j + 0.5) / 7 + right / 4]], dtype=torch.float64
                        )
                        there = sample(before[n : n + 1], point)[0, 0]
                        a, b = own - mean, there - mean
                        scores.append(10 * (a @ b / (a.norm() * b.norm())).item())
                        seen.append(there)
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)[1:]
                change = sum(weight * (there - own) for weight, there in zip(weights, seen, strict=True))
                torch.testing.assert_close(mixed[n, :, i, j], own + largest * change, rtol=0, atol=1e-5)
    assert state.message == "a gap of 2 frames: the strength is 0.49, not 0.7"


@pytest.mark.parametrize("settings", [[], ["temporal.strength=0"]], ids=["closed", "strength 0"])
def test_the_closed_gate_is_frame_by_frame_bit_for_bit(settings):
    model, baseline = (
        core.build([f"embed_dim={WIDTH}", *more]).eval() for more in (["temporal=cross_frame_attention", *settings], [])
    )
    baseline.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("temporal")})
    state = None
    with torch.no_grad():
        for seed in range(3):
            image, features = noise(2, 3, 14, 18).float(), noise(2, 7, 4, 5, seed=seed).float()
            output, state = model(image, features, state=state, return_state=True)
            assert torch.equal(output, baseline(image, features))


@torch.no_grad()
def test_takes_over_what_resembles_it_from_a_neighbouring_cell():
    """Everything moves by one cell: what left its place is found next to it, and only within reach."""
    before = 3 * noise(1, 12, 6, 8)
    here = before.roll(1, -1)
    output = here + 0.3 * noise(1, 12, 6, 8, seed=1)
    left = {}
    for radius in (0, 1):
        (_, mixed), _ = run(opened(3.0, radius=radius), [(before, before), (here, output)])
        left[radius] = ((mixed - here)[..., 1:].square().mean() / (output - here)[..., 1:].square().mean()).item()
    assert left[1] < 0.05
    assert left[0] > 0.5


@torch.no_grad()
def test_attends_to_nothing_after_a_cut():
    filler, (first, second) = (
        opened(),
        [(noise(1, 200, 3, 4, seed=i), noise(1, 200, 5, 7, seed=9 + i)) for i in range(2)],
    )
    with torch.no_grad():
        filler.scale.fill_(30.0)
    (_, mixed), _ = run(filler, [first, second])
    assert (mixed - second[1]).abs().max() < 0.01
    [shown] = filler.pictures().values()
    assert shown.shape == (3, 5, 7)
    assert shown.max() < 0.01
    run(filler, [first])
    assert filler.pictures() == {}


def test_follows_shift_and_scale_of_the_features():
    given = frames()
    with torch.no_grad():
        (_, plain), _ = run(opened(), given)
        (_, moved), _ = run(opened(), [(100 * a + 7, 100 * b + 7) for a, b in given])
    torch.testing.assert_close(moved, 100 * plain + 7, rtol=1e-5, atol=1e-3)
    assert (plain - given[1][1]).abs().max() > 0.1


def test_a_stopped_video_goes_on_and_the_state_does_not_grow(tmp_path):
    given = frames(6)
    with torch.no_grad():
        whole, state = run(opened(), given)
        first, stored = run(opened(), given[:3])
        save_file(stored.tensors(), tmp_path / "state.safetensors")
        last, _ = run(opened(), given[3:], FeatureState.from_tensors(load_file(tmp_path / "state.safetensors")))
    assert all(torch.equal(a, b) for a, b in zip(whole, first + last, strict=True))
    assert state.features.untyped_storage().nbytes() == given[0][0].untyped_storage().nbytes()


def test_features_that_the_caller_overwrites_stay_in_the_state():
    given = frames()
    with torch.no_grad():
        (_, expected), _ = run(opened(), given)
        _, state = run(opened(), given[:1])
        given[0][0].zero_()
        [mixed], _ = run(opened(), given[1:], state)
    assert torch.equal(mixed, expected)


def test_one_bad_frame_does_not_spoil_the_rest():
    given = frames(3)
    given[1][0][:, :, 1, 1] = torch.nan
    with torch.no_grad():
        outputs, _ = run(opened(), given)
    assert outputs[2].isfinite().all()


def clip(noisy: float, changing: float) -> Clip:
    """A still texture: the features have independent noise, or change from frame to frame by a random walk."""
    steps = noise(2, 4, 8, 6, 8)
    steps[:, 1:] *= changing
    features = (steps.cumsum(1) + noisy * noise(2, 4, 8, 6, 8, seed=1)).float()
    return Clip(torch.zeros(2, 4, 3, 24, 32), features, torch.zeros(2, 3, 2, 24, 32))


def loss_of(filler: CrossFrameAttention, frames: Clip) -> Tensor:
    batch = Batch(frames.image[:, 0], frames.features[:, 0], torch.zeros(2, 8, 12, 16), (12, 16), clip=frames)
    return filler.auxiliary_loss(batch.target, batch)["fusion_loss"]


def test_training_opens_the_gate_for_flicker_and_not_for_change():
    shares = {}
    for name, given in {"flicker": clip(0.7, 0), "change": clip(0, 1.0)}.items():
        filler = CrossFrameAttention(WIDTH, radius=0)
        optimiser, history = torch.optim.Adam(filler.parameters(), 0.03), []
        for _ in range(60):
            optimiser.zero_grad()
            loss = loss_of(filler, given)
            loss.backward()
            optimiser.step()
            history.append(loss.item())
        shares[name] = filler.gate.tanh().item()
        assert history[-1] <= history[0]
    assert shares["flicker"] > 0.3
    assert shares["change"] < 0.1


def test_the_closed_gates_loss_is_the_difference_to_the_next_frame():
    given = clip(0.5, 0.5)
    difference = (given.features[:, 1:3] - given.features[:, 2:]).square().sum(2).mean((2, 3))  # (B,2)
    expected = difference / given.features.var((1, 3, 4), correction=0).sum(1)[:, None]
    assert loss_of(CrossFrameAttention(WIDTH), given).item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_refusals():
    short = Clip(torch.zeros(2, 2, 3, 24, 32), torch.zeros(2, 2, 8, 6, 8), torch.zeros(2, 1, 2, 24, 32))
    with pytest.raises(ValueError, match=r"clips of at least 3 frames, got 2: set views.clip=3"):
        loss_of(CrossFrameAttention(WIDTH), short)
    unknown = clip(1, 0)
    unknown.flow = None
    with pytest.raises(ValueError, match="needs clips with flow, and the data set knows none: train on data=scenes"):
        loss_of(CrossFrameAttention(WIDTH), unknown)
    with pytest.raises(TypeError, match=r"returned \(FeatureState\), got Tensor"):
        run(opened(), frames(1), torch.zeros(2, 6, 3, 4))
    with pytest.raises(ValueError, match="state is of 2 videos with 5 feature channels, but this frame has 2 and 6"):
        run(opened(), frames(1), FeatureState(features=torch.zeros(2, 5, 3, 4)))
    with pytest.raises(ValueError, match="a saved FeatureState has the tensors features, got none"):
        FeatureState.from_tensors({})
    for setting, message in {
        "strength=1": r"strength must be from 0 \(frame by frame\) to below 1 \(frozen\), got 1",
        "radius=-1": "radius must not be negative, got -1",
        "max_gap=0": "max_gap must be at least 1 frame, got 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            core.build([f"embed_dim={WIDTH}", "temporal=cross_frame_attention", f"temporal.{setting}"])
