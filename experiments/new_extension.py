"""`python -m experiments.new_extension NAME hook=attention` writes an idea for a hook point.

That is its file in extensions/, its row among the contract tests, and a test.

The tests pass at once, and it starts as the baseline.

Exit code: 2 if a name is taken or not valid, or this is no checkout.
"""

import sys

from core.hooks import HOOK_POINTS
from experiments.errors import Told
from experiments.scaffold import command_line, new_extension, report

USAGE = f"python -m experiments.new_extension NAME hook=HOOK, HOOK one of {', '.join(HOOK_POINTS)}"


def main() -> None:
    """The command `new_extension`."""
    given = command_line(USAGE, sys.argv[1:], ["hook"])
    try:
        written = new_extension(**given)
    except Told as error:
        print(f"ERROR {error}", file=sys.stderr)
        sys.exit(2)
    report(written, f"pytest tests/test_{given['name']}.py tests/test_contracts.py -k {given['name']}")


if __name__ == "__main__":
    main()
