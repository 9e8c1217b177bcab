"""Everyone who takes part, in the order of the tables."""

from collections.abc import Sequence

from tests.bench import exact, ours, peers_faiss, peers_lancedb, peers_usearch
from tests.bench.measure import Contender


def everyone() -> dict[str, Contender]:
    """Contenders by name."""
    modules = (exact, peers_lancedb, peers_faiss, peers_usearch, ours)
    return {contender.name: contender for module in modules for contender in module.contenders()}


def chosen(names: Sequence[str], slow: bool) -> tuple[list[Contender], dict[str, str]]:
    """Contenders that `names` name or are the beginning of (none: all); why some of them cannot run here.

    Slow ones only where that is asked, or where they are named in full. SystemExit where a name fits nobody.
    """
    known = everyone()
    taken = [one for one in known.values() if one.name in names or (not names and (slow or not one.slow))]
    for name in names:
        fitting = [one for one in known.values() if one.name.startswith(name) and (slow or not one.slow)]
        if not fitting and name not in known:
            raise SystemExit(f"no contender begins with {name!r}; there are: {', '.join(known)}")
        if name not in known:
            taken += [one for one in fitting if one not in taken]
    taken.sort(key=list(known.values()).index)
    missing = {one.name: one.missing() for one in taken}
    return [one for one in taken if not missing[one.name]], {name: why for name, why in missing.items() if why}
