"""`python -m experiments.new_peer NAME` writes another method to upsample.

That is its file in experiments/peers/, its row among the contract tests, and a test.

The tests pass at once, and it starts as the baseline.

Exit code: 2 if a name is taken or not valid, or this is no checkout.
"""

import sys

from experiments.errors import Told
from experiments.scaffold import command_line, new_peer, report

USAGE = "python -m experiments.new_peer NAME"


def main() -> None:
    """The command `new_peer`."""
    given = command_line(USAGE, sys.argv[1:])
    try:
        written = new_peer(**given)
    except Told as error:
        print(f"ERROR {error}", file=sys.stderr)
        sys.exit(2)
    report(written, f"pytest tests/test_{given['name']}.py tests/test_peer_contracts.py -k {given['name']}")


if __name__ == "__main__":
    main()
