"""Choices: what is offered by name, how a file that is dropped in is found, and what is refused."""

import importlib
import subprocess
import sys
from enum import Enum

import pytest
from hydra import compose, initialize
from omegaconf import OmegaConf

from core import registry
from core.registry import Choices
from experiments import data, peers
from experiments.data import DataError, data_sets
from experiments.measuring import tasks
from experiments.settings import SettingError


class Animal:
    pass


class Size(Enum):
    small = 1
    large = 2


class Refused(ValueError):
    pass


@pytest.fixture
def animals(monkeypatch, own_registry):
    """A group of its own, which no other test sees."""
    monkeypatch.setattr(registry, "_groups", list(registry._groups))
    return Choices("animal", Animal, error=Refused)


@pytest.fixture
def cat(animals):
    @animals.register("cat")
    class Cat(Animal):
        def __init__(self, lives: int, size: Size = Size.small, weight: float = 4.0, spots: tuple[int, int] = (1, 2)):
            self.lives, self.size, self.weight, self.spots = lives, size, weight, spots

    return Cat


def test_a_choice_is_made_with_settings_of_their_declared_types(animals, cat):
    made = animals.make({"name": "cat", "lives": 9, "size": "large", "weight": 5, "spots": [3, 4]})
    assert type(made) is cat
    assert (made.lives, made.size, made.spots) == (9, Size.large, (3, 4))
    assert type(made.weight) is float
    config = OmegaConf.create({"years": 7, "pet": {"name": "cat", "lives": "${years}"}})
    expected = {"name": "cat", "lives": 7, "size": Size.small, "weight": 4.0, "spots": (1, 2)}
    assert animals.settings(config.pet) == expected
    again = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(expected)))
    assert animals.settings(again) == expected


def test_hydra_offers_a_choice_under_its_group(animals, cat):
    with initialize(version_base=None, config_path=None):
        node = compose(overrides=["+animal=cat", "animal.lives=9", "animal.size=large"]).animal
    assert (animals.make(node).lives, animals.make(node).size) == (9, Size.large)


def test_a_class_without_settings_needs_no_init(animals):
    @animals.register("stone")
    class Stone(Animal):
        pass

    assert type(animals.make({"name": "stone"})) is Stone
    with pytest.raises(Refused, match="animal=stone has no setting lives; it has: no settings"):
        animals.make({"name": "stone", "lives": 9})


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "dog"}, "animal=dog is not registered; there are: cat"),
        ({"lives": 9}, "animal=None is not registered; there are: cat"),
        ({"name": "cat", "lives": 9, "legs": 4}, "animal=cat has no setting legs; it has: lives, size, weight, spots"),
        ({"name": "cat"}, r"animal=cat needs a value for lives: set animal.lives=\.\.\."),
        ({"name": "cat", "lives": "???"}, "animal=cat needs a value for lives"),
        ({"name": "cat", "lives": "many"}, "animal=cat: lives must be int, got 'many'"),
        ({"name": "cat", "lives": 9, "size": "huge"}, "animal=cat: size must be one of small, large, got 'huge'"),
        (OmegaConf.create({"name": "cat", "lives": "${nowhere}"}), "animal: .*nowhere.*; give it a value"),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_node_is_said_with_what_there_is(animals, cat, node, message):
    with pytest.raises(Refused, match=message):
        animals.make(node)


def test_the_same_definition_again_replaces_and_another_of_its_name_is_refused(animals, cat):
    again = type("Cat", (cat,), {"__module__": cat.__module__, "__qualname__": cat.__qualname__})
    assert animals.register("cat")(again) is again
    assert animals.all() == {"cat": again}
    with pytest.raises(
        ValueError, match=r"already registered by test_choices.cat.<locals>.Cat; test_choices.Other needs"
    ):
        animals.register("cat")(type("Other", (Animal,), {"__module__": "test_choices"}))
    with pytest.raises(TypeError, match="animal=dict must be a subclass of Animal"):
        animals.register("dict")(dict)
    assert animals.all() == {"cat": again}


# Dropping a file in

DROPPED = {
    "data": '''
from experiments.data.base import DataSet, register_data

@register_data("dropped")
class Dropped(DataSet):
    def __getitem__(self, index): raise NotImplementedError
''',
    "task": '''
from experiments.measuring.task import Task, register_task

@register_task("dropped")
class Dropped(Task):
    def check(self, bench): pass
    def rows(self, model, seed, bench): yield from ()
''',
    "peer": '''
from experiments.peers.base import Peer, register_peer

@register_peer("dropped")
class Dropped(Peer):
    def forward(self, image, features, output_size=None): return features
''',
}  # fmt: skip
LISTS = {"data": data_sets, "task": tasks.tasks, "peer": peers.peers}
ROOMS = {"data": data, "task": tasks, "peer": peers}


@pytest.fixture
def room(request, tmp_path, monkeypatch, own_registry):
    """A room of experiments/ that also has the modules of tmp_path."""
    package = ROOMS[request.param]
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    known = set(sys.modules)
    yield request.param, package
    for name in set(sys.modules) - known:
        del sys.modules[name]
    vars(package).pop("dropped_in", None)


@pytest.mark.parametrize("room", list(ROOMS), indirect=True)
def test_a_file_that_is_dropped_in_is_offered(room, tmp_path):
    """Even while the process runs, in a notebook say; and Hydra knows it once all is discovered."""
    group, package = room
    assert "dropped" not in LISTS[group]()
    (tmp_path / "dropped_in.py").write_text(DROPPED[group])
    assert LISTS[group]()["dropped"].__module__ == f"{package.__name__}.dropped_in"
    registry.discover()
    with initialize(version_base=None, config_path=None):
        assert compose(overrides=[f"+{group}=dropped"])[group] == {"name": "dropped"}


@pytest.mark.parametrize("room", list(ROOMS), indirect=True)
def test_a_file_that_cannot_be_imported_is_told_each_time(room, tmp_path):
    (tmp_path / "dropped_in.py").write_text("import a_package_that_nobody_has\n")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
            LISTS[room[0]]()


LAZY = """
import sys
import experiments.data, experiments.peers, experiments.measuring.tasks
print(*sorted(name for name in sys.modules if name.startswith("experiments.")))
from experiments.data import data_sets
from experiments.measuring.tasks import tasks
from experiments.peers import peers
print(*data_sets(), *tasks(), *peers())
"""


def test_importing_a_room_imports_none_of_its_choices():
    """They are imported when one is asked for; so a file of a room may import the room."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", LAZY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    imported, offered = (set(line.split()) for line in done.stdout.splitlines())
    choices = {"data.images", "data.nyuv2", "measuring.tasks.geometry", "peers.joint_bilateral"}
    assert not imported & {f"experiments.{name}" for name in choices}
    assert {"images", "nyuv2", "scenes", "depth", "normals", "bilinear", "joint_bilateral"} <= offered


def test_each_group_has_its_error():
    with pytest.raises(DataError, match="data=nothing is not registered"):
        data.open_data({"name": "nothing"})
    with pytest.raises(SettingError, match="task=nothing is not registered"):
        tasks.make_task({"name": "nothing"})
    with pytest.raises(SettingError, match="peer=nothing is not registered"):
        peers.make_peer("nothing")
