"""`anyup-lab COMMAND [key=value ...]`, the same as `python -m anyup_lab.experiments.COMMAND [key=value ...]`."""

import importlib
import os
import sys

from anyup_lab.folders import PACKAGE, ROOT


def commands() -> list[str]:
    """Their names: files of experiments/ that have a configuration, and those that write new files."""
    configured = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    files = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    return sorted(name for name in files if name in configured - {"command"} or name.startswith("new_"))


def main() -> None:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-sc", "--shell-completion"):
        _complete()
    elif name not in commands():
        asked = name in ("-h", "--help")
        said = "" if asked else f"ERROR no command is called {name}\n"
        print(f"{said}anyup-lab COMMAND [key=value ...]; commands: {', '.join(commands())}", file=sys.stderr)
        sys.exit(0 if asked else 2)
    else:
        sys.argv[:2] = [f"anyup-lab {name}"]
        _run(name)


def _complete() -> None:
    """Hydra's completion: the shell asks with what was typed so far in COMP_LINE, whose second word is the command."""
    typed = os.environ.get("COMP_LINE", "").partition(" ")[2]
    name, more, _ = typed.partition(" ")
    sys.argv[0] = "anyup-lab"
    if name in commands() and more:
        os.environ["COMP_LINE"] = typed  # Hydra leaves out the first word
        os.environ["COMP_POINT"] = str(len(typed))
        _run(name)
    elif sys.argv[2:] and sys.argv[2].startswith("query="):
        print(" ".join(commands()))
    else:
        _run("sync")  # what it prints for install= is the same for every command


def _run(name: str) -> None:
    importlib.import_module(f"{PACKAGE}.experiments.{name}").main()


if __name__ == "__main__":
    main()
