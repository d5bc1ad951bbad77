"""The benchmark: what it measures, what it refuses, what it records when an arm fails, and how sure it is."""

import csv
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch
from hydra import compose, initialize_config_dir

import core
from core.reference import reference_of
from experiments import benchmark as module
from experiments.benchmark import benchmark
from experiments.cost import benchmark as engine
from experiments.cost import measure
from experiments.cost.benchmark_arms import PreparedArm, forward_flops, make_arm, make_batch
from experiments.cost.benchmark_cases import cases_of, dense_bytes, queries_at_once, resolved
from experiments.settings import SettingError

ROOT = Path(__file__).parent.parent
QUICK = ("tracking.enabled=false", "device=cpu", "forward=[32/8/5]", "training=[]", "num_runs=3")
CPU = torch.device("cpu")


def config(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return compose("benchmark", [*QUICK, *overrides])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_children(monkeypatch):
    """Measuring memory and counting operations takes seconds: most tests do without."""
    monkeypatch.setattr(engine, "peak_in_child", lambda prepare, limit: 12_345_678)
    monkeypatch.setattr(engine, "forward_flops", lambda network, case: 10**9)


def break_arm(monkeypatch, broken, change):
    """Puts `change(arm)` in place of the arm called `broken`."""

    def make(name, *rest):
        arm = make_arm(name, *rest)
        return change(arm) if name == broken else arm

    monkeypatch.setattr(engine, "make_arm", make)


def read_csv(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


# What is measured


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ("forward=[32/8/5/21]", "float32"),
        ("forward=[32/8/5]", "bfloat16"),
        ("forward=[] training=[32/8/5/8]", "float32"),
        ("forward=[] training=[32/8/5/8]", "bfloat16"),
    ],
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMSNorm under autocast
def test_rows_have_all_fields(no_children, size, dtype):
    dense, ours = benchmark(config(*size.split(), f"dtype={dtype}"))
    assert (dense.arm, ours.arm) == ("dense", "ours")
    assert dense.status == ours.status == "ok"
    for row in (dense, ours):
        assert row.case.dtype == dtype
        assert row.num_runs == 3
        assert row.num_warmup == 1
        assert row.threads == 1
        assert 0 < row.time_min_ms <= row.time_ms
        assert 0 < row.cpu_min_ms <= row.cpu_ms
        assert row.memory_mb == pytest.approx(12.345678)
    assert (ours.against, dense.against) == ("dense", "")
    assert ours.ratio_low <= ours.ratio <= ours.ratio_high
    assert ours.cpu_ratio > 0
    assert 0 <= ours.difference < 1e-4 * (1 if dtype == "float32" else 3000)
    # the published attention carries value and output projections and a key bias that nobody reads
    assert dense.parameters - ours.parameters == 2 * 128 * 128 + 3 * 128
    if not ours.case.training:
        side, itemsize = ours.case.output, 4 if dtype == "float32" else 2
        budget = 1.1 * itemsize * (5 * side**2 + 3 * 128 * 32**2)
        assert ours.of_budget == pytest.approx(12_345_678 / budget)
        assert dense.of_budget is None


def test_a_training_step_trains_with_the_objective_without_self_consistency(monkeypatch):
    settings = resolved(config("training=[32/8/5/8]", "forward=[]"))
    (case,) = cases_of(settings)
    assert settings.objective.self_consistency == 0
    assert case.batch == 4
    assert case.output == 8
    built, real = [], core.from_config
    monkeypatch.setattr(core, "from_config", lambda values: built.append(real(values)) or built[-1])
    arm = make_arm("ours", case, settings, make_batch(case, CPU))
    before = {name: weight.clone() for name, weight in built[0].state_dict().items()}
    (losses,) = arm.call()  # a learner gives the losses of each task
    assert sorted(losses) == ["input_consistency_loss", "reconstruction_loss"]
    assert all(not torch.equal(before[name], weight) for name, weight in built[0].state_dict().items())
    assert built[0].training


def test_the_gradient_compared_is_that_of_every_weight_in_the_same_order(monkeypatch):
    settings = resolved(config("training=[32/8/5/8]", "forward=[]"))
    (case,) = cases_of(settings)
    dense, ours = (make_arm(name, case, settings, make_batch(case, CPU)).outcome() for name in ("dense", "ours"))
    count = sum(weight.numel() for weight in core.from_config(settings).parameters())
    assert dense.shape == ours.shape == (count, 1)
    assert measure.difference(ours, dense) < 1e-4 < measure.difference(ours.flip(0), dense)


def test_compiling_is_one_more_arm(no_children, monkeypatch):
    asked = resolved(config("compile=true"))
    assert asked.arms == ["dense", "ours", "compiled"]
    assert asked.compile is False
    assert resolved(config("arms=[ours,compiled]")).arms == ["ours", "compiled"]
    compiled = []
    monkeypatch.setattr(core.AnyUp, "compile_encoders", lambda model: compiled.append(model) or model)
    rows = benchmark(config("compile=true"))
    assert [row.arm for row in rows] == ["dense", "ours", "compiled"]
    assert all(row.ratio for row in rows[1:])
    assert len(compiled) == 2  # once to see that it can be, once for the arm


def test_classes_of_pixels_by_readout_and_by_a_head_on_features(no_children, monkeypatch):
    head, readout = benchmark(config("arms=[head,readout]", "num_classes=4"))
    assert (head.arm, readout.arm) == ("head", "readout")
    assert head.status == readout.status == "ok"
    assert readout.against == "head"
    assert 0 < readout.difference < 1e-5  # computed another way, and the same
    outputs = [make_arm(name, *_prepared("num_classes=4")).outcome() for name in ("head", "readout")]
    assert {tuple(output.shape) for output in outputs} == {(1, 4, 32, 32)}
    called = []
    monkeypatch.setattr(core.AnyUp, "readout", lambda model, *given: called.append(given))
    make_arm("readout", *_prepared()).call()
    make_arm("head", *_prepared()).call()
    assert len(called) == 1


def _prepared(*overrides):
    found = resolved(config("arms=[head,readout]", *overrides))
    (case,) = cases_of(found)
    return case, found, make_batch(case, CPU)


def test_two_rounds_give_no_interval(no_children):
    _, ours = benchmark(config("num_runs=2"))
    assert ours.ratio > 0
    assert ours.ratio_low is None
    assert f"| {ours.ratio:.2f} |" in Path("docs/benchmark_cpu.md").read_text()


def test_other_models(no_children):
    assert all(row.status == "ok" for row in benchmark(config("attention=global", "unifier.ordering=released")))
    (row,) = benchmark(config("arms=[ours]", "unifier=none"))
    assert row.status == "ok"
    assert row.ratio is None
    assert row.difference is None


def test_operations_are_counted_without_computing():
    settings = resolved(config("forward=[40/8/6/29]"))
    (case,) = cases_of(settings)
    model = core.from_config(settings)
    batch = make_batch(case, CPU)
    inputs = batch.image, batch.features, batch.output_size
    reference = reference_of(model)
    expected = measure.count_flops(lambda: reference(*inputs))
    assert expected > 0
    assert forward_flops(reference, case) == expected
    expected = measure.count_flops(lambda: model.twice_differentiable()(*inputs))
    assert expected > 0
    assert forward_flops(model, case) == expected
    assert measure.count_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5


def test_presets():
    settings = resolved(config("preset=gpu", "arms=null", "forward=null", "dtype=null", "num_runs=null"))
    assert settings.num_warmup == 10
    assert settings.num_runs == 50
    assert settings.arms == ["dense", "ours", "compiled"]
    cases = [(case.image, case.channels, case.dtype) for case in cases_of(settings)]
    assert {(side, 768, dtype) for side in (224, 448, 1024, 2048) for dtype in ("float32", "bfloat16")} <= set(cases)
    settings = resolved(config("forward=null", "training=null", "num_runs=7"))
    assert settings.num_runs == 7
    assert [case.label for case in cases_of(settings)] == [
        "224²/14, C=384",
        "448²/14, C=384",
        "1024²/16, C=768",
        "training 4 x 224²/14, C=384 -> 32²",
    ]


# What goes wrong is a result


def test_an_arm_that_computes_something_else_is_called_wrong_and_not_timed(no_children, monkeypatch, caplog):
    break_arm(monkeypatch, "ours", lambda arm: replace(arm, outcome=lambda: arm.outcome() * 1.001))
    dense, ours = benchmark(config())
    assert ours.defective
    assert ours.status.startswith("wrong: differs by 1.0e-03 of the largest value, 1e-04 are")
    assert ours.time_ms is None
    assert ours.ratio is None
    assert dense.time_ms
    assert not dense.defective
    assert "wrong: differs by" in caplog.text
    assert "wrong: differs by" in Path("docs/benchmark_cpu.md").read_text()
    assert benchmark(config("tolerance=0.01"))[1].status == "ok"
    break_arm(monkeypatch, "ours", lambda arm: replace(arm, outcome=lambda: arm.outcome() * torch.nan))
    assert benchmark(config())[1].status.startswith("wrong: differs by nan")


def raising(error, after=0):
    """An arm whose calls raise, the first `after` of them excepted."""

    def change(arm):
        calls = iter(range(10**6))

        def call():
            if next(calls) >= after:
                raise error
            return arm.outcome()

        return PreparedArm(call, call)

    return change


@pytest.mark.parametrize("after", [0, 3])  # when results are compared; between two rounds
def test_an_arm_that_runs_out_of_memory_is_a_result(no_children, monkeypatch, after):
    break_arm(monkeypatch, "dense", raising(MemoryError("no 91 GB here"), after))
    dense, ours = benchmark(config())
    assert dense.status == "out of memory: no 91 GB here"
    assert dense.time_ms is None
    assert not dense.defective
    assert ours.status == "ok"
    assert ours.num_runs == 3
    assert ours.ratio is None
    assert ours.against == ""


def test_an_arm_that_fails_does_not_end_the_others(no_children, monkeypatch, caplog):
    break_arm(monkeypatch, "dense", raising(RuntimeError("no kernel for this\nand more")))
    dense, ours = benchmark(config())
    assert dense.status == "failed: no kernel for this"
    assert dense.defective
    assert ours.time_ms
    assert any(record.exc_info for record in caplog.records)


def test_an_arm_whose_measured_peak_does_not_fit_is_not_timed(monkeypatch):
    free = psutil.virtual_memory().available
    monkeypatch.setattr(engine, "peak_in_child", lambda prepare, limit: 2 * free)
    for row in benchmark(config()):
        assert row.status.startswith("out of memory")
        assert row.memory_mb == pytest.approx(2 * free / 1e6)


def test_the_dense_algorithm_is_not_tried_where_it_cannot_fit(no_children, monkeypatch):
    settings = config("forward=[4096/8/8]", "queries_at_once=all")
    case = cases_of(resolved(settings))[0]
    pixels, keys = 4096**2, 512**2
    assert dense_bytes(case, 4, pixels) == (2 * pixels * keys, pixels * keys * 33 + pixels * 8 * 4)
    assert dense_bytes(case, 4, 64)[1] == pixels * keys + max(64 * keys * 32 + pixels * 32, 2 * pixels * 32)
    monkeypatch.setattr(engine, "make_arm", lambda name, *_: PreparedArm(int, int))
    dense, ours = benchmark(settings)
    assert dense.status.startswith("out of memory: estimated 145")
    assert "GB are free" in dense.status
    assert ours.status == "ok"


def test_queries_at_once(no_children):
    (dense, _) = benchmark(config("queries_at_once=100"))
    assert dense.queries_at_once == 100
    assert "100 queries at once" in Path("docs/benchmark_cpu.md").read_text()
    chosen = [
        queries_at_once(case, resolved(config()), CPU)
        for case in cases_of(resolved(config("forward=[224/14/384,16384/8/8]", "training=[224/14/384/32]")))
    ]
    assert chosen == [None, 8192, None]


# What is written


def test_a_killed_run_keeps_whole_tables_of_what_it_had(no_children, monkeypatch):
    real = module.run_case

    def killed_at_the_second(case, *rest):
        if case.image == 48:
            raise KeyboardInterrupt
        return real(case, *rest)

    monkeypatch.setattr(module, "run_case", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        benchmark(config("forward=[32/8/5,48/8/5]"))
    written = Path("docs/benchmark_cpu.md").read_text()
    assert "UNFINISHED: 1 of 2 sizes" in written
    assert "32²/8, C=5" in written
    assert "48²" not in written
    assert len(read_csv("docs/benchmark_cpu.csv")) == 2
    assert sorted(path.name for path in Path("docs").iterdir()) == [f"benchmark_cpu.{s}" for s in ("csv", "md", "png")]
    monkeypatch.setattr(module, "run_case", real)
    benchmark(config("forward=[32/8/5,48/8/5]"))
    assert "UNFINISHED" not in Path("docs/benchmark_cpu.md").read_text()


def test_a_run_gets_numbers_and_files(no_children, monkeypatch):
    logged, files = {}, []

    class Recorder:
        def metrics(self, values):
            logged.update(values)

        def file(self, path):
            files.append(path.name)

    @contextmanager
    def recording(config, device):
        assert config.unifier.name == "learned_basis"
        assert config.num_warmup == 1
        assert "presets" not in config
        yield Recorder()

    monkeypatch.setattr(module, "track", recording)
    rows = benchmark(config("name=mine", "out_dir=made"))
    assert files == ["mine.md", "mine.csv", "mine.png"]
    assert all(Path("made", name).is_file() for name in files)
    key = "forward_1x32_8_5_32_float32/ours"
    assert logged[f"{key}/ratio"] == rows[1].ratio
    assert logged[f"{key}/time_ms"] == rows[1].time_ms
    assert all(isinstance(value, (int, float)) for value in logged.values())


def test_the_command_line(tmp_path):
    """One real run: fresh processes for memory, of which the dense one is not even tried."""
    overrides = [*QUICK, "memory_limit_gb=0.1", "forward=[160/4/2]", f"hydra.run.dir={tmp_path}/hydra"]
    command = [sys.executable, "-m", "experiments.benchmark", *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "160²/4, C=2" in done.stdout
    assert "out of memory: estimated" in done.stdout
    written = Path("docs/benchmark_cpu.md").read_text()
    assert "    python -m experiments.benchmark tracking.enabled=false device=cpu 'forward=[32/8/5]'" in written
    for part in ("1 CPU thread", "float32", "Python 3", f"torch {version('torch')}", "commit ", "estimated 1.4 GB"):
        assert part in written
    dense, ours = read_csv("docs/benchmark_cpu.csv")
    assert dense["time_ms"] == dense["memory_mb"] == ""
    assert dense["status"].startswith("out of memory")
    assert float(ours["time_ms"]) > 0
    assert 20 < float(ours["memory_mb"]) < 100
    assert Path("docs/benchmark_cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("forward=[32/8]", "forward must list sizes as IMAGE/PATCH/CHANNELS or .*got 32/8"),
        ("forward=[32/5/4]", "forward=32/5/4: the image must be a whole number of patches"),
        ("forward=[8/8/4]", "two at least"),
        ("training=[32/8/0]", "training=32/8/0: .* nothing 0"),
        ("forward=[]", "nothing to measure"),
        ("arms=[dense,natten]", "arms must be one of dense, ours, compiled, head, readout, peers, .*, got natten"),
        ("arms=[]", "arms must name one or several"),
        ("arms=[ours,ours]", "arms must name one or several different"),
        ("dtype=float64", "dtype must be one of float32, float16, bfloat16, got float64"),
        ("preset=tpu", "preset must be one of auto, cpu, gpu, peers, got tpu"),
        ("num_runs=0", "num_runs must be a whole number from 1 up, got 0"),
        ("num_warmup=-1", "num_warmup must be a whole number from 0 up"),
        ("num_threads=1.5", "num_threads must be a whole number"),
        ("queries_at_once=some", "queries_at_once must be all, auto or a whole number"),
        ("max_seconds=-1", "max_seconds must be a positive number or null"),
        ("tolerance=exact", "tolerance must be a positive number or null, got exact"),
        ("name=a/b", "name must be a file name"),
        ("device=meta", "device must be cpu or cuda"),
        ("device=gpu", "device=gpu cannot be used"),
        ("unifier=none", "the reference is the baseline only.*arms=\\[ours\\] measures the model alone"),
        ("embed_dim=12", "embed_dim must be"),
    ],
)
def test_refusals(override, message):
    with pytest.raises(SettingError, match=message):
        benchmark(config(override))
    assert not any(path.is_file() for path in Path().rglob("*"))


def test_arms_that_give_classes_are_measured_apart():
    with pytest.raises(SettingError, match="arms head and readout give classes and the others features"):
        benchmark(config("arms=[ours,readout]"))
    with pytest.raises(SettingError, match="are measured in a forward only: add training="):
        benchmark(config("arms=[readout]", "training=[32/8/5/8]"))
    with pytest.raises(SettingError, match=r"decoder=INRDecoder is not linear.*arms are head, readout"):
        benchmark(config("arms=[head,readout]", "decoder=inr"))


def test_training_in_float16_is_refused():
    with pytest.raises(SettingError, match=r"needs a gradient scaler.*training=\[\]"):
        benchmark(config("training=[32/8/5/8]", "dtype=float16"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(SettingError, match="device=cuda cannot be used"):
        benchmark(config("device=cuda"))


def test_compiling_without_a_compiler_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SettingError, match="needs a C\\+\\+ compiler"):
        benchmark(config("compile=true"))


def test_unknown_settings_are_refused():
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException, match="num_run"):
        config("num_run=3")


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("out of memory: x", 0), ("wrong: x", 1), ("failed: x", 1)])
def test_exit_code(monkeypatch, status, code):
    rows = [engine._new_row("ours", cases_of(resolved(config()))[0], resolved(config()), CPU)]
    rows[0].status = status
    monkeypatch.setattr(module, "benchmark", lambda config: rows)
    with pytest.raises(SystemExit) if code else nullcontext() as ended:
        module.main.__wrapped__(config())  # without Hydra around it
    assert code == (ended.value.code if ended else 0)
