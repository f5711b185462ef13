"""Documents to rows of ``seq_len`` tokens: a plan made once from the documents' lengths, and the rows by index.

Grain's own packing works on a stream: rows depend on what came before, so a position in the data is a replay. The plan
here is an array, so any row of any epoch is found at once, a resumed run reads on exactly where it stopped, and rows
can be shuffled globally and shared out among processes.

Long documents are cut into pieces; each piece is a segment of its own, for attention cannot reach into another row. A
further piece repeats ``overlap`` tokens of the piece before it as context that is not learnt again. So every token is
learnt exactly once, except each document's first (its bos), which nothing predicts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from gemma4_jax.data.token_store import TokenStore
from gemma4_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Stretches of a token store, each at most a row long (all arrays (n,)).

    start int64 and length int32: where the tokens are; context int32: how many of the first ones are not learnt;
    document int64: whose they are.
    """

    start: np.ndarray
    length: np.ndarray
    context: np.ndarray
    document: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def select(self, chosen: np.ndarray) -> Pieces:
        """Those pieces that a bool mask or an index array chooses."""
        return Pieces(self.start[chosen], self.length[chosen], self.context[chosen], self.document[chosen])


def cut_documents(offsets: np.ndarray, seq_len: int, overlap: int) -> Pieces:
    """All documents in pieces of at most ``seq_len`` tokens.

    Args:
      offsets: int64 (D+1,), as in TokenStore.
      seq_len: T.
      overlap: tokens that a further piece repeats, 1 ≤ overlap < T.
    """
    lengths = np.diff(offsets)
    stride = seq_len - overlap
    counts = np.where(lengths > 0, 1 + np.maximum(0, -(-(lengths - seq_len) // stride)), 0)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * stride
    length = np.minimum(seq_len, lengths[document] - start)
    context = np.where(number == 0, 1, overlap)
    return Pieces(offsets[document] + start, length.astype(np.int32), context.astype(np.int32), document)


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, by best fit in decreasing order of length.

    Pieces go, longest first, into the fullest row that still has room, or into a new one. Pieces and rows of equal
    length are handled together, so the work grows with the number of different lengths, not of pieces.

    Args:
      lengths: int (n,), each between 1 and ``capacity``.
      capacity: tokens in a row.

    Returns:
      int64 (n,), rows 0, 1, … without gaps.
    """
    rows = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    starts = np.flatnonzero(np.diff(lengths[order], prepend=-1))
    open_rows: dict[int, list[np.ndarray]] = {}  # free tokens → rows that have so many
    num_rows = 0
    for group in np.split(order, starts[1:]):
        size = int(lengths[group[0]]) if len(group) else capacity
        while len(group):
            free = min((f for f in open_rows if f >= size), default=None)
            if free is None:
                free = capacity
                chosen = num_rows + np.arange(-(-len(group) // (capacity // size)))
                num_rows += len(chosen)
            else:
                chosen = np.concatenate(open_rows.pop(free))
            placed = min(len(group), (free // size) * len(chosen))
            slot = np.arange(placed) // (free // size)
            rows[group[:placed]] = chosen[slot]
            added = np.bincount(slot, minlength=len(chosen))
            for count in np.unique(added):
                left = free - int(count) * size
                if left:
                    open_rows.setdefault(left, []).append(chosen[added == count])
            group = group[placed:]
    return rows


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Which pieces make up each row of one token store.

    Attributes:
      store: the tokens.
      pieces: sorted by row.
      first: int64 (R+1,): row r holds ``pieces[first[r]:first[r + 1]]``.
      seq_len: T.
      report: counts and the packing efficiency, for logs.
    """

    store: TokenStore
    pieces: Pieces
    first: np.ndarray
    seq_len: int
    report: dict[str, Any]

    def __len__(self) -> int:
        return len(self.first) - 1

    def fill(self, rows: np.ndarray, batch: dict[str, np.ndarray], at: np.ndarray) -> None:
        """Writes ``rows`` (n,) of the plan into the rows ``at`` (n,) of a zeroed batch of (B, T) arrays."""
        counts = self.first[rows + 1] - self.first[rows]
        segment = _ramps(counts)
        pieces = self.pieces.select(np.repeat(self.first[rows], counts) + segment)
        filled_before = np.cumsum(pieces.length) - pieces.length
        row_start = np.repeat(filled_before[np.cumsum(counts) - counts], counts)
        column = filled_before - row_start

        position = _ramps(pieces.length)

        def spread(values: np.ndarray) -> np.ndarray:
            return np.repeat(values, pieces.length)

        target = spread(np.repeat(at, counts) * self.seq_len + column) + position
        source = spread(pieces.start) + position
        learnt = position >= spread(pieces.context)
        if self.store.learnt is not None:
            learnt &= self.store.learnt[source].astype(bool)
        for name, values in (
            ("tokens", self.store.tokens[source]),
            ("loss_mask", learnt),
            ("segment_ids", spread(segment + 1)),
            ("positions", position),
        ):
            batch[name].reshape(-1)[target] = values


def empty_batch(rows: int, seq_len: int) -> dict[str, np.ndarray]:
    """A batch of padding: tokens, segment_ids and positions int32, loss_mask bool, each (rows, T)."""
    batch = {name: np.zeros((rows, seq_len), np.int32) for name in ("tokens", "segment_ids", "positions")}
    return {**batch, "loss_mask": np.zeros((rows, seq_len), bool)}


def plan_rows(store: TokenStore, seq_len: int, overlap: int, long_examples: str, seed: int) -> RowPlan:
    """The rows of a token store.

    Args:
      store: tokens of all documents.
      seq_len: T.
      overlap: see ``cut_documents``.
      long_examples: "split", "truncate" or "error", for documents longer than ``seq_len``.
      seed: decides which pieces of equal length share a row and the order of rows.

    Raises:
      DataError: a document is too long and ``long_examples`` is "error", or documents have nothing left to learn; the
        message has the counts.
    """
    pieces = cut_documents(store.offsets, seq_len, overlap)
    lengths = np.diff(store.offsets)
    too_long = int((lengths > seq_len).sum())
    if too_long and long_examples == "error":
        longest = int(lengths.max())
        raise DataError(
            f"{store.summary['source']}: {too_long} of {len(store)} examples are longer than data.seq_len {seq_len} "
            f"(longest: {longest} tokens); raise it or set data.long_examples to split or truncate"
        )
    cut_off = 0
    if long_examples == "truncate":
        cut_off = int(np.maximum(0, lengths - seq_len).sum())
        pieces = pieces.select(pieces.start == store.offsets[pieces.document])
    learnt = _learnt_counts(store, pieces)
    if store.learnt is not None:
        _check_all_teach(store, pieces, learnt, seq_len, long_examples)
        pieces, learnt = pieces.select(learnt > 0), learnt[learnt > 0]
    rng = np.random.default_rng(seed)
    pieces = pieces.select(rng.permutation(len(pieces)))
    row = pack(pieces.length, seq_len)
    num_rows = int(row.max(initial=-1)) + 1
    row = rng.permutation(num_rows)[row]  # so that any first rows are a fair sample
    order = np.argsort(row, kind="stable")
    first = np.searchsorted(row[order], np.arange(num_rows + 1))
    report = {
        **{name: store.summary[name] for name in ("source", "documents", "bytes", "empty_documents")},
        "document_tokens": store.summary["tokens"],
        "long_documents": too_long,
        "tokens_cut_off": cut_off,
        "pieces": len(pieces),
        "rows": num_rows,
        "learnt_tokens": int(learnt.sum()),
        "packing_efficiency": float(pieces.length.sum() / max(1, num_rows * seq_len)),
    }
    return RowPlan(store, pieces.select(order), first, seq_len, report)


def _learnt_counts(store: TokenStore, pieces: Pieces) -> np.ndarray:
    """How many tokens of each piece are learnt: int64 (n,)."""
    if store.learnt is None:
        return np.maximum(0, pieces.length - pieces.context).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(store.learnt, dtype=np.int64)])
    return total[pieces.start + pieces.length] - total[pieces.start + np.minimum(pieces.context, pieces.length)]


def _check_all_teach(store: TokenStore, pieces: Pieces, learnt: np.ndarray, seq_len: int, long_examples: str) -> None:
    per_document = np.bincount(pieces.document, weights=learnt, minlength=len(store))
    idle = np.flatnonzero(per_document == 0)
    if len(idle):
        raise DataError(
            f"{store.summary['source']}: {len(idle)} of {len(store)} examples have no token left to learn at "
            f"data.seq_len {seq_len} with data.long_examples {long_examples} (the first is example {idle[0]})"
        )


def _ramps(counts: np.ndarray) -> np.ndarray:
    """0 … n-1 for each n of ``counts``, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
