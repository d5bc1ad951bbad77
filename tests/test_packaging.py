"""The wheel, installed into an environment of its own, used from another folder and beside another module `core`."""

import ast
import os
import subprocess
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from hatchling.builders.wheel import WheelBuilder

import core
from anyup_lab.folders import NAMES, renamed
from experiments import api
from experiments.data.source_digest import module_digest

TINY = ["images=coffee", "max_size=64", "tracking.enabled=false", "device=cpu", "out_dir=out"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    return zipfile.ZipFile(next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> str:
    """The interpreter of a new environment with the wheel. The packages that it needs are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    wheel.extractall(packages)
    (packages / "their_packages.pth").write_text(sysconfig.get_path("purelib"))
    return str(folder / "bin" / "python")


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder with another module called core."""
    (tmp_path / "core.py").write_text("something = 1\n")
    return tmp_path


def run(python: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [python, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_wheel_has_one_name_and_all_files(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in files} == {"anyup_lab", "anyup_lab.pth"}
    for folder in NAMES:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".safetensors"):
                assert f"anyup_lab/installed/{path.relative_to(ROOT).as_posix()}" in files
    assert not [name for name in files if "__pycache__" in name]


def test_commands_run_from_another_folder(python, tmp_path):
    done = run(python, tmp_path, "-m", "experiments.upsample", *TINY)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/coffee.png").stat().st_size > 1000


def test_commands_run_beside_another_core(python, elsewhere):
    done = run(python, elsewhere, "-m", "anyup_lab", "upsample", *TINY, "decoder=inr")
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "out/coffee.png").stat().st_size > 1000


def test_plain_commands_beside_another_core_say_what_to_do(python, elsewhere):
    done = run(python, elsewhere, "-m", "experiments.upsample")
    assert done.returncode
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: another module called core is in the way: {elsewhere / 'core.py'}")
    assert "python -m anyup_lab.experiments.COMMAND" in last


def test_models_and_hub_beside_another_core(python, elsewhere):
    script = f"""
import core, sys, torch, anyup_lab
model = anyup_lab.AnyUp.from_pretrained()
image, features = torch.rand(1, 3, 32, 32), torch.rand(1, 5, 4, 4)
expected = model(image, features)
assert expected.shape == (1, 5, 32, 32) and expected.isfinite().all()
hub = torch.hub.load({str(ROOT)!r}, "anyup", source="local")
assert torch.equal(hub(image, features), expected)
assert "inr" in anyup_lab.available()
assert anyup_lab.core.__file__.startswith(sys.prefix), anyup_lab.core.__file__
import core
assert core.something == 1 and not hasattr(core, "AnyUp")
from anyup_lab.experiments.data.source_digest import module_digest
print(module_digest("experiments.peers.naf"))
"""
    done = run(python, elsewhere, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == module_digest("experiments.peers.naf"), "results are shared under both names"


def test_an_unknown_command_lists_all(python, tmp_path):
    done = run(python, tmp_path, "-m", "anyup_lab", "trian")
    assert done.returncode == 2
    assert "no command is called trian" in done.stderr
    assert "train, upsample" in done.stderr


# One namespace


def test_a_core_that_is_imported_is_the_same_module():
    """Then there is one registry, and the module's own spec stays."""
    import anyup_lab.core.anyup

    from core import anyup

    assert anyup_lab.core is core
    assert anyup_lab.core.anyup is anyup
    assert anyup.__spec__.name == "core.anyup"
    assert anyup_lab.load is core.load
    for name in anyup_lab.NOTEBOOKS:
        assert getattr(anyup_lab, name) is getattr(api, name)
    assert set(anyup_lab.NOTEBOOKS) == {name for name in api.__all__ if name.islower()}
    assert set(core.__all__) <= set(dir(anyup_lab))
    with pytest.raises(AttributeError, match="has no attribute 'Anyup'; it has: AnyUp"):
        _ = anyup_lab.Anyup


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("import core", "import anyup_lab.core as core"),
        ("import core.hooks as h", "import anyup_lab.core.hooks as h"),
        ("import json, core.hooks", "import json, anyup_lab.core.hooks as _anyup_lab, anyup_lab.core as core"),
        ("from core import hooks", "from anyup_lab.core import hooks"),
        ("from experiments.data.base import DataSet as D", "from anyup_lab.experiments.data.base import DataSet as D"),
        ("from corex import core", "from corex import core"),
        ("from .core import a", "from .core import a"),
    ],
)
def test_imports_of_our_folders_are_rewritten(line, meant):
    """Also inside functions."""
    for indented in ("{}", "def f():\n    {}"):
        assert ast.dump(renamed(indented.format(line))) == ast.dump(ast.parse(indented.format(meant)))
