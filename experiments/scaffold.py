"""Writes the files of a new idea, which pass the tests at once and start as the baseline: `experiments/templates/`.

Used by `experiments.new_extension`, `experiments.new_peer` and `experiments.new_task`.
"""

import keyword
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template

from core.atomic import replacing
from core.hooks import HOOK_POINTS, MODEL_HOOKS
from core.nearest import nearest
from core.registry import choices
from experiments.errors import Told
from experiments.measuring.tasks import tasks
from experiments.peers import peers

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = Path(__file__).parent / "templates"
MORE_IN_TESTS = {"objective": ', {"self_consistency_size": 9, "weight": 0.1}, neutral={"weight": 0}',
                 "learner": ', {"share": 0.5}, neutral={"share": 0}', "unifier": ', {"num_basis": 8}, neutral={}',
                 "attention": ', {"num_heads": 2}, neutral={"num_heads": 4}'}  # fmt: skip
"""Settings in the contract tests' row, and those that make it the baseline."""


class CannotAdd(Told, ValueError):
    """A name that is taken or no name, no such hook point, or a folder that is no checkout; says which."""


@dataclass(frozen=True)
class Row:
    """A line for a table of contract tests."""

    file: str
    before: str
    """The line of that file that follows the table."""
    line: str


def new_extension(name: str, hook: str, root: Path = ROOT) -> list[Path]:
    """Writes `extensions/NAME.py`, its row among the contract tests, and `tests/test_NAME.py` -> these files.

    Raises:
        CannotAdd: as the class says; then nothing is written.
    """
    if hook not in HOOK_POINTS:
        raise CannotAdd(f"hook={hook}: there are: {', '.join(HOOK_POINTS)}{nearest(hook, HOOK_POINTS)}")
    settings = MORE_IN_TESTS.get(hook, ", neutral={}")
    row = Row("tests/test_contracts.py", "]\nMODEL_ROWS", f'    Row("{hook}", "{name}"{settings}),\n')
    test = "model" if hook in MODEL_HOOKS else hook
    return _write(root, name, hook, (hook, f"extensions/{name}.py"), test, row)


def new_peer(name: str, root: Path = ROOT) -> list[Path]:
    """Writes `experiments/peers/NAME.py`, its row among the contract tests, and a test; as `new_extension`."""
    row = Row("tests/test_peer_contracts.py", "}\nevery_peer", f'    "{name}": Row("sum 1", {{"amount": 0.5}}),\n')
    return _write(root, name, "peer", ("peer", f"experiments/peers/{name}.py"), "peer", row)


def new_task(name: str, root: Path = ROOT) -> list[Path]:
    """Writes `experiments/measuring/tasks/NAME.py` and a test; as `new_extension`. Tasks have no table of contracts."""
    return _write(root, name, "task", ("task", f"experiments/measuring/tasks/{name}.py"), "task", None)


def _write(root: Path, name: str, group: str, source: tuple[str, str], test: str, row: Row | None) -> list[Path]:
    needed = [root / folder for folder in ("tests", "extensions", "experiments/peers")]
    if missing := [folder for folder in needed if not folder.is_dir()]:
        raise CannotAdd(
            f"{root} is no checkout of the repository, {missing[0]} is missing: run this in a clone, installed with "
            "`make setup` or `pip install -e .`"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise CannotAdd(f"{name!r} is no name for a file and a class: use small letters, digits and _, a letter first")
    if name in (taken := _taken(group)):
        raise CannotAdd(f"{group}={name} exists; taken are: {', '.join(sorted(taken))}")
    template, file = source
    words = {"name": name, "hook": group, "cls": "".join(part.capitalize() for part in name.split("_"))}
    texts = {root / file: _filled(template, words), root / f"tests/test_{name}.py": _filled(f"test_{test}", words)}
    if there := [path for path in (*texts, (root / file).with_suffix("")) if path.exists()]:
        raise CannotAdd(f"{there[0]} exists: choose another name, or remove it")
    if row is not None:
        table = (root / row.file).read_text(encoding="utf-8")
        if table.count(row.before) != 1:
            raise CannotAdd(f"{root / row.file} has no table that ends before {row.before.splitlines()[-1]}")
        texts[root / row.file] = table.replace(row.before, row.line + row.before)
    for path, text in texts.items():
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")
    return list(texts)


def _taken(group: str) -> dict[str, type]:
    """All registered choices of a group, here and in installed packages."""
    return {"peer": peers, "task": tasks}.get(group, partial(choices, group))()


def _filled(template: str, words: dict[str, str]) -> str:
    return Template((TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")).substitute(words)


def command_line(usage: str, arguments: Sequence[str], keys: Sequence[str] = ()) -> dict[str, str]:
    """NAME and KEY=VALUE arguments; on anything else, or --help, says how to use the command, and exits."""
    names = [argument for argument in arguments if "=" not in argument and not argument.startswith("-")]
    pairs = [argument.partition("=")[::2] for argument in arguments if "=" in argument]
    if {"-h", "--help"} & set(arguments):
        print(usage)
        sys.exit(0)
    if len(names) != 1 or sorted(key for key, _ in pairs) != sorted(keys) or len(names) + len(pairs) < len(arguments):
        print(f"ERROR {' '.join(arguments) or 'no name'}: write {usage}", file=sys.stderr)
        sys.exit(2)
    return {"name": names[0], **dict(pairs)}


def write_as_asked(usage: str, write: Callable[..., list[Path]], tests: str, keys: Sequence[str] = ()) -> None:
    """The whole of a command: reads its arguments, writes the files, and says how to go on with pytest and `tests`."""
    given = command_line(usage, sys.argv[1:], keys)
    try:
        written = write(**given)
    except Told as error:
        print(f"ERROR {error}", file=sys.stderr)
        sys.exit(2)
    print("Written:", *(f"  {path}" for path in written), sep="\n")
    print(f"\nCheck it: pytest tests/test_{given['name']}.py {tests.format_map(given)}".rstrip())
