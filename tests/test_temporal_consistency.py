"""Mixing along the motion, against a loop from the definition; beginnings, gaps, cuts, stored states; the gate."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import core
from core import AnyUp, Batch, Clip, Context
from core.points import pixel_centres
from core.warping import warp
from extensions.temporal_consistency import FlowState, TemporalConsistency, reduced

WIDTH = 16
GRID = (5, 7)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context(image: Tensor, output: Tensor) -> Context:
    return Context(image, torch.zeros_like(output[..., :2, :2]), pixel_centres(tuple(output.shape[-2:]), like=output))


def picture(batch: int = 1, size: tuple[int, int] = (24, 32), seed: int = 0) -> Tensor:
    """(B,3,H,W) smooth texture, ImageNet-normalised."""
    coarse = torch.rand(batch, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    return core.imagenet_normalize(F.interpolate(coarse, size, mode="bicubic").clamp(0, 1))


def run(filler: TemporalConsistency, frames: list[tuple[Tensor, Tensor]], state=None, **told) -> tuple[list, FlowState]:
    """Outputs of (image, output) frames in order; `told` goes to `before_next` of each."""
    results = []
    for image, output in frames:
        given = state if state is None or not told else state.before_next(**told)
        result, state = filler(output, context(image, output), given)
        results.append(result)
    return results, state


# --- the definition --------------------------------------------------------------------------------------------------


def look_up(values: Tensor, x: float, y: float) -> Tensor:
    """(C,H,W) bilinearly at a point in pixels."""
    rows, columns = values.shape[-2:]
    u, v = min(max(x - 0.5, 0), columns - 1), min(max(y - 0.5, 0), rows - 1)
    left, top = min(math.floor(u), columns - 2), min(math.floor(v), rows - 2)
    corners = [(i, j) for i in (top, top + 1) for j in (left, left + 1)]
    return sum((1 - abs(u - j)) * (1 - abs(v - i)) * values[:, i, j] for i, j in corners)


def reference(output, before, rgb, rgb_before, there, back, strength, gap):
    """One image, pixel by pixel, in float64: (C,H,W), (3,H,W), (2,H,W) -> the mixture, and the shares."""
    rows, columns = output.shape[-2:]
    mean, mixed, shares = output.mean((1, 2)), output.clone(), torch.zeros(rows, columns)
    for i in range(rows):
        for j in range(columns):
            dx, dy = there[:, i, j].tolist()
            x, y = j + 0.5 + dx, i + 0.5 + dy
            if math.isnan(dx) or not (0 <= x <= columns and 0 <= y <= rows):
                continue
            bx, by = look_up(back, x, y).tolist()
            if not (dx + bx) ** 2 + (dy + by) ** 2 <= 0.01 * (dx**2 + dy**2 + bx**2 + by**2) + 0.5:
                continue
            photometric = math.exp(-50 * (rgb[:, i, j] - look_up(rgb_before, x, y)).square().sum())
            old = look_up(before, x, y)
            a, b = output[:, i, j] - mean, old - mean
            cosine = max(0.0, (a @ b / (a.norm() * b.norm())).item())
            shares[i, j] = strength**gap * photometric * cosine
            mixed[:, i, j] = (1 - shares[i, j]) * output[:, i, j] + shares[i, j] * old
    return mixed, shares


@pytest.mark.parametrize("gap", [1, 2.5])
def test_mixes_as_defined(gap):
    before, image_before = noise(2, 6, *GRID, seed=1), 0.1 * noise(2, 3, *GRID, seed=2)
    output, image = before + 0.5 * noise(2, 6, *GRID, seed=3), image_before + 0.2 * noise(2, 3, *GRID, seed=4)
    there = 1.2 * noise(2, 2, *GRID, seed=5)
    back = -there + 0.5 * noise(2, 2, *GRID, seed=6)
    there[0, :, 1, 2] = torch.nan
    filler = TemporalConsistency(WIDTH, strength=0.8, flow="given", cut_share=0).eval()
    with torch.no_grad():
        _, state = run(filler, [(image_before, before)])
        [mixed], _ = run(filler, [(image, output)], state, flow=there, forward_flow=back, gap=gap)
    told = set()
    for i in range(2):
        rgb, rgb_before = (reduced(x, 224)[i].double() for x in (image, image_before))
        expected, shares = reference(output[i], before[i], rgb, rgb_before, there[i], back[i], 0.8, gap)
        torch.testing.assert_close(mixed[i], expected, rtol=0, atol=1e-5)  # flow and images are float32
        told |= {share > 0 for share in shares.flatten().tolist()}
    assert told == {True, False}


def test_the_estimated_flow_leads_from_this_frame_to_the_previous_one():
    """A texture that moves by 3 and 2 pixels: the previous output, moved along, is this one."""
    image, output = picture(size=(48, 64)), F.interpolate(noise(1, 5, 6, 8).float(), (48, 64), mode="bicubic")
    following = [x.roll((2, -3), (-2, -1)) for x in (image, output)]
    pictures = {}
    for flow in ("tvl1", "still"):
        filler = TemporalConsistency(WIDTH, flow=flow, photometric_weight=0).eval()
        with torch.no_grad():
            (_, mixed), _ = run(filler, [(image, output), tuple(following)])
        inner = (mixed - following[1])[..., 8:-8, 8:-8].square().mean() / following[1].var()
        assert inner < 0.003 if flow == "tvl1" else inner > 0.03
        pictures[flow] = filler.pictures()
    assert list(pictures["tvl1"]) == ["flow", "share of the previous output", "flicker"]
    for name, shown in pictures["tvl1"].items():
        assert shown.shape == (3, 48, 64)
        assert 0 <= shown.min() <= shown.max() <= 1, name
    assert (pictures["still"]["flow"] == 1).all()  # the wheel's centre is white
    assert pictures["tvl1"]["flow"].min() < 0.9
    assert pictures["tvl1"]["flicker"][:, 8:-8, 8:-8].mean() < 0.3 * pictures["still"]["flicker"].mean()
    assert pictures["tvl1"]["share of the previous output"][:, 8:-8, 8:-8].mean() > 0.6


def test_flicker_of_a_still_scene_falls_as_an_average_does():
    """Independent noise on a surface at rest: an exponential average leaves (1 - s) / (1 + s) of its variance."""
    image, truth = picture(), 5 * noise(1, 16, 24, 32).float()
    frames = [(image, truth + 0.2 * noise(1, 16, 24, 32, seed=seed).float()) for seed in range(1, 25)]
    filler = TemporalConsistency(WIDTH, strength=0.6, flow="still").eval()
    with torch.no_grad():
        outputs, _ = run(filler, frames)
    left = (outputs[-1] - truth).square().mean() / 0.2**2
    assert left == pytest.approx(0.4 / 1.6, rel=0.1)


def test_follows_shift_and_scale_of_the_features():
    image, frames = picture(), [noise(1, 6, 24, 32, seed=seed) for seed in (1, 2)]
    frames[1] = frames[0] + 0.5 * frames[1]
    filler = TemporalConsistency(WIDTH, flow="still").eval()
    plain, _ = run(filler, [(image, x) for x in frames])
    moved, _ = run(filler, [(image, 100 * x + 7) for x in frames])
    assert (plain[1] - frames[1]).abs().max() > 0.1
    torch.testing.assert_close(moved[1], 100 * plain[1] + 7)


# --- neutral settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"strength": 0}, {"fusion": "learned", "flow": "still", "cut_share": 0}], ids=["strength 0", "closed"]
)
def test_the_closed_gate_is_frame_by_frame_bit_for_bit(settings):
    chosen = ["temporal=temporal_consistency", *(f"temporal.{key}={value}" for key, value in settings.items())]
    model, baseline = (core.build([f"embed_dim={WIDTH}", *more]).eval() for more in (chosen, []))
    baseline.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("temporal")})
    state = None
    with torch.no_grad():
        for seed in range(4):
            image, features = picture(2, seed=seed % 2), noise(2, 7, 4, 5, seed=seed).float()
            output, state = model(image, features, state=state, return_state=True)
            assert torch.equal(output, baseline(image, features))
            assert isinstance(state, FlowState)


def test_a_variant_is_made_from_a_trained_baseline(tmp_path, perturbed):
    baseline = perturbed(core.build([f"embed_dim={WIDTH}"]))
    core.save(baseline, tmp_path / "baseline.safetensors")
    model = core.build([f"embed_dim={WIDTH}", "temporal=temporal_consistency"]).eval()
    assert core.warm_start(model, tmp_path / "baseline.safetensors") == []  # no weights are missing
    core.save(model, tmp_path / "video.safetensors")
    weaker = core.load(tmp_path / "video.safetensors", {"temporal.strength": 0.3, "temporal.flow": "still"})
    assert weaker.temporal.strength == 0.3
    image, features = picture(), noise(1, 7, 4, 5).float()
    with torch.no_grad():
        assert torch.equal(weaker(image, features), baseline.eval()(image, features))


# --- a video in pieces -----------------------------------------------------------------------------------------------


def video(length: int, size: tuple[int, int] = (12, 16)) -> list[tuple[Tensor, Tensor]]:
    image, truth = picture(size=size), noise(1, 3, *size).float()
    return [(image, truth + 0.3 * noise(1, 3, *size, seed=i).float()) for i in range(1, length + 1)]


def test_a_stopped_video_goes_on_with_the_same_frames(tmp_path):
    frames = video(5)
    with torch.no_grad():
        whole, _ = run(TemporalConsistency(WIDTH).eval(), frames)
        first, state = run(TemporalConsistency(WIDTH).eval(), frames[:2])
        save_file(state.tensors(), tmp_path / "state.safetensors")
        again = FlowState.from_tensors(load_file(tmp_path / "state.safetensors"))
        last, _ = run(TemporalConsistency(WIDTH).eval(), frames[2:], again)
    assert all(torch.equal(a, b) for a, b in zip(whole, first + last, strict=True))
    assert not torch.equal(whole[2], frames[2][1])


def test_the_state_of_a_thousand_frames_is_as_large_as_that_of_one():
    filler, state, sizes = TemporalConsistency(WIDTH, flow="still").eval(), None, set()
    with torch.no_grad():
        for frame in 200 * video(5):
            _, state = run(filler, [frame], state)
            kept = {
                name: value.untyped_storage().nbytes() for name, value in vars(state).items() if torch.is_tensor(value)
            }
            sizes.add((tuple(kept.items()), state.message))
    assert sizes == {((("output", 4 * 3 * 12 * 16), ("frame", 4 * 3 * 12 * 16)), told) for told in ("first frame", "")}
    assert state.output.grad_fn is None


def test_the_frame_that_is_kept_has_a_bounded_size():
    _, state = run(TemporalConsistency(WIDTH, flow_size=16), [(picture(size=(48, 64)), torch.zeros(1, 3, 6, 8))])
    assert state.frame.shape == (1, 3, 12, 16)
    assert state.message == "first frame"


def test_what_the_caller_does_to_the_output_does_not_reach_the_state():
    frames = video(2)
    with torch.no_grad():
        expected, _ = run(TemporalConsistency(WIDTH), frames)
        filler, state = TemporalConsistency(WIDTH), None
        for (image, output), wanted in zip(frames, expected, strict=True):
            result, state = filler(output.clone(), context(image, output), state)
            assert torch.equal(result, wanted)
            result.zero_()


@pytest.mark.parametrize("part", ["image", "features"])
@pytest.mark.parametrize("flow", ["still", "tvl1"])
def test_one_bad_frame_does_not_spoil_the_rest(part, flow):
    frames = [(image.clone(), output) for image, output in video(5)]
    frames[1][part == "features"][:, 0, 3, 4] = torch.nan
    with torch.no_grad():
        outputs, _ = run(TemporalConsistency(WIDTH, flow=flow), frames)
    assert all(output.isfinite().all() for output in outputs[2:])
    assert torch.equal(outputs[2][..., 3, 4], frames[2][1][..., 3, 4])
    assert (outputs[4] - frames[4][1]).abs().mean() > 0.05


# --- where a video begins again --------------------------------------------------------------------------------------


def test_a_scene_cut_begins_again_in_its_image_only():
    first, second = picture(2, seed=1), picture(2, seed=1)
    second[1] = picture(1, seed=2)[0]
    outputs = [noise(2, 3, 24, 32, seed=1).float(), noise(2, 3, 24, 32, seed=2).float()]
    outputs[1] = outputs[0] + 0.5 * outputs[1]
    with torch.no_grad():
        (_, mixed), state = run(TemporalConsistency(WIDTH), list(zip((first, second), outputs, strict=True)))
    assert torch.equal(mixed[1], outputs[1][1])
    assert (mixed[0] - outputs[1][0]).abs().mean() > 0.1
    assert state.message.startswith("scene cut in image 1 of the batch: agreement 0.")
    assert "below cut_share=0.2, the video begins again" in state.message
    with torch.no_grad():
        _, kept = run(TemporalConsistency(WIDTH, cut_share=0), list(zip((first, second), outputs, strict=True)))
    assert kept.message == ""


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        ((picture(), torch.ones(1, 3, 6, 8)), "the output size changed from 12x16 to 6x8: the video begins again"),
        (
            (picture(size=(24, 24)), torch.ones(1, 3, 12, 16)),
            "the image size changed from 24x32 to 24x24, reduced to flow_size=224: the video begins again",
        ),
    ],
)
def test_another_resolution_begins_again(frame, told):
    filler = TemporalConsistency(WIDTH)
    _, state = run(filler, [(picture(), torch.zeros(1, 3, 12, 16))])
    [output], state = run(filler, [frame], state)
    assert torch.equal(output, frame[1])
    assert state.message == told
    [_], state = run(filler, [frame], state)
    assert state.message == ""


def test_missing_frames_and_other_rates_count_as_time():
    """Two steps of half a frame forget as much as one; a gap of 3 frames leaves strength³."""
    image, first, second = picture(), noise(1, 3, 24, 32).float(), torch.zeros(1, 3, 24, 32)
    second = first + 1e-3 * noise(1, 3, 24, 32, seed=1).float()
    for gap in (0.5, 3.0):
        filler = TemporalConsistency(WIDTH, strength=0.6, flow="still")
        with torch.no_grad():
            _, state = run(filler, [(image, first)])
            [mixed], state = run(filler, [(image, second)], state, gap=gap)
        torch.testing.assert_close(mixed - second, 0.6**gap * (first - second), rtol=0, atol=1e-5)
        assert state.message == f"a gap of {gap:g} frames: the strength is {0.6**gap:.3g}, not 0.6"
        assert state.gap == 1
    [output], state = run(filler, [(image, second)], state, gap=9)
    assert torch.equal(output, second)
    assert state.message == "a gap of 9 frames, more than max_gap=8: the video begins again"


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"flow": torch.zeros(1, 2, 12, 16)}, r"flow must be \(1, 2, 24, 32\), one .* got \(1, 2, 12, 16\)"),
        ({"flow": torch.zeros(1, 24, 32, 2)}, r"flow must be \(1, 2, 24, 32\)"),
        (
            {"flow": torch.zeros(1, 2, 24, 32), "forward_flow": torch.zeros(1, 2, 24, 31)},
            r"flow must be \(1, 2, 24, 32\), .* got \(1, 2, 24, 31\)",
        ),
        ({"flow": torch.zeros(1, 2, 24, 32, device="meta")}, "flow is on meta but the image is on cpu: move it"),
        ({"forward_flow": torch.zeros(1, 2, 24, 32)}, "forward_flow alone is not enough: give flow, from the coming"),
        ({"gap": 0}, "gap must be positive and finite, in frames since the previous one, got 0"),
        ({"gap": float("nan")}, "gap must be positive and finite.*got nan"),
        ({"gap": 1.0}, r"temporal.flow=given, but the state has none: .*before_next\(flow=...\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_of_a_frame(told, message):
    filler = TemporalConsistency(WIDTH, flow="given")
    _, state = run(filler, [(picture(), torch.zeros(1, 3, 12, 16))])
    with pytest.raises(ValueError, match=message):
        run(filler, [(picture(), torch.zeros(1, 3, 12, 16))], state, **told)


def test_a_flow_that_is_no_tensor():
    frame = (picture(), torch.zeros(1, 3, 12, 16))
    _, state = run(TemporalConsistency(WIDTH), [frame])
    with pytest.raises(TypeError, match="flow must be a torch tensor, got ndarray"):
        run(TemporalConsistency(WIDTH), [frame], state, flow=torch.zeros(1, 2, 24, 32).numpy())


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (torch.zeros(1, 3, 12, 16), TypeError, "state must be what the call for the previous .* got Tensor"),
        (
            FlowState(output=torch.zeros(1, 4, 12, 16), frame=torch.zeros(1, 3, 24, 32)),
            ValueError,
            "state is of 1 videos with 4 feature channels, but this frame has 1 and 3: pass state=None to begin",
        ),
        (
            FlowState(output=torch.zeros(2, 3, 12, 16), frame=torch.zeros(2, 3, 24, 32)),
            ValueError,
            "state is of 2 videos with 3 feature channels, but this frame has 1 and 3: pass state=None",
        ),
        (
            FlowState(output=torch.zeros(1, 3, 12, 16, device="meta"), frame=torch.zeros(1, 3, 24, 32)),
            ValueError,
            r"state is on meta but the frame is on cpu: move its tensors\(\)",
        ),
    ],
)  # fmt: skip
def test_a_state_of_another_video(state, error, message):
    with pytest.raises(error, match=message):
        run(TemporalConsistency(WIDTH), [(picture(), torch.zeros(1, 3, 12, 16))], state)


def test_other_tensors_are_no_state():
    with pytest.raises(ValueError, match="a saved FlowState has the tensors output, frame, got mean"):
        FlowState.from_tensors({"mean": torch.zeros(1)})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("strength=1", r"strength must be from 0 \(frame by frame\) to below 1 \(frozen\), got 1"),
        ("strength=-0.1", "strength must be from 0"),
        ("fusion=mean", "fusion=mean is unknown; there are: analytic, learned"),
        ("flow=farneback", "flow=farneback is unknown; there are: tvl1, dis, still, raft_small, raft_large, given"),
        ("flow=raft_small", "flow=raft_small needs a file of torchvision's weights"),
        ("flow_size=8", "flow_size must be at least 16 pixels, got 8"),
        ("photometric_weight=-1", "photometric_weight must not be negative, got -1.0; 0 ignores the images"),
        ("cut_share=1", r"cut_share must be from 0 \(no cuts\) to below 1, got 1"),
        ("max_gap=0", "max_gap must be at least 1 frame, got 0"),
        ("hidden_dim=0", "hidden_dim must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        core.build([f"embed_dim={WIDTH}", "temporal=temporal_consistency", f"temporal.{setting}"])


# --- the learned gate ------------------------------------------------------------------------------------------------


def clip(noisy: float, changing: float, length: int = 4, batch: int = 2) -> Clip:
    """A still texture: the features have independent noise, or change from frame to frame by a random walk."""
    steps = noise(batch, length, 8, 6, 8)
    steps[:, 1:] *= changing
    features = (steps.cumsum(1) + noisy * noise(batch, length, 8, 6, 8, seed=1)).float()
    image = picture(batch)[:, None].expand(-1, length, -1, -1, -1)
    return Clip(image, features, torch.zeros(batch, length - 1, 2, 24, 32))


def loss_of(filler: TemporalConsistency, frames: Clip) -> Tensor:
    output = torch.zeros(2, 8, 12, 16)
    batch = Batch(frames.image[:, 0], frames.features[:, 0], output, (12, 16), clip=frames)
    losses = filler.auxiliary_loss(output, batch)
    assert set(losses) == {"fusion_loss"}
    return losses["fusion_loss"]


def learned(**settings) -> TemporalConsistency:
    return TemporalConsistency(WIDTH, **{"fusion": "learned", "flow": "still", **settings})


def test_the_closed_gates_loss_is_the_warping_error_of_the_encoder():
    frames = clip(0.5, 0, length=3)
    frames.flow = torch.full_like(frames.flow, 2.0)  # half a cell of 4 pixels
    frames.flow[0, 0, :, :8] = torch.nan  # two rows of cells
    features, flow = frames.features, torch.full((2, 2, 6, 8), 0.5)
    error = (warp(features[:, 1], flow) - features[:, 0]).square().sum(1)
    error = error / features.var((1, 3, 4), correction=0).sum(1).view(2, 1, 1)
    seen = torch.ones(2, 6, 8, dtype=torch.bool)
    seen[0, :2] = False
    assert loss_of(learned(), frames).item() == pytest.approx(error[seen].mean().item(), rel=1e-5)


def test_training_opens_the_gate_for_flicker_and_not_for_change():
    opened = {}
    for name, frames in {"flicker": clip(1.0, 0), "change": clip(0, 1.0)}.items():
        torch.manual_seed(0)
        filler = learned()
        optimiser, history = torch.optim.Adam(filler.parameters(), 0.03), []
        for _ in range(60):
            optimiser.zero_grad()
            loss = loss_of(filler, frames)
            loss.backward()
            optimiser.step()
            history.append(loss.item())
        image, states = frames.image[:, 0], frames.features
        with torch.no_grad():
            (_, mixed), _ = run(filler.eval(), [(image, states[:, 2]), (image, states[:, 1])])  # as in the loss
        change = states[:, 2] - states[:, 1]
        opened[name] = ((mixed - states[:, 1]) * change).sum() / change.square().sum()
        assert history[-1] <= history[0]
    assert opened["flicker"] > 0.3
    assert opened["change"] < 0.05


def test_clips_without_flow_are_estimated():
    frames = clip(0.5, 0)
    known = loss_of(learned(flow="tvl1"), frames)
    assert loss_of(learned(flow="tvl1"), replace(frames, flow=None)).item() == pytest.approx(known.item(), rel=0.05)
    with pytest.raises(ValueError, match=r"flow=given, but the clips have no flow: .* or temporal.flow=dis"):
        loss_of(learned(flow="given"), replace(frames, flow=None))


def test_clips_of_two_frames_are_too_short():
    with pytest.raises(
        ValueError, match=r"clips of at least 3 frames, got 2: set views.clip=3, or use fusion=analytic"
    ):
        loss_of(learned(), clip(0.5, 0, length=2))


def test_only_the_learned_gate_asks_for_clips():
    assert learned().batch_parts == {"clip"}
    assert TemporalConsistency(WIDTH).batch_parts == frozenset()
    assert list(TemporalConsistency(WIDTH).parameters()) == []


def test_mixed_precision_trains_through_the_state():
    model = AnyUp(temporal=learned_factory, embed_dim=WIDTH)
    with torch.no_grad():
        model.temporal.gate.fill_(0.5)
    state, total = None, 0
    with torch.autocast("cpu", torch.bfloat16):
        for seed in range(3):
            output, state = model(
                picture(), noise(1, 5, 3, 4, seed=seed).float(), (12, 16), state=state, return_state=True
            )
            total = total + output.float().square().mean()
    total.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.temporal.parameters())


def learned_factory(embed_dim: int) -> TemporalConsistency:
    return TemporalConsistency(embed_dim, fusion="learned", flow="still", cut_share=0)
