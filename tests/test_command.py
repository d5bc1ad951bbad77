"""The shell of all commands: one line for what is expected, a traceback for defects, quotes, Ctrl-C, progress."""

import ast
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import core
from experiments import progress, sync
from experiments.command import CONFIGS, _unreadable, command, quoted_override
from experiments.data.feature_cache import FeatureCache
from experiments.data.image_files import NoImages, collect
from experiments.errors import Interrupted, Told
from experiments.progress import Progress
from experiments.settings import SettingError

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if "@command" in path.read_text().split('"""', 2)[2]
)
RUN = {"capture_output": True, "text": True, "timeout": 300, "env": os.environ | {"PYTHONPATH": str(ROOT)}}


def test_every_command_goes_through_the_shell():
    """And nothing else calls Hydra's main, or has a logging block of its own."""
    assert {"train", "evaluate", "ablate", "upsample", "power", "report", "sync", "benchmark"} <= set(COMMANDS)
    for path in (ROOT / "experiments").rglob("*.py"):
        uses = "hydra.main" in path.read_text()
        assert uses == (path.name == "command.py"), path
    for name in COMMANDS:
        assert (CONFIGS / f"{name}.yaml").exists(), name
    for path in CONFIGS.glob("*.yaml"):
        if path.name != "demo.yaml":  # which writes no log file
            assert ("job_logging" in path.read_text()) == (path.name == "command.yaml"), path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_thin(name):
    """Its main takes a configuration and hands it on."""
    tree = ast.parse((ROOT / f"experiments/{name}.py").read_text())
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.end_lineno - main.lineno <= 16


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (SettingError("steps must be at least 1"), 2, "steps must be at least 1"),
        (core.WeightsError("x is damaged"), 2, "x is damaged"),
        (FileNotFoundError("no such file"), 2, "no such file"),
        (Interrupted("stopped after step 3"), 130, "stopped after step 3"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_expected_is_one_line(raised, code, message, caplog):
    def main(config):
        raise raised

    with pytest.raises(SystemExit) as left:
        command(main).__wrapped__(OmegaConf.create())
    assert left.value.code == code
    assert caplog.messages == [message]


def test_a_defect_keeps_its_traceback():
    def main(config):
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        command(main).__wrapped__(OmegaConf.create())
    assert not issubclass(KeyError, Told)


@pytest.mark.parametrize("result", [0, None, False])
def test_success_is_no_exit(result):
    assert command(lambda config: result).__wrapped__(OmegaConf.create()) is None


@pytest.mark.parametrize(
    ("override", "quoted"),
    [
        ("images=a b(1).jpg", 'images="a b(1).jpg"'),
        ("name=größe", 'name="größe"'),
        ("data.path=[my folder,b(1)]", 'data.path=["my folder","b(1)"]'),
        ('name=a "b" (c)', 'name="a \\"b\\" (c)"'),
    ],
)
def test_overrides_that_cannot_be_read_are_quoted_for_the_user(override, quoted):
    said = _unreadable(["steps=3", override])
    assert said.startswith(f"{override}: a value with spaces")
    (suggested,) = shlex.split(said.rsplit(": ", 1)[1])  # what a shell makes of it
    assert suggested == quoted == quoted_override(override)
    value = OverridesParser.create().parse_override(suggested).value()
    expected = override.partition("=")[2]
    assert [str(one) for one in value] == ["my folder", "b(1)"] if isinstance(value, list) else value == expected


@pytest.mark.parametrize("arguments", [[], ["steps=3", "+x=[1,2]", "~data", "--help", "images='a b'", "a=null"]])
def test_overrides_that_can_be_read_are_left_alone(arguments):
    assert _unreadable(arguments) is None


def test_the_command_line_says_how_to_quote(tmp_path):
    done = subprocess.run([sys.executable, "-m", "experiments.upsample", "images=a b(1).jpg"], cwd=tmp_path, **RUN)
    assert done.returncode == 2
    assert """'images="a b(1).jpg"'""" in done.stderr
    assert "Traceback" not in done.stderr
    assert "LexerNoViableAlt" not in done.stderr


def test_ctrl_c_ends_a_training_with_one_line(tmp_path):
    """It says at which step, and the same command goes on from there."""
    overrides = ["embed_dim=16", "unifier.num_basis=8", "attention.num_heads=2", "backbones=[{name: hog8}]",
                 "views.view=32", "data.path=[bundled]", "batch_size=1", "steps=100000", "checkpoint_every=1",
                 "objective.self_consistency=0", "validate_every=0", "tracking.enabled=false", "device=cpu",
                 "out_dir=out"]  # fmt: skip
    line = [sys.executable, "-m", "experiments.train", *overrides]
    environment = RUN["env"] | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        line, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    ) as running:  # fmt: skip
        state = tmp_path / "out/state.safetensors"
        for _ in range(1200):
            if state.exists() or running.poll() is not None:
                break
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=120)[1]
    assert running.returncode == 130, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("ERROR stopped by Ctrl-C after step")
    assert "the same command goes on from the state in out/state.safetensors" in last
    assert "few photographs that come with this package" in said, "a demonstration is called one"


# --- progress --------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def no_terminal(monkeypatch, caplog):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO)
    return caplog


def test_long_work_without_a_terminal_says_how_far_it_is(no_terminal):
    clock = Clock()
    for _ in Progress(range(10), "depth", "arm", clock=clock):
        clock.now += 20
    assert no_terminal.messages == [
        "depth: arm 2 of 10, 0:00:40, about 0:02:40 left",
        "depth: arm 4 of 10, 0:01:20, about 0:02:00 left",
        "depth: arm 6 of 10, 0:02:00, about 0:01:20 left",
        "depth: arm 8 of 10, 0:02:40, about 0:00:40 left",
        "depth: arm 10 of 10, 0:03:20",
    ]


def test_short_work_says_nothing(no_terminal):
    clock = Clock()
    for _ in Progress(range(10), "depth", "arm", clock=clock):
        clock.now += 1
    assert no_terminal.messages == []


def test_work_that_goes_on_is_estimated_from_what_was_done_now(no_terminal):
    clock = Clock()
    shown = Progress(None, "training", "step", total=1000, initial=900, clock=clock)
    for step in range(50):
        clock.now += 1
        shown.note = f"loss {step}"
        shown.update()
    assert no_terminal.messages == ["training: step 930 of 1000, 0:00:30, about 0:01:10 left, loss 29"]
    shown.close()
    assert len(no_terminal.messages) == 1, "it has not ended"


def test_nothing_is_said_for_another_process(no_terminal):
    clock = Clock()
    shown = Progress(None, "training", total=2, shown=False, clock=clock)
    clock.now += 100
    shown.update()
    assert no_terminal.messages == []


# --- messages name the setting that is wrong -------------------------------------------------------------------------


def test_a_spool_that_is_not_there_is_no_success(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        sync.main.__wrapped__(OmegaConf.create({"spool_dir": str(tmp_path / "typo")}))
    assert left.value.code == 2
    assert "there is no such folder" in caplog.text
    sync.main.__wrapped__(OmegaConf.create({"spool_dir": sync.DEFAULT_SPOOL}))
    assert "Nothing to upload" in capsys.readouterr().out
    assert OmegaConf.load(CONFIGS / "sync.yaml").spool_dir == sync.DEFAULT_SPOOL


def test_a_cache_that_is_a_file_is_called_by_its_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"cache.folder=.*file cannot be written to"):
        FeatureCache(tmp_path / "file")


def test_images_that_are_not_there_recommend_what_every_command_has():
    with pytest.raises(NoImages) as raised:
        collect("nowhere/at/all.jpg")
    assert "write `bundled` instead" in str(raised.value)
    assert "images=" not in str(raised.value)
