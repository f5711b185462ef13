"""The Grain pipeline: source → tokens (once) → plan of rows → global shuffle per epoch → batches, by index throughout.

Batch number n of a run is a function of the data, the seed and n alone: not of the number of processes (each takes its
part of the same global batch) nor of worker processes. The state of an iterator is therefore one number.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import lzma
import multiprocessing
import os
import threading
from collections.abc import Awaitable, Iterator, Mapping
from pathlib import Path
from typing import Any

import absl.flags
import grain
import numpy as np

from gemma4_jax.data.examples import conversation, make_encoder
from gemma4_jax.data.media_rows import MediaChatEncoder, MediaLoader, media_loader, with_paths
from gemma4_jax.data.options import DataOptions
from gemma4_jax.data.packing import RowPlan, empty_batch, plan_rows
from gemma4_jax.data.preference import PairSplitter, PreferenceEncoder, pair
from gemma4_jax.data.sources import Source, open_source, open_whole_source, parse_mixture, text_of
from gemma4_jax.data.token_store import tokenise, with_new_folder
from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.media import Processor
from gemma4_jax.text.pieces import Control
from gemma4_jax.text.tokenizer import Tokenizer, check_vocab_size, train_tokenizer

_TOKENIZER_VERSION = 1
_TOKENIZER_CHARACTERS = 50_000_000  # a fair sample of this size is learnt from; more changes little and takes long
_log = logging.getLogger(__name__)
Section = DataOptions | Mapping[str, Any]


def get_tokenizer(data: Section, workdir: str | Path) -> Tokenizer:
    """The tokenizer that the config names, or one trained on the training documents and kept in the work folder.

    Args:
      data: the ``data`` section.
      workdir: folder of the run; a trained tokenizer lies in its ``data`` folder.

    Raises:
      ConfigError, DataError, PromptError: as reading the sources and the tokenizer raise them.
    """
    options = DataOptions.of(data)
    if options.tokenizer:
        return Tokenizer.load(options.tokenizer)
    check_vocab_size(options.vocab_size)
    sources = [open_source(spec, "train", options) for spec, _ in _train_specs(options)]
    key = _hash(
        _TOKENIZER_VERSION, options.vocab_size, options.format, options.text_field, *(s.fingerprint() for s in sources)
    )
    path = _folder(workdir) / f"tokenizer-{key}"
    if not path.is_dir():
        texts = _Texts(sources, options, _TOKENIZER_CHARACTERS)
        path.parent.mkdir(parents=True, exist_ok=True)
        with_new_folder(path, lambda new: train_tokenizer(texts, options.vocab_size).save(new))
    return Tokenizer.load(path)


class _Texts:
    """The texts of sources, up to a number of characters; can be read again and again."""

    def __init__(self, sources: list[Source], options: DataOptions, limit: float = float("inf")):
        self._sources, self._options, self._limit = sources, options, limit

    def __iter__(self) -> Iterator[str]:
        index = [(source, number) for source in self._sources for number in range(len(source))]
        if self._limit < float("inf"):
            index = [index[i] for i in np.random.default_rng(0).permutation(len(index))]
        size = 0
        for source, number in index:
            for text in document_texts(source[number], self._options, source.place(number)):
                yield text
                size += len(text)
            if size >= self._limit:
                return


def document_texts(document: dict[str, Any], options: DataOptions, place: str) -> list[str]:
    """The texts in a document, in order. Raises DataError naming its place if it is malformed."""
    if options.format == "text":
        return [text_of(document, options.text_field, place)]
    if options.format == "preference":
        parts = [part for half in pair(document, options.text_field, place) for part in half]
    else:
        parts = conversation(document, options.text_field, place, media=True)
    return [piece for part in parts for piece in part.pieces if not isinstance(piece, Control)]


def heldout_text(data: Section) -> str:
    """All held-out text, documents one after the other, for comparing with general compressors."""
    options = DataOptions.of(data)
    return "".join(_Texts([source for source, _ in _open(options, "heldout")], options))


def heldout_conversations(data: Section, limit: int = 0) -> list[dict[str, Any]]:
    """The first ``limit`` held-out conversations (0: all), with paths of media that hold from here."""
    options = DataOptions.of(data)
    places = ((source, index) for source, _ in _open(options, "heldout") for index in range(len(source)))
    return [
        with_paths(source[index], options.text_field, source.place(index))
        for source, index in itertools.islice(places, limit or None)
    ]


def compressed_bits_per_byte(text: str) -> float:
    """Bits per byte of UTF-8 that ``lzma`` at its best setting needs. Raises DataError for an empty text."""
    raw = text.encode()
    if not raw:
        raise DataError("no text to compress")
    return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)


def learnt_bytes(batch: Mapping[str, np.ndarray], byte_lengths: np.ndarray) -> int:
    """The bytes of text that a batch's learnt tokens stand for.

    Over all batches of the held-out split this adds up to the text's size, so the summed loss in nats divided by
    ``ln(2)`` times this number is exactly the bits per byte.

    Args:
      batch: with ``tokens`` and ``loss_mask`` (B, T).
      byte_lengths: ``Tokenizer.byte_lengths()``.
    """
    return int(byte_lengths[batch["tokens"]][batch["loss_mask"]].sum())


def make_dataset(
    data: Section,
    tokenizer: Tokenizer,
    split: str,
    workdir: str | Path,
    process_index: int = 0,
    process_count: int = 1,
    processor: Processor | None = None,
) -> BatchDataset:
    """Batches of packed rows.

    Args:
      data: the ``data`` section of a config.
      tokenizer: the one the model uses.
      split: "train": without end, shuffled anew in each epoch, each row once per epoch; "heldout": each row once, in a
        fixed order, the last batch filled up with padding.
      workdir: folder of the run; tokens are kept in its ``data`` folder.
      process_index: which part of each global batch to make.
      process_count: over how many processes batches are shared out.
      processor: prepares the media of conversations for a model with inputs for them.

    Raises:
      ConfigError: a bad field, or a batch size that the processes do not divide.
      DataError: documents that cannot be read or learnt from.
    """
    options = DataOptions.of(data)
    if options.batch_size % process_count:
        raise ConfigError(f"data.batch_size {options.batch_size} is not a multiple of {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index {process_index} is not below process_count {process_count}")
    with_media = processor is not None and options.format == "chat"
    if with_media:
        encoder = MediaChatEncoder(processor, options.text_field)
    elif options.format == "preference":
        encoder = PreferenceEncoder(tokenizer, options.text_field)
    else:
        encoder = make_encoder(options, tokenizer)
    overlap = options.overlap if split == "train" else options.heldout_overlap
    sources, plans, weights = [], [], []
    for source, weight in _open(options, split):
        sources.append(source)
        store = tokenise(source, encoder, tokenizer.vocab_size, _folder(workdir))
        plans.append(plan_rows(store, options.seq_len, overlap, options.long_examples, options.shuffle_seed))
        weights.append(weight)
        _log.info("%s rows: %s", split, plans[-1].report)
    loader = media_loader(plans, sources, encoder, options.blind) if with_media else None
    if options.format == "preference":
        loader = PairSplitter(tokenizer.bos_id)
    return BatchDataset(plans, weights, options, split, process_index, process_count, loader)


class BatchDataset:
    """Batches of one split; iterating gives a checkpointable Grain iterator.

    Each element is a dict of (b, T) arrays, b this process's rows: ``tokens``, ``segment_ids`` (0 is padding),
    ``positions`` (from 0 in each segment), int32, and ``loss_mask`` bool (the token is learnt, as a target). Rows with
    media also have ``token_types`` int32 and ``media``, a ``MediaInputs`` of fixed shapes; ``media_kinds`` says which
    kinds ("vision", "audio") they have.
    """

    def __init__(
        self,
        plans: list[RowPlan],
        weights: list[float],
        options: DataOptions,
        split: str,
        process_index: int,
        process_count: int,
        loader: MediaLoader | PairSplitter | None = None,
    ):
        """Args: a plan and a weight for each source, and what loads their media; see ``make_dataset``."""
        sizes = [len(plan) for plan in plans]
        self.reports = [plan.report for plan in plans]
        self.num_rows = sum(sizes)
        self.batch_size = options.batch_size
        self.media_kinds = loader.kinds if loader else frozenset()
        self.num_batches = None if split == "train" else -(-self.num_rows // options.batch_size)
        self.fingerprint = _hash(
            *(plan.store.path.name for plan in plans), weights, split, options.seq_len, options.shuffle_seed,
            options.overlap, options.heldout_overlap, options.long_examples,
        )  # fmt: skip
        self._options = options
        self._workers = options.workers if split == "train" else 0  # a pass ends before processes would have started
        self._assemble = _Assemble(plans, options.batch_size, process_index, process_count, loader)
        self._rows = (
            _shuffled(sizes, weights, options.shuffle_seed)
            if split == "train"
            else grain.MapDataset.range(self.num_batches * options.batch_size)
        )

    @property
    def packing_efficiency(self) -> float:
        """The share of tokens in rows that is not padding."""
        rows = np.asarray([report["rows"] for report in self.reports])
        return float(np.average([report["packing_efficiency"] for report in self.reports], weights=rows))

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    def batches_from(self, row: int) -> grain.DatasetIterator:
        """Batches that begin with the given number in the order of rows."""
        options = self._options
        batches = self._rows[row:].batch(options.batch_size, drop_remainder=True).map(self._assemble)
        if not self._workers:
            thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=options.prefetch)
            return iter(batches.to_iter_dataset(thread))
        if not absl.flags.FLAGS.is_parsed():  # Grain's workers read its flags, which only an absl program parses
            absl.flags.FLAGS.mark_as_parsed()
        alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        per_worker = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=options.prefetch)
        return iter(batches.to_iter_dataset(alone).mp_prefetch(per_worker, _end_with_parent))


def _end_with_parent(worker: int, workers: int) -> None:
    """Called in each worker. One whose parent was killed would wait for ever, and hold what it inherited."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


class BatchIterator(grain.DatasetIterator):
    """Iterates over a BatchDataset. Its state is the same in every process and with any number of workers."""

    def __init__(self, dataset: BatchDataset):
        """Args: ``dataset``; starts at its first batch."""
        super().__init__()
        self._dataset = dataset
        self._row = 0
        self._batches: grain.DatasetIterator | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        self._assert_not_closed()
        if self._batches is None:
            self._batches = self._dataset.batches_from(self._row)
        batch = next(self._batches)
        self._row += self._dataset.batch_size
        return batch

    @property
    def epoch(self) -> float:
        """How often the rows have been read so far, counting all sources together."""
        return self._row / self._dataset.num_rows

    def get_state(self) -> dict[str, Any]:
        """JSON-ready: the rows read so far and what they are rows of."""
        return {"next_row": self._row, "data": self._dataset.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where the state was taken. Raises DataError if that was in other data or another order."""
        if state["data"] != self._dataset.fingerprint:
            raise DataError(
                f"the saved position is in other data or another order ({state['data']}) than this run's "
                f"({self._dataset.fingerprint}): source, tokenizer, seq_len, overlap or shuffle_seed differ"
            )
        self._stop()
        self._row = state["next_row"]

    async def load(self, directory: Any) -> Awaitable[None]:
        """Restores from an Orbax checkpoint, also one that another number of processes wrote."""
        files = sorted(directory.glob("process_*-of-*.json"))
        if not files:
            raise DataError(f"no state of a data iterator in {directory}")

        async def read() -> None:
            self.set_state(json.loads(files[0].read_text()))

        return read()

    def start_prefetch(self) -> None:
        """Begins to make batches in the background."""
        if self._batches is None:
            self._batches = self._dataset.batches_from(self._row)
        self._batches.start_prefetch()

    def close(self) -> None:
        """Stops worker processes and threads."""
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None


class _Assemble:
    """Global row numbers (B,) to this process's part of the batch; numbers past the end are padding."""

    def __init__(
        self,
        plans: list[RowPlan],
        batch_size: int,
        process_index: int,
        process_count: int,
        loader: MediaLoader | PairSplitter | None = None,
    ):
        self._plans = plans
        self._loader = loader
        self._starts = np.cumsum([0] + [len(plan) for plan in plans])
        local = batch_size // process_count
        self._part = slice(process_index * local, (process_index + 1) * local)

    def __call__(self, rows: np.ndarray) -> dict[str, Any]:
        rows = np.asarray(rows)[self._part]
        batch = empty_batch(len(rows), self._plans[0].seq_len)
        chosen: list[tuple[int, int] | None] = [None] * len(rows)
        for number, (plan, start, end) in enumerate(zip(self._plans, self._starts[:-1], self._starts[1:], strict=True)):
            at = np.flatnonzero((rows >= start) & (rows < end))
            plan.fill(rows[at] - start, batch, at)
            for place in at:
                chosen[place] = number, int(rows[place] - start)
        return batch if self._loader is None else self._loader(batch, chosen)


def _shuffled(sizes: list[int], weights: list[float], seed: int) -> grain.MapDataset:
    """Row numbers without end: each source shuffled anew in each of its epochs, sources in proportion to weights."""
    starts = np.cumsum([0, *sizes])
    orders = [
        grain.MapDataset.range(int(start), int(start) + size).shuffle(seed=_sub_seed(seed, number)).repeat()
        for number, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)


def _sub_seed(seed: int, number: int) -> int:
    # Grain adds the epoch to the seed: neighbouring seeds would give one source the order of another's next epoch.
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _train_specs(options: DataOptions) -> list[tuple[str, float]]:
    return parse_mixture(options.source)


def _open(options: DataOptions, split: str) -> list[tuple[Source, float]]:
    if split == "heldout" and options.heldout_source:
        specs = parse_mixture(options.heldout_source)
        both = {spec for spec, _ in specs} & {spec for spec, _ in _train_specs(options)}
        if both:
            raise ConfigError(f"data.heldout_source {sorted(both)[0]!r} is also trained on")
        return [(open_whole_source(spec, options), weight) for spec, weight in specs]
    return [(open_source(spec, split, options), weight) for spec, weight in _train_specs(options)]


def _folder(workdir: str | Path) -> Path:
    return Path(workdir) / "data"


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
