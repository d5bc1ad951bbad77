"""`--help` of all commands, and what is said of a name that does not exist."""

import importlib
import re
import subprocess
import sys

import pytest
from test_command import COMMANDS, RUN

import core
from core.nearest import nearest
from core.registry import discover
from experiments.command import _wrong
from experiments.help import help_text
from experiments.peers import peer_from_config
from experiments.settings import SettingError
from experiments.sweeps.arms import composed


@pytest.fixture(scope="module", autouse=True)
def all_commands():
    for name in COMMANDS:
        importlib.import_module(f"experiments.{name}")
    discover()


def groups(text: str) -> dict[str, list[str]]:
    """Group -> the lines of its choices."""
    found = re.findall(r"^(\S+)=NAME.*\n((?:  .*\n)*)", text, re.MULTILINE)
    return {group: lines.splitlines() for group, lines in found}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_choice_has_a_line_and_every_command_an_example(name):
    text = help_text(name)
    assert text.startswith("python -m experiments.")
    assert re.search(rf"^Examples:\n   .*experiments\.{name}\b", text, re.MULTILINE)
    assert "Results:\n  " in text
    for group, lines in groups(text).items():
        for line in lines:
            assert re.fullmatch(r"  [ *] (\S+) +\S.*", line), f"{group}: {line} says nothing"


def test_a_command_lists_its_own_groups():
    model = {"unifier", "attention", "decoder", "refiner", "temporal", "objective", "learner"}
    assert set(groups(help_text("upsample"))) == model | {"backbone"}
    assert set(groups(help_text("train"))) == model | {"data", "data@val_data", "peer"}
    assert set(groups(help_text("ablate"))) == {"experiment"}
    assert groups(help_text("sync")) == {}
    assert "  * window " in help_text("upsample")
    assert "state.safetensors" in help_text("train").partition("Choices")[0]


def test_the_command_line_shows_it(tmp_path):
    done = subprocess.run([sys.executable, "-m", "experiments.sync", "--help"], cwd=tmp_path, **RUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == help_text("sync")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["attention=windw"], r"did you mean window\? There are: .*global, .*window"),
        (["unifer=none"], r"did you mean unifier\? There are: "),
        (["attention.num_head=3"], r"attention.num_head.*did you mean num_heads\? There are: .*window_ratio"),
        (["output_sise=448"], r"did you mean output_size\?"),
        (["attention.num_heads=x"], "attention.num_heads=x: Value 'x' of type 'str' could not be converted to Integer"),
        (["-m", "attention=windo,global"], r"did you mean window\?"),
    ],
    ids=str,
)
def test_what_is_misspelt_is_said_in_one_line_with_the_nearest(overrides, said):
    found = _wrong("upsample", overrides)
    assert re.search(said, found)
    assert "\n" not in found


@pytest.mark.parametrize(
    "overrides", [[], ["attention=global"], ["-m", "seed=1,2", "attention=global,window"], ["--cfg", "job", "a=1"]]
)
def test_what_is_right_is_let_through(overrides):
    assert _wrong("upsample", overrides) is None


def test_the_command_line_ends_with_code_2(tmp_path):
    done = subprocess.run([sys.executable, "-m", "experiments.sync", "spool_dri=x"], cwd=tmp_path, **RUN)
    assert done.returncode == 2
    assert done.stderr.startswith("ERROR Could not override 'spool_dri'")
    assert "did you mean spool_dir?" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("typed", "offered"), [("anyup-lab tra", {"train", "sync"}), ("anyup-lab sync spool", {"spool_dir="})]
)
def test_the_shell_completes_commands_and_keys(typed, offered, tmp_path):
    asked = RUN | {"env": RUN["env"] | {"COMP_LINE": typed, "COMP_POINT": str(len(typed))}}
    done = subprocess.run([sys.executable, "-m", "anyup_lab", "-sc", "query=bash"], cwd=tmp_path, **asked)
    assert done.returncode == 0, done.stderr
    assert offered <= {word.partition("=")[0] + "=" * ("=" in word) for word in done.stdout.split()}


def test_python_says_the_same():
    with pytest.raises(ValueError, match=r"did you mean window\?"):
        core.build(["attention=windw"])
    with pytest.raises(SettingError, match=r"did you mean steps\?"):
        composed("train", ["stesp=3"])
    with pytest.raises(SettingError, match=r"there are: .*joint_bilateral.*; did you mean bilinear\?"):
        peer_from_config("bilinaer")
    with pytest.raises(SettingError, match=r"it has: window, .*; did you mean window\?"):
        peer_from_config({"peer": "joint_bilateral", "windw": 3})


def test_what_is_like_nothing_is_not_guessed():
    assert nearest("zzz", ["window", "global"]) == ""
