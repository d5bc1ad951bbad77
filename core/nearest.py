"""What an error says of a name that does not exist: the nearest one that does; and Hydra's errors in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


def most_like(name: str, known: Iterable[str]) -> str | None:
    """The most similar of `known`; of dotted ones also that whose last part is `name`. None: nothing is similar."""
    names = list(known)
    ends = [one for one in names if one.rpartition(".")[2] == name]
    lower = {one.lower(): one for one in reversed(names)}
    close = get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return ends[0] if ends else lower[close[0]] if close else None


def nearest(name: object, known: Iterable[object]) -> str:
    """`; did you mean X?` with the known name that is most like `name`, or nothing if none is."""
    close = most_like(str(name), map(str, known))
    return f"; did you mean {close}?" if close else ""


def in_one_line(error: BaseException) -> str:
    """An error of Hydra's or OmegaConf's about an override, with the nearest choice or key that there is."""
    causes = [found for found in (error, error.__cause__) if found is not None]
    return ": ".join(str(found).strip().splitlines()[0] for found in causes) + _way_out(causes)


def _way_out(causes: list[BaseException]) -> str:
    for found in causes:
        options, asked = getattr(found, "options", None), getattr(found, "missing_cfg_file", None)
        if options and asked:  # a choice that a group does not have
            return f"{nearest(asked.rpartition('/')[2], options)} There are: {', '.join(sorted(options))}"
        parent, key = getattr(found, "parent_node", None), getattr(found, "key", None)
        if "not in" in str(found) and key is not None and hasattr(parent, "keys"):
            return f"{nearest(key, parent)} There are: {', '.join(map(str, parent))}"
    return ""
