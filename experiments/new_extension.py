"""`python -m experiments.new_extension NAME hook=attention` writes an idea for a hook point.

That is its file in extensions/, its row among the contract tests, and a test.

The tests pass at once, and it starts as the baseline.

Exit code: 2 if a name is taken or not valid, or this is no checkout.
"""

from core.hooks import HOOK_POINTS
from experiments.scaffold import new_extension, write_as_asked

USAGE = f"python -m experiments.new_extension NAME hook=HOOK, HOOK one of {', '.join(HOOK_POINTS)}"


def main() -> None:
    """The command `new_extension`."""
    write_as_asked(USAGE, new_extension, "tests/test_contracts.py -k {name}", ["hook"])


if __name__ == "__main__":
    main()
