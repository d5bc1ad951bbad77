"""`anyup-lab COMMAND [key=value ...]`, the same as `python -m anyup_lab.experiments.COMMAND [key=value ...]`."""

import importlib
import sys

from anyup_lab.folders import PACKAGE, ROOT


def commands() -> list[str]:
    """Their names: files of experiments/ that have a configuration, and those that write new files."""
    configured = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    return sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem in configured - {"command"})


def main() -> None:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in commands():
        asked = name in ("-h", "--help")
        said = "" if asked else f"ERROR no command is called {name}\n"
        print(f"{said}anyup-lab COMMAND [key=value ...]; commands: {', '.join(commands())}", file=sys.stderr)
        sys.exit(0 if asked else 2)
    sys.argv[:2] = [f"anyup-lab {name}"]
    importlib.import_module(f"{PACKAGE}.experiments.{name}").main()


if __name__ == "__main__":
    main()
