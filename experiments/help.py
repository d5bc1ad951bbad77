"""The text of a command's `--help`: what it does, examples, its settings, and its choices with a line on each."""

import inspect
import re
from collections.abc import Container
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from core.backbones.table import CHOICES
from core.registry import class_of

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
_MORE = """\
More: --cfg job shows the settings as your overrides make them; --hydra-help lists Hydra's own flags; -m runs several
(KEY=A,B,...). A value with spaces or brackets needs two pairs of quotes: 'images="a b.jpg"'."""


def help_text(name: str) -> str:
    """The help of the command with the configuration `configs/NAME.yaml`, and no other command's groups."""
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    about, examples = _header(text)
    settings = re.split(r"^defaults:\n(?:[ #].*\n)*", text, maxsplit=1, flags=re.MULTILINE)[-1].strip()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose(name, return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        chosen = {key: choice for key, choice in config.hydra.runtime.choices.items() if not key.startswith("hydra")}
        options = {key: loader.get_group_options(key.partition("@")[0]) for key in chosen}
    parts = [about, "Examples:\n" + "\n".join(examples) if examples else "", f"Results:\n{_results(name, config)}"]
    if chosen:
        parts += ["Choices, GROUP=NAME (* by default; the settings of a choice are GROUP.KEY=VALUE):"]
    parts += [_group(key, chosen[key], options[key], chosen) for key in sorted(chosen) if len(options[key]) > 1]
    return "\n\n".join(part for part in [*parts, f"Settings, KEY=VALUE:\n{settings}", _MORE] if part)


def _header(text: str) -> tuple[str, list[str]]:
    """The comment at the top of a configuration: what the command does, and the indented lines, which are examples."""
    lines = [line[1:] for line in re.match(r"(?:#.*\n)*", text)[0].splitlines()]
    examples = [line.rstrip() for line in lines if line.startswith("   ")]
    return "\n".join(line.strip() for line in lines if not line.startswith("   ")), examples


def _results(name: str, config: DictConfig) -> str:
    """Where the command writes: its setting `out_dir` with its comment, and the record of the run."""
    places = []
    for file in (name, *re.findall(r"^  - (\w+)$", (CONFIGS / f"{name}.yaml").read_text("utf-8"), re.MULTILINE)):
        path = CONFIGS / f"{file}.yaml"
        if not places and path.exists():
            places = re.findall(r"^((?:out_dir|out|spool_dir): .*)$", path.read_text("utf-8"), re.MULTILINE)
    tracked = ["a record in mlflow.db and mlruns/ (tracking.enabled=false: none)"] if "tracking" in config else []
    return "\n".join(f"  {place}" for place in [*places, *tracked] or ["nothing is kept"])


def _group(key: str, chosen: str | None, options: list[str], groups: Container[str]) -> str:
    """A group's choices, one a line; of data for another purpose only where they are listed."""
    head, group, width = f"{key}=NAME", key.partition("@")[0], max(map(len, options))
    if group != key and group in groups:
        return f"{head}, as {group}; by default {chosen}"
    lines = [f"  {'*' if name == chosen else ' '} {name:{width}}  {_line(group, name)}".rstrip() for name in options]
    return "\n".join([head if chosen else f"{head} (none by default)", *lines])


def _line(group: str, name: str) -> str:
    """One line on a choice: of its class's docstring, of the table of backbones, or of its file's comment."""
    if group == "backbone":
        row = CHOICES[name]
        return row.model or {"hog": "histograms of gradients", "daisy": "DAISY descriptors"}.get(row.kind, row.kind)
    file = CONFIGS / group / f"{name}.yaml"
    if file.exists():
        comments = [line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        return next(_first_line(line) for line in comments if not line.startswith("@"))
    return _first_line(inspect.getdoc(class_of(group, name)) or "")


def _first_line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return line if line.endswith((".", "?", "!")) or not line else f"{line} ..."
