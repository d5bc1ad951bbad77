"""Peers: their settings and weights in configurations, and what the simple ones compute."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from core.backbones import IMAGENET_STD
from experiments.cost.arm_cost import measure_costs
from experiments.measuring.bench import EvaluationError
from experiments.measuring.evaluation import evaluate
from experiments.peers import (
    CannotUpsample,
    Peer,
    make_peer,
    named_peers,
    peer_from_config,
    peer_identity,
    register_peer,
)
from experiments.peers.base import peer_settings
from experiments.peers.joint_bilateral import JointBilateral
from experiments.peers.windows import nearby
from experiments.settings import SettingError
from experiments.sweeps.arms import composed, read_arms
from experiments.sweeps.members import Member
from experiments.tracking.store import Run

ROOT = Path(__file__).resolve().parent.parent


def inputs(image=(37, 53), grid=(5, 7), batch=1, channels=7):
    return 0.2 * torch.randn(batch, 3, *image), torch.randn(batch, channels, *grid)


# Settings and weights


@pytest.fixture
def learned(own_registry):
    """A peer with weights and a setting, which may be trained: bilinear, times a weight of each pixel."""

    @register_peer("learned")
    class Learned(Peer):
        def __init__(self, weights: Path | None = None, gain: float = 1.0):
            super().__init__()
            self.gain, self.layer = gain, nn.Conv2d(3, 1, 1)
            if weights is not None:
                self.load_weights(weights)

        def forward(self, image, features, output_size=None):
            size = tuple(image.shape[-2:]) if output_size is None else output_size
            weight = F.interpolate(self.layer(image), size)  # (B,1,Qh,Qw)
            return self.gain * weight * F.interpolate(features, size, mode="bilinear")

    return Learned


@pytest.fixture
def fixed(own_registry):
    """One encoder's, and twice the size only; it needs its weights."""

    @register_peer("fixed")
    class Fixed(Peer):
        channels, factor = 384, 2

        def __init__(self, weights: Path):
            super().__init__()
            self.layer = nn.Conv2d(384, 384, 1)
            self.load_weights(weights)

        def forward(self, image, features, output_size=None):
            return F.interpolate(self.layer(features), scale_factor=2)

    return Fixed


def weights_file(path, value=0.5, out=1, into=3):
    save_file({"layer.weight": torch.full((out, into, 1, 1), value), "layer.bias": torch.zeros(out)}, path)
    return str(path)


def test_a_peer_has_weights_and_settings(learned, tmp_path):
    file = weights_file(tmp_path / "w.safetensors")
    peer = peer_from_config({"peer": "learned", "weights": file, "gain": 3})
    assert not peer.training
    image, features = inputs()
    expected = 3 * 0.5 * image.sum(1, keepdim=True) * F.interpolate(features, (37, 53), mode="bilinear")
    torch.testing.assert_close(peer(image, features), expected)
    torch.save({"state_dict": peer.state_dict()}, tmp_path / "w.pth")
    again = peer_from_config({"peer": "learned", "weights": str(tmp_path / "w.pth"), "gain": 3})
    assert torch.equal(again(image, features), peer(image, features))


def test_initial_weights_are_the_same_every_time(learned):
    first = make_peer("learned").state_dict()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert all(torch.equal(first[name], value) for name, value in make_peer("learned").state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_count_by_content(learned, tmp_path):
    def identity(name, value, **settings):
        return peer_identity({"peer": "learned", "weights": weights_file(tmp_path / name, value), **settings})

    first = identity("a.safetensors", 0.5)
    assert identity("b.safetensors", 0.5) == first  # another path
    assert identity("a.safetensors", 0.25) != first  # the same path
    assert len({str(x) for x in (first, identity("a.safetensors", 0.5, gain=2), peer_identity("learned"))}) == 3


REFUSED = [
    ("unheard_of", "peer=unheard_of is not registered; there are: .*joint_bilateral"),
    ({"peer": "joint_bilateral", "radius": 3}, "peer=joint_bilateral has no setting radius; it has: window, sigma"),
    ({"peer": "joint_bilateral", "window": "wide"}, "peer=joint_bilateral: window must be int, got 'wide'"),
    ({"peer": "joint_bilateral", "window": 4}, "peer=joint_bilateral: joint_bilateral needs an odd window"),
    ({"peer": "bilinear", "weights": "w.safetensors"}, "peer=bilinear has no setting weights; it has: no settings"),
    ({"peer": "learned", "weights": "gone.pth"}, "peer=learned: its weights gone.pth does not exist; give a file"),
    ({"peer": "learned", "weights": "other.safetensors"},
     "peer=learned: weights other.safetensors are not those of .*Learned: size mismatch for layer.weight"),
    ({"peer": "learned", "weights": "text.pth"}, "peer=learned: weights text.pth: .*damaged"),
    ({"peer": "learned", "weights": "${nowhere}"}, "nowhere.*; give it a value"),
    ({"peer": "fixed"}, "peer=fixed needs a value for weights"),
    ({"name": "bilinear"}, "a peer must be NAME, or {peer: NAME, SETTING: VALUE, ...}, got {'name': 'bilinear'}"),
    ({"peer": "bilinear", "name": "nearest"}, "a peer must be NAME"),
    (3, "a peer must be NAME, or .*, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("node", "message"), REFUSED, ids=str)
def test_what_cannot_be_a_peer_is_refused(learned, fixed, tmp_path, monkeypatch, node, message):
    monkeypatch.chdir(tmp_path)
    weights_file(tmp_path / "other.safetensors", into=4)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(SettingError, match=message):
        peer_from_config(OmegaConf.create(node) if isinstance(node, dict) else node)


def test_channels_and_factor_that_a_peer_has_not_are_refused(fixed, tmp_path):
    peer = peer_from_config({"peer": "fixed", "weights": weights_file(tmp_path / "w.safetensors", out=384, into=384)})
    image, features = inputs((8, 10), (4, 5), channels=384)
    assert peer(image, features).shape == (1, 384, 8, 10)
    with pytest.raises(CannotUpsample, match="peer fixed takes features of 384 channels, got 7: choose the backbone"):
        peer(image, features[:, :7])
    with pytest.raises(CannotUpsample, match="peer fixed enlarges 2 times, 4x5 features to 8x10, not to 8x11: choose"):
        peer(image, features, (8, 11))


# In sweeps and evaluations


@pytest.fixture
def sweep(tmp_path):
    """Overrides and changes -> the configuration of a sweep."""

    def make(*overrides, **changes):
        made = composed("ablate", ["experiment=debug/fast", "tracking.enabled=false", "device=cpu", *overrides])
        OmegaConf.set_struct(made, False)
        made.out_dir = str(tmp_path / "sweep")
        for key, value in {"peers": [], "ceilings": [], **changes}.items():
            made[key] = value
        return made

    return make


def test_arms_of_sweeps_are_peers_with_settings_and_weights(sweep, learned, tmp_path):
    def arm(value=0.5, file="w.safetensors", **settings):
        node = {"peer": "learned", "weights": weights_file(tmp_path / file, value), **settings}
        [_, found] = read_arms(sweep(arms={"baseline": [], "mine": node}))
        return found

    mine = arm(gain=3.0)
    assert (mine.name, mine.kind, mine.competes) == ("mine", "peer", False)
    assert mine.model().gain == 3.0
    assert mine.model().layer.weight.unique() == 0.5
    assert len({arm().key(0), arm(gain=3.0).key(0), arm(0.25).key(0)}) == 3
    assert arm(0.5).key(0) == arm(0.5, "elsewhere.safetensors").key(0) == arm(gain=1.0).key(0)


def test_a_sweep_takes_peers_from_the_command_line_and_by_name(sweep):
    [one] = [arm for arm in read_arms(sweep("+arms={wide:{peer:joint_bilateral,window:7}}")) if arm.name == "wide"]
    assert one.model().window == 7
    arms = {"baseline": [], "closest": {"peer": "nearest"}}
    [closest], [nearest] = (
        read_arms(sweep(arms=arms))[1:],
        read_arms(sweep(arms={"baseline": []}, peers=["nearest"]))[1:],
    )
    assert (closest.name, nearest.name) == ("closest", "nearest")
    assert closest.key(0) == nearest.key(0)
    other = Member(closest, 0, [], Path("sweep"))._config(sweep())
    assert (other.peer, other.checkpoint, other.seed) == ({"peer": "nearest"}, "", 0)  # what is recorded


def test_the_key_of_a_peer_of_a_notebook_knows_its_code(sweep, own_registry):
    cell = """
class Cell(Peer):
    def forward(self, image, features, output_size=None):
        return features * {factor}
register_peer("cell")(Cell)
"""

    def key(factor):
        exec(cell.format(factor=factor), {"__name__": "__main__", "Peer": Peer, "register_peer": register_peer})
        return read_arms(sweep(arms={"baseline": []}, peers=["cell"]))[1].key(0)

    assert key(2) == key(2)
    assert key(2) != key(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peers": ["bilinear", "bilinear"]}, "two arms are called bilinear"),
        ({"peers": {"nearest": "bilinear"}}, "peers.nearest is not the peer of that name"),
        ({"peers": "bilinear"}, r"peers must be null, \[NAME, ...\], or with settings {ARM: {peer: NAME"),
        ({"peers": [{"peer": "bilinear"}]}, r"peers must be null, \[NAME, ...\], or with settings"),
        ({"peers": {"a/b": "bilinear"}}, "arm 'a/b': names may only have letters"),
        ({"peers": {"a": "bilinear", "b": {"peer": "bilinear"}}}, "arms a and b are the same peer"),
        ({"peers": {"a": "joint_bilateral", "b": {"peer": "joint_bilateral", "window": 5}}}, "are the same peer"),
        ({"peers": {"a": {"peer": "bilinear", "size": 3}}}, "arm a: peer=bilinear has no setting size"),
        ({"arms": {"baseline": [], "a": {"peer": "unheard_of"}}}, "arm a: peer=unheard_of is not registered"),
        ({"arms": {"baseline": [], "a": {"peer": "bilinear", "checkpoint": "x"}}}, "no setting checkpoint"),
        ({"arms": {"baseline": {"peer": "bilinear"}}}, "baseline=baseline is not an arm"),  # that competes
    ],
    ids=str,
)  # fmt: skip
def test_peers_that_a_sweep_cannot_have(sweep, changes, message):
    with pytest.raises(SettingError, match=message):
        read_arms(sweep(**{"arms": {"baseline": []}, **changes}))


def test_all_peers_are_those_that_need_nothing(learned, fixed):
    found = list(named_peers(None))
    assert {"nearest", "bilinear", "bicubic", "joint_bilateral"} <= set(found)
    assert not {"learned", "fixed"} & set(found)
    assert all(peer_settings(name) for name in found)


def evaluation(*overrides):
    quick = ("tracking.enabled=false", "backbone=hog8", "image_size=[32,40]", "data.size=[36,40]", "data.num=2",
             "val_data.size=[36,40]", "val_data.num=2", "val_data.seed=5", "device=cpu", "task.epochs=1",
             "task.pixels_per_image=50", "ceilings=[]", "cost=null")  # fmt: skip
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("evaluate", [*quick, *overrides])


def test_an_evaluation_takes_peers_with_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tags = {}
    monkeypatch.setattr(Run, "tag", lambda run, key, value: tags.update({key: value}))
    report = evaluate(evaluation("peers={bilinear:bilinear,wide:{peer:joint_bilateral,window:7},"
                                 "narrow:{peer:joint_bilateral,window:1}}"))  # fmt: skip
    scores = report.scores[report.scores.measure == "accuracy"].groupby("arm", sort=False)["numerator"].sum()
    assert list(scores.index) == ["bilinear", "wide", "narrow"]
    assert {one.verdict for one in report.results if one.arm == "wide"} == {"reference"}  # as of every peer
    assert json.loads(tags["peer.wide"]) == peer_identity({"peer": "joint_bilateral", "window": 7})


def test_an_evaluation_names_the_arm_that_cannot_take_its_features(fixed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = weights_file(tmp_path / "w.safetensors", out=384, into=384)
    config = evaluation(f"peers={{bilinear:bilinear,theirs:{{peer:fixed,weights:{file}}}}}")
    with pytest.raises(EvaluationError, match="arm theirs, seed 0: peer fixed takes features of 384 channels, got "):
        evaluate(config)


def test_a_peer_may_optimise_for_each_image(own_registry):
    """Under no_grad, as it is called everywhere."""

    @register_peer("optimises")
    class Optimises(Peer):
        def forward(self, image, features, output_size=None):
            with torch.enable_grad():
                gain = torch.zeros((), requires_grad=True)
                loss = ((gain * features - features) ** 2).mean()
                (slope,) = torch.autograd.grad(loss, gain)
            return F.interpolate(features * -slope.sign(), output_size or tuple(image.shape[-2:]))

    cost = OmegaConf.create({"image": 16, "patch": 8, "channels": 2, "num_runs": 2})
    models = {"bilinear": make_peer("bilinear"), "optimises": make_peer("optimises")}
    costs = measure_costs(models, "bilinear", cost, torch.device("cpu"))
    assert list(costs.remark) == ["", ""]


# What each peer computes


def test_interpolation_between_cell_centres():
    image, step = torch.zeros(1, 3, 8, 8), torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)
    expected = {
        "nearest": [0, 0, 1, 1],
        "bilinear": [0, 0.25, 0.75, 1],
        "bicubic": [-0.10546875, 0.2265625, 0.7734375, 1.10546875],  # cubic convolution with a = -0.75, by hand
    }
    for name, row in expected.items():
        torch.testing.assert_close(
            make_peer(name)(image, step, (4, 4))[0, 0, 2], torch.tensor(row, dtype=torch.float32)
        )


def slow_bilateral(image, features, size, window, space, colour):
    (height, width), (channels, h, w) = size, features.shape[1:]
    rgb = image * image.new_tensor(IMAGENET_STD).view(3, 1, 1)
    fine, coarse = F.interpolate(rgb, size, mode="area")[0], F.interpolate(rgb, (h, w), mode="area")[0]
    output = torch.zeros(channels, height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * h / height, (j + 0.5) * w / width
            total = 0.0
            for m in range(int(y) - window // 2, int(y) + window // 2 + 1):
                for n in range(int(x) - window // 2, int(x) + window // 2 + 1):
                    if not (0 <= m < h and 0 <= n < w):
                        continue
                    near = math.exp(-((m + 0.5 - y) ** 2 + (n + 0.5 - x) ** 2) / (2 * space**2))
                    alike = math.exp(-(fine[:, i, j] - coarse[:, m, n]).square().sum().item() / (2 * colour**2))
                    output[:, i, j] += near * alike * features[0, :, m, n]
                    total += near * alike
            output[:, i, j] /= total
    return output[None]


@pytest.mark.parametrize(("window", "space", "colour"), [(5, 0.7, 0.2), (3, 1.5, 0.05)])
def test_joint_bilateral_is_its_definition(window, space, colour):
    """In float64: exponents up to 600, each rounded a few times, change a weight by 600 * 8 eps = 1e-12 of itself."""
    image, features = torch.randn(1, 3, 18, 24).double(), torch.randn(1, 4, 3, 4).double()
    ours = JointBilateral(window, space, colour)(image, features, (7, 9))
    expected = slow_bilateral(image, features, (7, 9), window, space, colour)
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=0)


def test_joint_bilateral_with_a_flat_image_is_a_gaussian_and_keeps_to_edges_with_another():
    features = torch.randn(1, 4, 5, 5)
    flat = torch.full((1, 3, 20, 20), 0.3)
    filtered = JointBilateral(5, 0.7, 0.2)(flat, features, (10, 10))
    axis = (torch.arange(10) + 0.5) / 2 - (torch.arange(5) + 0.5)[:, None]  # (5,10) distances in cells
    inside = ((torch.arange(10) // 2) - torch.arange(5)[:, None]).abs() <= 2
    weights = torch.exp(-(axis**2) / (2 * 0.49)) * inside
    weights = weights / weights.sum(0)
    torch.testing.assert_close(filtered, torch.einsum("bcij,iy,jx->bcyx", features, weights, weights))
    halves = flat.clone()
    halves[..., 10:] = -1.5
    sides = (torch.arange(4) >= 2).float().expand(1, 1, 4, 4)
    sharp = JointBilateral()(halves, sides, (8, 8))
    torch.testing.assert_close(sharp, (torch.arange(8) >= 4).float().expand(1, 1, 8, 8), atol=2e-3, rtol=0)


def test_joint_bilateral_refuses():
    for wrong in ({"window": 4}, {"window": 0}, {"sigma_space": 0}, {"sigma_colour": -1}):
        with pytest.raises(ValueError, match="an odd window and positive sigmas"):
            JointBilateral(**wrong)


def test_windows():
    cells, inside, distance = nearby(4, 8, 3)
    assert cells.tolist()[:2] == [[0, 0, 1], [0, 0, 1]]
    assert inside.tolist()[0] == [False, True, True]
    assert cells.tolist()[-1] == [2, 3, 3]
    assert distance.tolist()[0] == [-0.75, 0.25, 1.25]
    assert nearby(3, 3, 1)[0].tolist() == [[0], [1], [2]]
    with pytest.raises(ValueError, match="odd"):
        nearby(4, 8, 2)
