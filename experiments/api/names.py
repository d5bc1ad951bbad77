"""Names that were mistyped: the nearest valid one, and all that there are."""

from collections.abc import Iterable
from difflib import get_close_matches

from experiments.settings import SettingError


def unknown(what: str, name: object, known: Iterable[str], all_known: Iterable[str] = ()) -> SettingError:
    """An error about an unknown `what`: names the nearest valid one, and lists `known`.

    Args:
        all_known: more names, among which the nearest is looked for if none of `known` is similar.
    """
    names = sorted(known)
    guess = nearest(str(name), names) or nearest(str(name), all_known)
    hint = f"; did you mean {guess}?" if guess else "."
    return SettingError(f"{what} {name!r} is not known{hint} There are: {', '.join(names) or 'none'}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The most similar of `known`; of dotted ones also that whose last part is `name`. None: nothing is similar."""
    names = list(known)
    ends = [one for one in names if one.rpartition(".")[2] == name]
    lower = {one.lower(): one for one in reversed(names)}
    close = get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return ends[0] if ends else lower[close[0]] if close else None


def check_known(what: str, name: object, known: Iterable[str]) -> None:
    """Raises SettingError when `name` is none of `known`, as `unknown` says."""
    names = list(known)
    if name not in names:
        raise unknown(what, name, names)
