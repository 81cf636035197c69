"""The rows of a matrix that have the largest inner products with a query: exact, in bounded memory.

The matrix is given in pieces, as an Arrow column holds it, and never copied. Two steps: `largest_products` finds
candidates in float32, whose last bits depend on how many rows are multiplied at once; `precise_products` has scores of
the candidates that depend on nothing but the two vectors. numpy multiplies: its library is the faster one for few
queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

FIRST_ROWS = 1024  # small, so that a threshold is there early
ROWS = 8192
PRODUCTS = 2**21  # float32 scores in memory at a time: 8 MiB
TERMS = 2**17  # float64 terms in memory at a time: 1 MiB, in the cache
MANY_QUERIES = 64  # so many are worth a copy of a block, which is then multiplied in one piece


def largest_products(
    queries: torch.Tensor, pieces: Sequence[np.ndarray], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows with the largest inner products.

    Args:
        queries: ``(Q, D)`` float32.
        pieces: the matrix, ``(n_i, D)`` float32 each, read only; at least `count` rows in all.
        count: m, how many rows of each query.

    Returns:
        Scores ``(Q, m)``, descending, and rows ``(Q, m)`` int64, counted through all pieces.
    """
    found = [_largest_of_few(part, pieces, count) for part in queries.split(max(PRODUCTS // max(ROWS, count), 1))]
    return torch.cat([scores for scores, _ in found]), torch.cat([rows for _, rows in found])


def precise_products(queries: torch.Tensor, pieces: Sequence[np.ndarray], rows: torch.Tensor) -> torch.Tensor:
    """Inner products of each query with rows of its own, summed in float64 and rounded.

    Args:
        queries: ``(Q, D)`` float32.
        pieces: as for `largest_products`.
        rows: ``(Q, m)``.

    Returns:
        ``(Q, m)`` float32; equal rows have equal products.
    """
    starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
    query_of, row_of = np.repeat(np.arange(queries.shape[0]), rows.shape[1]), rows.flatten().numpy()
    products = np.empty(len(row_of), np.float32)
    order = np.argsort(row_of)
    at_once = max(TERMS // queries.shape[1], 1)
    left, right = np.empty((2, at_once, queries.shape[1]), np.float32)
    terms = np.empty(left.shape)
    for start in range(0, len(order), at_once):
        pairs = order[start : start + at_once]
        count = len(pairs)
        _take(pieces, starts, row_of[pairs], left)
        np.take(queries.numpy(), query_of[pairs], axis=0, out=right[:count], mode="clip")
        np.multiply(left[:count], right[:count], out=terms[:count], dtype=np.float64)
        products[pairs] = terms[:count].sum(-1)
    return torch.from_numpy(products).view(rows.shape)


def _largest_of_few(
    queries: torch.Tensor, pieces: Sequence[np.ndarray], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    best = queries.new_full((queries.shape[0], count), -torch.inf)
    rows = torch.full(best.shape, -1)
    many = queries.shape[0] >= MANY_QUERIES
    most = max(ROWS if many else 4 * ROWS, count)
    buffer, mask = np.empty(most * queries.shape[0], np.float32), np.empty(most * queries.shape[0], bool)
    copy = np.empty((most, queries.shape[1]), np.float32) if many else None
    seen = 0
    for block in _blocks(pieces, max(FIRST_ROWS, count), most):
        height = sum(map(len, block))
        scores = buffer[: height * queries.shape[0]].reshape(height, -1)
        if many and len(block) > 1:
            block = [np.concatenate(block, out=copy[:height])]
        start = 0
        for piece in block:
            np.matmul(piece, queries.numpy().T, out=scores[start : start + len(piece)])
            start += len(piece)
        best, rows = _merge(best, rows, scores, seen, mask[: scores.size].reshape(scores.shape))
        seen += height
    return best, rows


def _blocks(pieces: Sequence[np.ndarray], size: int, most: int) -> Iterator[list[np.ndarray]]:
    """Cuts and groups the pieces into blocks of `size` rows, then of four times as many, up to `most`."""
    block, room = [], size
    for piece in pieces:
        while len(piece):
            block.append(piece[:room])
            piece = piece[room:]
            room -= len(block[-1])
            if room == 0:
                yield block
                size = max(size, min(4 * size, most))
                block, room = [], size
    if block:
        yield block


def _merge(
    best: torch.Tensor, rows: torch.Tensor, scores: np.ndarray, first_row: int, mask: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of the `best` and of the scores ``(height, Q)`` of the rows from `first_row` on.

    Few new scores exceed the lowest of the best: they alone are sorted. `mask`, of the scores' shape, is overwritten.
    """
    num_queries, count = best.shape
    if first_row == 0:
        top = torch.from_numpy(scores).T.topk(min(count, len(scores)))
        best[:, : top.values.shape[1]], rows[:, : top.values.shape[1]] = top.values, top.indices
        return best, rows
    hits = np.flatnonzero(np.greater(scores, best[:, -1].numpy(), out=mask))
    if len(hits) == 0:
        return best, rows
    row, query = np.divmod(hits.astype(np.uint32), np.uint32(num_queries))
    order = np.argsort(query.astype(np.uint16), kind="stable")  # 16 bits are sorted by radix
    row, query, hits = row[order], query[order], hits[order]
    found = np.bincount(query, minlength=num_queries)
    place = count + np.arange(len(query)) - (found.cumsum() - found)[query]
    both = np.full((num_queries, count + found.max()), -np.inf, np.float32)
    both_rows = np.full(both.shape, -1)
    both[:, :count], both_rows[:, :count] = best.numpy(), rows.numpy()
    both[query, place], both_rows[query, place] = scores.ravel()[hits], first_row + row
    best, order = torch.from_numpy(both).topk(count)
    return best, torch.from_numpy(both_rows).gather(1, order)


def _take(pieces: Sequence[np.ndarray], starts: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """Copies the named rows, which ascend."""
    piece_of = np.searchsorted(starts, rows, side="right") - 1
    cuts = [0, *(np.flatnonzero(np.diff(piece_of)) + 1).tolist(), len(rows)]
    for begin, end in itertools.pairwise(cuts):
        number = piece_of[begin]
        np.take(pieces[number], rows[begin:end] - starts[number], axis=0, out=out[begin:end], mode="clip")
