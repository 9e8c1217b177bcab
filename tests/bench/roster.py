"""Everyone who takes part, in the order of the tables."""

from collections.abc import Sequence

from tests.bench import exact, ours, peers_faiss, peers_lancedb, peers_usearch
from tests.bench.measure import Contender


def everyone() -> dict[str, Contender]:
    """Contenders by name."""
    modules = (exact, peers_lancedb, peers_faiss, peers_usearch, ours)
    return {contender.name: contender for module in modules for contender in module.contenders()}


def chosen(names: Sequence[str], slow: bool) -> tuple[list[Contender], dict[str, str]]:
    """Contenders whose name begins with one of `names` (none: all but the slow ones); why others cannot run here.

    SystemExit where a name fits nobody.
    """
    known = everyone()
    for name in names:
        if not any(other.startswith(name) for other in known):
            raise SystemExit(f"no contender begins with {name!r}; there are: {', '.join(known)}")
    taken = [
        one
        for one in known.values()
        if (any(one.name.startswith(name) for name in names) if names else slow or not one.slow)
    ]
    missing = {one.name: one.missing() for one in taken}
    return [one for one in taken if not missing[one.name]], {name: why for name, why in missing.items() if why}
