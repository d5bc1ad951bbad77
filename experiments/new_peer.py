"""`python -m experiments.new_peer NAME` writes another method to upsample.

That is its file in experiments/peers/, its row among the contract tests, and a test.

The tests pass at once, and it starts as the baseline.

Exit code: 2 if a name is taken or not valid, or this is no checkout.
"""

from experiments.scaffold import new_peer, write_as_asked

USAGE = "python -m experiments.new_peer NAME"


def main() -> None:
    """The command `new_peer`."""
    write_as_asked(USAGE, new_peer, "tests/test_peer_contracts.py -k {name}")


if __name__ == "__main__":
    main()
