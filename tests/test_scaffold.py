"""What `experiments.new_extension`, `new_peer` and `new_task` write passes its tests at once; and what they refuse."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from core.hooks import HOOK_POINTS
from experiments.scaffold import CannotAdd, command_line, new_extension, new_peer, new_task

FOLDERS = ("core", "extensions", "experiments", "configs", "tests", "anyup_lab")


def checkout(folder):
    """A copy of what the tests need."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_what_is_written_passes_at_once(tmp_path):
    """The new tests, and the contract tests of the new rows but for the combinations with all other fillers."""
    root = checkout(tmp_path)
    written = [path for hook in HOOK_POINTS for path in new_extension(f"made_{hook}", hook, root)]
    written += [*new_peer("made_peer", root), *new_task("made_task", root)]
    tests = {str(path) for path in written if path.parent == root / "tests"}
    assert len(tests) == len(HOOK_POINTS) + 4
    python = [path for path in written if path.parent != root / "tests"]
    assert len(python) == len(HOOK_POINTS) + 2
    lint = [sys.executable, "-m", "ruff"]
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run([*lint, *check, *map(str, written)], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    chosen = "(made_ or has_a_row) and not combination and not trains_two and not without_a_row_is_noticed"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", chosen, *sorted(tests)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    for hook in HOOK_POINTS:
        assert f'Row("{hook}", "made_{hook}"' in (root / "tests/test_contracts.py").read_text()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda root: new_extension("inr", "decoder", root), "decoder=inr exists; taken are: inr, none"),
        (lambda root: new_extension("train", "decoder", root), "test_train.py exists: choose another name"),
        (lambda root: new_extension("diffusion", "decoder", root), "test_diffusion.py exists: choose another name"),
        (lambda root: new_extension("mine", "decodr", root), r"hook=decodr: there are: .*; did you mean decoder\?"),
        (lambda root: new_extension("Mine", "decoder", root), "'Mine' is no name .*small letters"),
        (lambda root: new_extension("class", "decoder", root), "'class' is no name"),
        (lambda root: new_extension("../x", "decoder", root), "'../x' is no name"),
        (lambda root: new_peer("bilinear", root), "peer=bilinear exists"),
        (lambda root: new_task("depth", root), "task=depth exists"),
        (lambda root: new_task("mine", root / "core"), "core is no checkout of the repository.*run this in a clone"),
    ],
)
def test_what_cannot_be_added_is_refused(call, said):
    """And nothing is written."""
    before = set(ROOT.rglob("*.py"))
    with pytest.raises(CannotAdd, match=said):
        call(ROOT)
    assert set(ROOT.rglob("*.py")) == before


def test_the_command_line(capsys):
    assert command_line("usage", ["mine", "hook=decoder"], ["hook"]) == {"name": "mine", "hook": "decoder"}
    for wrong in ([], ["a", "b"], ["mine"], ["mine", "hok=decoder"], ["mine", "hook=decoder", "-x"]):
        with pytest.raises(SystemExit) as left:
            command_line("usage", wrong, ["hook"])
        assert left.value.code == 2
        assert "write usage" in capsys.readouterr().err
