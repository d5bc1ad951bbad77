"""The benchmark with peers among its arms: what is counted, what is compared, what a refusal does."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.nn import functional as F

from experiments.benchmark import benchmark
from experiments.cost import benchmark as engine
from experiments.cost.benchmark_arms import bench_peer, forward_flops, make_arm, warmed_up
from experiments.cost.benchmark_cases import cases_of, resolved
from experiments.cost.measure import peak_memory
from experiments.peers import CannotUpsample, Peer, peers, register_peer
from experiments.settings import SettingError

ROOT = Path(__file__).parent.parent
QUICK = ("tracking.enabled=false", "device=cpu", "forward=[32/8/8]", "training=[]", "num_runs=3", "embed_dim=16")


def config(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("benchmark", [*QUICK, *overrides])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "peak_in_child", lambda prepare, limit: 12_345_678)  # a process each: tested elsewhere


def test_peers_are_measured_beside_the_model():
    rows = {row.arm: row for row in benchmark(config("arms=[ours,bilinear,naf]", "name=peers"))}
    assert list(rows) == ["ours", "bilinear", "naf"]
    for name, row in rows.items():
        assert (row.status, row.num_runs, row.memory_mb) == ("ok", 3, 12.345678), name
        assert row.difference is None, name  # they compute something else
        assert (row.budget_mb is None) == (name != "ours"), name
        assert row.against == ("" if name == "ours" else "ours"), name
    assert [rows[name].parameters for name in ("bilinear", "naf")] == [0, 662_528]
    assert rows["bilinear"].gflops == 0
    text = Path("docs/peers.md").read_text()
    assert "their output is not compared" in text
    assert Path("docs/peers.png").stat().st_size > 0


def test_the_operations_of_naf_are_those_of_its_sheet():
    """659,200 multiply-adds a pixel to encode, and keys x (256 + C) for each output position; the window is 4 x 4."""
    [case] = cases_of(resolved(config("arms=[naf]", "forward=[32/8/8/16]")))
    expected = 2 * (659_200 * 32**2 + 16 * (256 + 8) * 16**2)
    assert forward_flops(bench_peer("naf", case), case) == expected


@pytest.mark.parametrize(
    "name", ["jafar", "featup_jbu", "anyup", "anyup_regression", "raysup", "uplift", "lift", "loftup"]
)
def test_operations_of_a_learned_peer_are_counted_without_computing(name):
    [case] = cases_of(resolved(config(f"arms=[{name}]")))
    assert forward_flops(bench_peer(name, case), case) > 1e6


def test_a_peer_is_made_for_the_features_and_the_output():
    [case] = cases_of(resolved(config("arms=[featup_jbu]", "forward=[48/16/5/20]")))
    peer = bench_peer("featup_jbu", case)
    assert (peer.channels, peer.any_size) == (5, True)
    assert peer(torch.zeros(1, 3, 48, 48), torch.zeros(1, 5, 3, 3), (20, 20)).shape == (1, 5, 20, 20)
    assert bench_peer("jafar", case).channels == 5


def test_a_peer_that_runs_its_encoder_is_measured_with_one_of_as_many_channels():
    row = {row.arm: row for row in benchmark(config("arms=[ours,vit_up]", "forward=[32/16/192/8]", "name=peers"))}
    assert row["vit_up"].status == "ok"
    own = 6 * (26 * 192**2 + 100 * 192) + 7 * (192**2 + 3 * 192)  # without its encoder's
    assert row["vit_up"].parameters == own
    assert row["vit_up"].gflops > 0.5
    with pytest.raises(SettingError, match="peer vit_up runs its encoder: C must be one of 192, 384, 768"):
        benchmark(config("arms=[ours,vit_up]", "name=peers"))


def test_a_peer_that_optimises_is_measured_if_it_is_named():
    [row] = [row for row in benchmark(config("arms=[ours,upsample_anything]", "name=peers")) if row.arm != "ours"]
    assert (row.status, row.gflops, row.parameters) == ("ok", None, 0)


@pytest.fixture
def picky(own_registry):
    @register_peer("picky")
    class Picky(Peer):
        def forward(self, image, features, output_size=None):
            if features.shape[-1] < 6:
                raise CannotUpsample(f"peer picky needs 6 columns, got {features.shape[-1]}")
            return F.interpolate(features, tuple(image.shape[-2:]) if output_size is None else output_size)


def test_a_refusal_is_a_result(picky):
    rows = benchmark(config("arms=[picky,bilinear]", "forward=[32/8/8,64/8/8]", "name=peers"))
    assert [(row.case.image, row.arm, row.status) for row in rows] == [
        (32, "picky", "refused: peer picky needs 6 columns, got 4"), (32, "bilinear", "ok"),
        (64, "picky", "ok"), (64, "bilinear", "ok"),
    ]  # fmt: skip
    assert not any(row.defective for row in rows)
    assert rows[0].time_ms is None
    assert "refused: peer picky needs 6 columns" in Path("docs/peers.md").read_text()


def test_a_refusal_of_the_small_first_call_does_not_matter(picky):
    settings = resolved(config("arms=[picky]", "forward=[64/8/8]"))
    [case] = cases_of(settings)
    assert peak_memory(partial(warmed_up, "picky", case, settings)()) >= 0


def test_training_steps_of_peers_are_measured_and_a_filter_has_none(monkeypatch):
    prepared = {}

    def keeping(name, *given):
        prepared[name] = make_arm(name, *given)
        return prepared[name]

    monkeypatch.setattr(engine, "make_arm", keeping)
    settings = config("arms=[ours,naf,lift,bilinear]", "forward=[]", "training=[32/8/8/8]", "name=peers")
    rows = {row.arm: row for row in benchmark(settings)}
    assert [row.status for row in rows.values()] == ["ok"] * 3 + ["refused: it has no weights to train"]
    assert [row.against for row in rows.values()] == ["", "ours", "ours", ""]
    assert rows["naf"].time_ms > 0
    assert rows["naf"].difference is None
    before, after = (prepared["naf"].outcome() for _ in range(2))
    assert before.abs().max() > 0
    assert not torch.equal(before, after)  # each call is a step: the next gradient is that of other weights
    assert "training 4 x 32²/8, C=8 -> 8²" in Path("docs/peers.md").read_text()


def test_all_peers_by_one_name_and_by_the_preset():
    found = resolved(config("preset=peers", "training=null"))
    assert found.name == "benchmark_peers_cpu"
    assert found.arms[0] == "ours"
    assert {"bilinear", "naf", "uplift"} <= set(found.arms)
    assert set(peers()) - set(found.arms) == {"featup_implicit", "upsample_anything", "vit_up"}
    assert [case.image for case in cases_of(resolved(config("preset=peers", "forward=null")))] == [112, 224, 448, 1024]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["arms=[naf,readout]"], "arms head and readout give classes and the others features"),
        (["arms=[unheard_of]"], "arms must be one of dense, .*peers, .*naf"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_peers_cannot_be_measured_in(overrides, message):
    with pytest.raises(SettingError, match=message):
        resolved(config(*overrides))
