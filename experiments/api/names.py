"""Names that were mistyped: the nearest valid one, and all that there are."""

from collections.abc import Iterable

from core.nearest import most_like
from experiments.settings import SettingError


def unknown(what: str, name: object, known: Iterable[str], all_known: Iterable[str] = ()) -> SettingError:
    """An error about an unknown `what`: names the nearest valid one, and lists `known`.

    Args:
        all_known: more names, among which the nearest is looked for if none of `known` is similar.
    """
    names = sorted(known)
    guess = most_like(str(name), names) or most_like(str(name), all_known)
    hint = f"; did you mean {guess}?" if guess else "."
    return SettingError(f"{what} {name!r} is not known{hint} There are: {', '.join(names) or 'none'}")


def check_known(what: str, name: object, known: Iterable[str]) -> None:
    """Raises SettingError when `name` is none of `known`, as `unknown` says."""
    names = list(known)
    if name not in names:
        raise unknown(what, name, names)
