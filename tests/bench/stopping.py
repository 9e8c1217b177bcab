"""Fixed and adaptive shortlists at equal recall: the rule learned on one half of the queries, measured on the other.

python -m tests.bench.root minilm-corpus.npy ROOT 64:binary 128:binary
python -m tests.bench.stopping ROOT minilm-queries.npy
"""

import argparse
from pathlib import Path

import numpy as np

from pipeline import margin, open_index
from pipeline.vectors import unit

WIDTH, K = 1000, 10


def main() -> None:
    """Print, for each table and confidence, the mean candidates of both at the recall that the rule reaches."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("root", type=Path)
    options.add_argument("queries", type=Path)
    options.add_argument("--count", type=int, default=1000)
    asked = options.parse_args()
    index = open_index(asked.root, engine="resident")
    vectors = np.load(asked.queries)
    order = np.random.default_rng(0).permutation(len(vectors))[: asked.count]
    queries = unit(vectors[order])
    truth = index.rank(queries, K, cascade=[])[0].rows
    learn, test = np.arange(0, len(queries), 2), np.arange(1, len(queries), 2)
    for name in (one for one in index.opened.views if one.endswith("binary")):
        coarse, steps = index.rank(queries, WIDTH, cascade=[(name, WIDTH)], rescore=False)
        full = index.opened.scores("documents", queries, coarse)
        learned = margin.fit(coarse.scores[learn], full[learn], K)
        is_true = (coarse.rows[:, :, None] == truth[:, None, :]).any(axis=2)
        reached = is_true[test].cumsum(axis=1).mean(axis=0) / K
        opened = index.opened.knowing({steps[0].name: learned}, {})
        for confidence in margin.CONFIDENCES:
            opened.confidence = confidence
            hits, made = opened.rank(queries[test], K, None, [(name, WIDTH // margin.WIDEST, "auto")], stop="margin")
            recall = (hits.rows[:, :, None] == truth[test][:, None, :]).any(axis=2).mean()
            same = (np.sort(hits.rows, axis=1) == np.sort(_widest(coarse, full, test), axis=1)).all(axis=1).mean()
            mean, fixed = made[-1].candidates / len(test), int(np.argmax(reached >= recall - 1e-9)) + 1
            print(
                f"{name} confidence {confidence:.2f} (kept {same:.3f})  recall@10 {recall:.4f}  "
                f"candidates {mean:.0f}, fixed list of that recall {fixed}  {mean / fixed - 1:+.0%}",
                flush=True,
            )


def _widest(coarse: object, full: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Rows that the whole list gives."""
    best = np.argsort(-full[test], axis=1, kind="stable")[:, :K]
    return np.take_along_axis(coarse.rows[test], best, 1)


if __name__ == "__main__":
    main()
