"""`python -m experiments.new_task NAME` writes something to measure.

That is its file in experiments/measuring/tasks/, and a test.

The test passes at once. Exit code: 2 if a name is taken or not valid, or this is no checkout.
"""

import sys

from experiments.errors import Told
from experiments.scaffold import command_line, new_task, report

USAGE = "python -m experiments.new_task NAME"


def main() -> None:
    """The command `new_task`."""
    given = command_line(USAGE, sys.argv[1:])
    try:
        written = new_task(**given)
    except Told as error:
        print(f"ERROR {error}", file=sys.stderr)
        sys.exit(2)
    report(written, f"pytest tests/test_{given['name']}.py")


if __name__ == "__main__":
    main()
