"""`make gpu`: its dry run on CPU, what it refuses, and that no piece of its work takes the others' place."""

import csv
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import core
from core.checkpoint import BUNDLED
from experiments import gpu
from experiments.cost import correctness
from experiments.cost import gpu as engine
from experiments.cost.benchmark import Row
from experiments.cost.correctness import CHECKS, Check, Inputs, errors
from experiments.cost.gpu import Measured
from experiments.cost.measure import arithmetic
from experiments.cost.supervised import Job, Outcome, supervise
from experiments.settings import SettingError

ROOT = Path(__file__).resolve().parent.parent
DRY = ["device=cpu", "num_warmup=0", "num_runs=3", "image=64", "output=32", "dtypes=[float32]"]


def config(*overrides: str):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("gpu", [*DRY, *overrides])


# The whole, on a small scale


def test_a_dry_run_writes_all_tables_without_mlflow(tmp_path):
    """As `make gpu` runs it, in processes that cannot import MLflow; what is too large for its time is told as such."""
    (tmp_path / "mlflow.py").write_text("raise ImportError('nobody asked for MLflow')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "MLFLOW_TRACKING_URI": "http://nowhere.invalid"}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.gpu", *DRY, "checks=[outputs,determinism]", f"out_dir={tmp_path / 'out'}",
         f"weights=[{BUNDLED['bundled']}]",
         "points=[{size: 32/8/5, dtype: float32, arms: [dense, ours], seconds: 100},"
         " {size: 1024/8/700, dtype: float32, arms: [ours], seconds: 0.1}]", "hydra.run.dir=hydra"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr[-3000:]  # 1: this processor rounds ours worse than the reference
    out = tmp_path / "out"
    names = ("benchmark_gpu.csv", "benchmark_gpu.md", "benchmark_gpu.png")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*names, "benchmark_gpu_correctness.csv", "benchmark_gpu_correctness.md"]
    )
    checks = list(csv.DictReader((out / "benchmark_gpu_correctness.csv").read_text().splitlines()))
    assert [(row["check"], row["arm"]) for row in checks] == [
        *[("output", arm) for arm in ("released", "ours")],
        *[(f"same {what} twice", "ours") for what in ("gradient", "output")],
    ]
    assert all(row["status"].startswith(("ok", "less accurate")) and row["l2"] for row in checks)
    assert done.returncode == any(row["status"] != "ok" for row in checks)
    costs = list(csv.DictReader((out / "benchmark_gpu.csv").read_text().splitlines()))
    assert [(row["arm"], row["image"]) for row in costs] == [("dense", "32"), ("ours", "32"), ("ours", "1024")]
    assert all(float(row["time_ms"]) > 0 for row in costs[:2])
    assert costs[2]["status"] == "ended: it took longer than 0.1 s"
    for name in ("benchmark_gpu.md", "benchmark_gpu_correctness.md"):
        text = (out / name).read_text()
        assert "python -m experiments.gpu device=cpu" in text
        assert "UNFINISHED" not in text


def test_what_is_known_is_in_the_tables_before_the_end(tmp_path, monkeypatch):
    """Cut off anywhere, the files are whole and say that they are not all."""
    made = config("checks=[outputs]", "points=[{size: 32/8/5, dtype: float32, arms: [ours], seconds: 9}]")
    made.out_dir, seen = str(tmp_path), []

    def outcomes(jobs, _):
        for job in jobs:
            seen.append((tmp_path / "benchmark_gpu_correctness.md").read_text())
            yield Outcome(job, 0.0, lost="not done: no time was left")

    monkeypatch.setattr(engine, "supervise", outcomes)
    known = gpu.measure(made)
    assert [text.count("no time was left") for text in seen] == [0, 1, 2]
    assert [f"UNFINISHED: {done} of 3 pieces." in text for done, text in enumerate(seen)] == [True] * 3
    assert (
        {check.status for check in known.checks} == {row.status for row in known.rows} == {"not done: no time was left"}
    )
    assert not known.defective


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device=cuda:7"], "device=cuda:7 cannot be used"),
        (["checks=[speed]"], "checks must be one of outputs, gradients"),
        (["dtypes=[float8]"], "dtypes must be one of float32"),
        (["weights=[/nowhere.pth]"], "weights: checkpoint /nowhere.pth: there is no such file"),
        (["seconds=0"], "seconds must be a positive number"),
        (["image=16"], "image must be a whole number from 32"),
        (["points=[{size: 32/8/5}]"], "points: each has size, dtype, arms and seconds"),
        (["points=[{size: 33/8/5, dtype: float32, arms: [ours], seconds: 9}]"], "must be a whole number of patches"),
        (["points=[{size: 32/8/5, dtype: float32, arms: [fast], seconds: 9}]"], "arms must be one of dense, ours"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(tmp_path, overrides, message):
    with pytest.raises(SettingError, match=message):
        gpu.measure(config(f"out_dir={tmp_path}", *overrides))


def test_what_is_measured_by_default_can_be_composed(monkeypatch):
    """All points of the command as it is, though this machine has no GPU: sizes and dtypes that were asked for."""
    monkeypatch.setattr(engine, "check_arms", lambda *_: None)
    cases = [case for case, _ in engine._point_jobs(config()).values()]
    assert {(case.image, case.dtype) for case in cases} >= {
        (side, dtype) for side in (224, 448, 896, 1024, 2048) for dtype in ("float32", "bfloat16")
    }


# Correctness


@pytest.fixture
def inputs() -> Inputs:
    return Inputs("cpu", str(BUNDLED["bundled_released"]), {"name": "embedded"}, "coffee", 64, 32)


@pytest.mark.parametrize("name", ["gradients", "exported"])
def test_ours_passes(inputs, name):
    with arithmetic(1, tf32=False):  # as it is measured: an export must not mind
        found = CHECKS[name](inputs, "float32")
    assert found[-1].arm in ("ours", "exported")
    assert {check.dtype for check in found} == {"float32"}
    assert all(0 < check.l2 < 1e-2 for check in found)  # rounding is 6e-8, magnified by what cancels


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_arm_that_computes_something_else_is_told(inputs, dtype, monkeypatch):
    """Whatever the dtype rounds: one part in two is more."""
    run = correctness.Example.run

    def off(self, network, precision):
        result = run(self, network, precision)
        return result * (1.5 if isinstance(network, core.AnyUp) else 1)

    monkeypatch.setattr(correctness.Example, "run", off)
    released, ours = CHECKS["outputs"](inputs, dtype)
    assert released.status == "ok"
    assert ours.status.startswith("less accurate: ")
    assert Measured(1, checks=[ours]).defective
    assert Measured(1, rows=[Row(None, "ours", "cpu", 1, None, 0, status="wrong: differs")]).defective
    assert not Measured(1, checks=[Check("output", "a", dtype, "ours", status="out of memory: 1 GB")]).defective


def test_errors_are_shares_of_the_truth():
    truth = torch.tensor([[3.0, -4.0]])
    assert errors(truth, truth) == (0, 0)
    assert errors(truth * 1.5, truth) == (0.5, 0.5)
    assert errors(truth + torch.tensor([[5.0, 0.0]]), truth) == (1.0, 1.25)


# Work that may take too long


def test_each_piece_has_its_own_time():
    """One that hangs, one that fails and one that kills its process are lost alone; those that end well share one."""
    jobs = [
        Job("first", 60, os.getpid),
        Job("second", 60, os.getpid),
        Job("hangs", 0.2, partial(time.sleep, 1000)),
        Job("third", 60, os.getpid),
        Job("fails", 60, fail),
        Job("raises", 60, lack),
        Job("dies", 60, partial(os._exit, 3)),
        Job("full", 60, run_out),
    ]
    found = {outcome.job.name: outcome for outcome in supervise(jobs, 500)}
    assert list(found) == [job.name for job in jobs]
    assert found["first"].result == found["second"].result
    assert len({found[name].result for name in ("second", "third")} | {os.getpid()}) == 3
    assert found["hangs"].lost == "ended: it took longer than 0.2 s"
    assert found["fails"].lost == "failed: for a reason"
    assert found["raises"].lost == "failed: FileNotFoundError: no compiler"
    assert found["dies"].lost.startswith("failed: its process ended with exit code 3")
    assert found["full"].lost.startswith("out of memory: ")


def fail():
    raise RuntimeError("for a reason\nand more")


def lack():
    raise FileNotFoundError("no compiler\nanywhere")


def run_out():
    raise MemoryError


def test_when_the_time_is_over_nothing_is_begun():
    started = time.monotonic()
    outcomes = list(supervise([Job(str(i), 1000, partial(time.sleep, 1000)) for i in range(4)], 3))
    assert all(outcome.lost for outcome in outcomes)
    assert outcomes[-1].lost == "not done: no time was left"
    assert time.monotonic() - started < 300  # of 4000 s
