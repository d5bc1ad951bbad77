"""`python -m experiments.new_task NAME` writes something to measure.

That is its file in experiments/measuring/tasks/, and a test.

The test passes at once. Exit code: 2 if a name is taken or not valid, or this is no checkout.
"""

from experiments.scaffold import new_task, write_as_asked

USAGE = "python -m experiments.new_task NAME"


def main() -> None:
    """The command `new_task`."""
    write_as_asked(USAGE, new_task, "")


if __name__ == "__main__":
    main()
