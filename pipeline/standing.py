"""Where a root stands: what is done, what is left and what was quarantined, from storage alone."""

from typing import Any

from pipeline import embed, ledger
from pipeline.errors import StaleError
from pipeline.storage import STATE, Root


def run(root: Root) -> dict[str, Any]:
    """The facts by name; StaleError where the root holds no job."""
    begun, generation = ledger.begun(root), ledger.newest_generation(root)
    if begun is None and generation is None and not root.names(STATE):
        raise StaleError(f"{root.path} holds no job; run one first")
    facts: dict[str, Any] = {"root": str(root.path), "begun": begun is not None}
    if begun is not None:
        stand = embed.standing(root, begun)
        facts |= {
            "rows": begun["corpus.rows"],
            "shards": {"done": stand.done, "left": stand.shards - stand.done},
            "embedded": stand.rows,
            "quarantined": dict(sorted(stand.quarantined.items())),
            "embed": "done" if stand.is_sealed else "unfinished",
        }
    facts["generation"] = None if generation is None else generation["generation"]
    if generation is not None:
        facts["tables"] = {name: entry["rows"] for name, entry in generation["tables"].items()}
    return facts
