"""Blocks of a nested table: which ones a level reads, and what they add to the scores of an earlier level.

A row's stored numbers p are cut into blocks. At dim d the score is (q . p) / |p| over the first d of them, with q the
unit query prefix of d numbers. Product and squared length are sums over blocks, so that a finer level of the same
table reads only the blocks that are new. All functions are pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.sentences import nearest
from pipeline.vectors import MIN_NORM, Matrix, vector_columns


@dataclass(frozen=True)
class Lengths:
    """What a level leaves beside its scores: squared lengths float32[q, n] of the hits' first `dim` numbers."""

    table: str
    dim: int
    squares: Matrix


def columns(blocks: Sequence[int], start: int, dim: int) -> list[str]:
    """Columns with the numbers from `start` to `dim`, both ends of blocks (or 0)."""
    return [name for name, (low, high) in vector_columns(blocks).items() if start <= low and high <= dim]


def numbers(codes: Sequence[Matrix], scale: Matrix | None) -> Matrix:
    """Codes of neighbouring blocks, each [n, width], side by side as the numbers they stand for: float32[n, …].

    `scale` is float32 of the whole width, the step of each dimension (int8 only).
    """
    out = np.empty((len(codes[0]), sum(block.shape[1] for block in codes)), np.float32)
    at = 0
    for block in codes:
        out[:, at : at + block.shape[1]] = block
        at += block.shape[1]
    if scale is not None:
        out *= scale
    return out


def squares(rows: Matrix) -> Matrix:
    """Squared lengths float32[n] of numbers [n, width]."""
    return np.asarray(np.einsum("nd,nd->n", rows, rows), np.float32)


def scores(products: Matrix, squared: Matrix) -> Matrix:
    """Products with the unit query divided by the lengths; a row without length keeps its product, as `unit` does."""
    lengths = np.sqrt(squared)
    return np.asarray(products / np.where(lengths < MIN_NORM, np.float32(1), lengths), np.float32)


def products(scored: Matrix, squared: Matrix, queries: Matrix, dim: int) -> Matrix:
    """The products again that a level at `dim` made its scores [q, n] of, now with longer unit queries [q, …].

    A longer query holds the shorter one times the length of its first `dim` numbers.
    """
    shrunk = np.linalg.norm(queries[:, :dim], axis=1, keepdims=True)
    lengths = np.sqrt(squared)
    return np.asarray(scored * np.where(lengths < MIN_NORM, np.float32(1), lengths) * shrunk, np.float32)


def check_cascade(levels: Sequence[tuple[str, int]], tables: Sequence[str]) -> None:
    """Raise ValueError where a level names no table or a shortlist rises."""
    for number, (table, shortlist) in enumerate(levels):
        if table not in tables:
            raise ValueError(f"cascade: no table {table!r}{nearest(table, tables)}; tables: {', '.join(tables)}")
        if shortlist < 1:
            raise ValueError(f"cascade: shortlist must be at least 1, not {shortlist} at {table}")
        if number and shortlist > levels[number - 1][1]:
            raise ValueError(
                f"cascade: shortlist rises from {levels[number - 1][1]} to {shortlist} at {table}; "
                "each level must keep at most what the one before found"
            )


def check_blocks(levels: Sequence[tuple[str, int | None]], blocks: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError where a level's dim (None: all) is no end of a block, or reads nothing new of its table."""
    reached: dict[str, int] = {}
    for table, dim in levels:
        ends = blocks.get(table, ())
        if dim is not None and dim not in ends:
            known = f"its blocks end at {', '.join(map(str, ends))}" if ends else "it has no blocks; leave dim out"
            raise ValueError(f"cascade: {table} cannot be read at dim {dim}: {known}")
        if ends:
            dim = dim or ends[-1]
            if dim <= reached.get(table, 0):
                raise ValueError(
                    f"cascade: dim goes from {reached[table]} to {dim} at {table}; each level must go further"
                )
            reached[table] = dim
