"""What all commands share: Hydra with the configuration of the same name, logging, errors in one line, Ctrl-C.

The file of a command holds one function of its configuration::

    @command
    def main(config: DictConfig) -> int | None:
        print_table(train(config))

    if __name__ == "__main__":
        main()

Exit code: what the function returns (None: 0); 2 after an error that is reported in one line
(`experiments.errors.Told`, a file that cannot be used, weights that cannot be loaded), or after an override that Hydra
cannot read; 130 after Ctrl-C.
"""

import inspect
import logging
import re
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from core.nearest import in_one_line
from core.registry import discover
from core.weight_files import WeightsError
from experiments.errors import Told
from experiments.help import CONFIGS, help_text

log = logging.getLogger(__name__)

TOLD = (Told, WeightsError, OSError)


def command(run: Callable[[DictConfig], int | None]) -> Callable[[], None]:
    """Turns a function of a configuration into a command; the configuration is `configs/NAME.yaml`, NAME its file's."""

    @wraps(run)
    def told(config: DictConfig) -> None:
        try:
            code = run(config)
        except TOLD as error:
            log.error("%s", error)
            sys.exit(2)
        except KeyboardInterrupt as stopped:
            log.error("%s", str(stopped) or "stopped by Ctrl-C")
            sys.exit(130)
        if code:
            sys.exit(int(code))

    name = Path(inspect.getfile(run)).stem
    with_hydra = hydra.main(version_base=None, config_path=str(CONFIGS), config_name=name)(told)

    @wraps(told)
    def main() -> None:
        arguments = sys.argv[1:]
        if unreadable := _unreadable(arguments):
            print(f"ERROR {unreadable}", file=sys.stderr)
            sys.exit(2)
        try:
            discover()  # Hydra needs all choices before it composes
            if {"-h", "--help"} & set(arguments):
                print(help_text(name))
                return
            if wrong := _wrong(name, arguments):
                print(f"ERROR {wrong}", file=sys.stderr)
                sys.exit(2)
            with_hydra()
        except KeyboardInterrupt:  # before or after the work
            print("ERROR stopped by Ctrl-C", file=sys.stderr)
            sys.exit(130)

    return main


def _unreadable(arguments: list[str]) -> str | None:
    """What is wrong with the first override that Hydra cannot read, and how to quote it; None: it can read all."""
    parser = OverridesParser.create()
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument or _reads(parser, argument):
            continue
        quoted = quoted_override(argument)
        if quoted is None or not _reads(parser, quoted):
            return f"{argument}: cannot be read; write KEY=VALUE or KEY=[VALUE,...]"
        return (
            f"{argument}: a value with spaces, brackets, or letters beyond A-Z and digits needs quotes, and the whole "
            f"needs other quotes for the shell: {shlex.quote(quoted)}"
        )
    return None


def _wrong(name: str, arguments: list[str]) -> str | None:
    """Why Hydra cannot compose a command's configuration, with the nearest name; None: it can, or a flag asks for else.

    Of a key with several values (`-m`), the first one is looked at.
    """
    flags = {argument for argument in arguments if argument.startswith("-")}
    if flags - {"-m", "--multirun"}:
        return None
    parser, overrides = OverridesParser.create(), []
    for argument in (argument for argument in arguments if argument not in flags):
        override = argument if "=" not in argument else parser.parse_override(argument)
        several = flags and not isinstance(override, str) and override.is_sweep_override()
        first = next(override.sweep_string_iterator()) if several else ""
        overrides.append(f"{override.get_key_element()}={first}" if several else argument)
    try:
        with initialize_config_dir(str(CONFIGS), version_base=None):
            compose(name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        return in_one_line(error)
    return None


def quoted_override(override: str) -> str | None:
    """KEY=VALUE with the value, or each value of a list, in quotes; None where there is no value."""
    key, equals, value = override.partition("=")
    if not key or not equals or not value:
        return None
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{','.join(_quoted(part.strip()) for part in value[1:-1].split(','))}]"
    return f"{key}={_quoted(value)}"


def _quoted(value: str) -> str:
    if re.fullmatch(r"\"[^\"]*\"|'[^']*'", value):
        return value
    escaped = re.sub(r'(\\*)"', lambda found: found.group(1) * 2 + '\\"', value)
    return f'"{escaped}"'


def _reads(parser: OverridesParser, override: str) -> bool:
    try:
        parser.parse_override(override)
    except HydraException:
        return False
    return True
