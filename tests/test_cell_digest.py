"""The digest of a class of a notebook's cell changes with everything that the class does, and with nothing else."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from experiments.data.cell_digest import cell_digest

CELL = '''
import functools, torch
from enum import Enum
from somebodys_module import helper
import somebodys_module
SIZES = [1, 2]
SCALES = {"a": 1.0}
WEIGHT = torch.tensor([1.0, 2.0])
KINDS = {"x", "y", "z"}
UNUSED = 1
class Mode(Enum):
    FAST = 1
class Box:
    def __init__(self): self.inside = 5
BOX = Box()
def twice(x): return 2 * x
def factory(amount):
    def scaled(x): return amount * x
    return scaled
three = factory(3)
part = functools.partial(twice, x=1)
class Base(torch.nn.Module):
    rates = {"gate": 10.0}
    def forward(self, x):
        """Says what."""
        return super().forward(x) if x else three(x) + SIZES[0] + SCALES["a"] + WEIGHT + BOX.inside
class Idea(Base):
    """An idea."""
    def __init__(self, width: int = 1): super().__init__()
    @torch.no_grad()
    def still(self, x): return x + 11
    @staticmethod
    def fixed(x): return x + 12
    @property
    def half(self): return 13
    @functools.cached_property
    def kept(self): return 14
    def named(self, x):
        try: return x in KINDS, Mode.FAST, part(), helper(x), somebodys_module.helper(x)
        except ValueError: return x in {"p", "q", "r"}
'''
CHANGES = {
    "a list": ("SIZES = [1, 2]", "SIZES = [1, 3]"),
    "a mapping": ('SCALES = {"a": 1.0}', 'SCALES = {"a": 2.0}'),
    "a tensor": ("[1.0, 2.0]", "[1.0, 3.0]"),
    "a set": ('"x", "y", "z"', '"x", "y"'),
    "a mode": ("FAST = 1", "FAST = 2"),
    "an instance": ("self.inside = 5", "self.inside = 6"),
    "what a closure holds": ("factory(3)", "factory(4)"),
    "what a partial holds": ("x=1)", "x=2)"),
    "a helper": ("2 * x", "3 * x"),
    "a class attribute": ('"gate": 10.0', '"gate": 20.0'),
    "a default": ("width: int = 1", "width: int = 2"),
    "the type of a setting": ("width: int = 1", "width: float = 1"),
    "behind a decorator": ("x + 11", "x + 21"),
    "a static method": ("x + 12", "x + 22"),
    "a property": ("return 13", "return 23"),
    "a cached property": ("return 14", "return 24"),
    "what is caught": ("except ValueError", "except KeyError"),
    "names of methods": ("def still", "def fixed_too"),
}
SAME = {
    "nothing": ("", ""),
    "what is not used": ("UNUSED = 1", "UNUSED = 2"),
    "a docstring": ("Says what.", "Says it otherwise."),
    "the docstring of the class": ("An idea.", "The idea."),
    "lines": ("SIZES =", "\n\n# a comment\nSIZES ="),
}


@pytest.fixture(autouse=True)
def somebodys_module(tmp_path, monkeypatch):
    path = tmp_path / "somebodys_module.py"
    path.write_text("def helper(x): return x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("somebodys_module", None)


def digest(before="", after=""):
    assert before in CELL
    namespace = {"__name__": "__main__"}
    exec(CELL.replace(before, after), namespace)
    return cell_digest(namespace["Idea"])


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_class_does_counts(change):
    assert digest(*CHANGES[change]) != digest()


@pytest.mark.parametrize("change", SAME)
def test_what_it_does_not_do_does_not_count(change):
    assert digest(*SAME[change]) == digest()


def test_a_module_of_the_users_own_counts(somebodys_module):
    before = digest()
    somebodys_module.write_text("def helper(x): return x + 1\n")
    assert digest() != before


def test_it_is_the_same_in_another_process(tmp_path):
    code = f"""
from experiments.data.cell_digest import cell_digest
namespace = {{"__name__": "__main__"}}
exec({CELL!r}, namespace)
print(cell_digest(namespace["Idea"]))"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == digest()
