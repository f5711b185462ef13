"""``Sampler``: requests in, tokens out. Holds the weights for reading and the compiled programs.

Axis letters: B batch, T chunk length, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_jax.errors import ConfigError, PromptError
from gemma4_jax.memory import give_back_freed_memory
from gemma4_jax.model.cache import CACHE_DTYPES, cache_bytes
from gemma4_jax.model.masks import image_runs
from gemma4_jax.sample import decode, prefill, programs, request
from gemma4_jax.sample.choose import Controls, Mode
from gemma4_jax.sample.packed import chosen_form, reads_blocks, set_form
from gemma4_jax.sample.policy import DraftPolicy, parse_draft_tokens
from gemma4_jax.sample.weights import ReadDrafter, ReadTarget

BUFFER = 256  # tokens a row that the device loop may hold back before it returns to the host
STREAM_ROUNDS = 4  # rounds between calls of on_token
FINISH_REASONS = {decode.STOPPED: "stop", decode.FULL_LENGTH: "length"}


@dataclasses.dataclass
class Stats:
    """rounds: verification passes a row, summed over rows. drafted, accepted: tokens proposed and kept.
    accepted_per_step: how often each draft step was accepted. Rates count all rows together and leave compilation out;
    compile_seconds is what it took."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_per_step: list[int] = dataclasses.field(default_factory=list)
    draft_lengths: dict[int, int] = dataclasses.field(default_factory=dict)  # length -> rounds run with it
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of all rows over the time that prefill took."""
        return self.prefill_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over the time of the decoding loop. A row's first token belongs to prefill (0.0 if there
        was no other)."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def mean_accepted(self) -> float:
        """Tokens emitted per row and round."""
        return self.decode_tokens / max(self.rounds, 1)


@dataclasses.dataclass
class Output:
    """New tokens only, per row. texts is None without a tokenizer. drafted: which tokens the drafter proposed."""

    tokens: list[list[int]]
    texts: list[str] | None
    finish_reasons: list[str]
    drafted: list[list[bool]]
    stats: Stats


class Sampler:
    """Generates with a bundle.

    Args:
      bundle: has config, model, drafter, tokenizer, processor.
      max_length: prompt and continuation of a row together. Rows end with reason "length" there. Caches are allocated
        for it; cost grows with the tokens so far only.
      draft_tokens: 0: no speculation; k: fixed; "auto": adapts to the acceptance and the cost of a round.
      cache_dtype: "float32", "bfloat16" or "int8"; None: the activation dtype.
      chunk: longest prefill chunk.
      release: free the bundle's own decoder layers while they are laid out for reading, so that weights are in memory
        once; the bundle can sample through this sampler only then. On CPUs int4 weights take the fast form ``columns`` then.
      packed_product: form of products with packed weights (``gemma4_jax.sample.packed``); None: what suits the device
        without holding weights twice.

    Raises:
      ConfigError: an argument outside of its choices, or a fixed draft length without a drafter.
    """

    def __init__(
        self,
        bundle,
        max_length: int = 4096,
        draft_tokens: int | str = "auto",
        *,
        cache_dtype: str | None = None,
        chunk: int = 512,
        release: bool = False,
        packed_product: str | None = None,
    ):
        config = bundle.config
        if not 2 <= max_length <= config.max_position_embeddings:
            raise ConfigError(
                f"max_length is {max_length}; it must be between 2 and {config.max_position_embeddings} "
                "(max_position_embeddings)"
            )
        if chunk < 1:
            raise ConfigError(f"chunk is {chunk}; it must be at least 1")
        self.config, self.max_length = config, max_length
        self.tokenizer, self.processor = bundle.tokenizer, bundle.processor
        self.chat_template = bundle.chat_template
        self.cache_dtype = cache_dtype or ("float32" if config.dtype == "float32" else "bfloat16")
        if self.cache_dtype not in CACHE_DTYPES:
            raise ConfigError(f"cache_dtype is {cache_dtype!r}; choices: {', '.join(CACHE_DTYPES)}")
        self._draft(parse_draft_tokens(draft_tokens, bundle.drafter is not None))
        self.longest_draft = DraftPolicy(self.draft_tokens).longest  # caches are sized by it
        self._compiled: set[Any] = set()
        self._compile_seconds = 0.0
        self.chunk = min(chunk, max_length)
        self._model = bundle.model
        self.packed_product = (
            None if config.quantization is None else chosen_form(packed_product, config.quantization, release)
        )
        looped = self.packed_product is not None and reads_blocks(config.quantization, self.packed_product)
        target = ReadTarget(bundle.model, release, looped)
        drafter = None if bundle.drafter is None else ReadDrafter(bundle.drafter)
        if self.packed_product is not None:
            set_form([target], self.packed_product, release)
            if drafter is not None:
                set_form([drafter], self.packed_product)
        self._looped = target.looped
        self._target = programs.taken_apart(target)
        self._drafter = (None, None) if drafter is None else programs.taken_apart(drafter)
        self._bias = jnp.asarray(request.suppression(config))

    def with_draft_tokens(self, draft_tokens: int | str) -> Sampler:
        """A sampler of the same weights, held once, with another draft length: for comparing both side by side.

        Raises:
          ConfigError: as the constructor does.
        """
        other = copy.copy(self)
        other._draft(parse_draft_tokens(draft_tokens, self._drafter[0] is not None))
        # Caches no smaller than here, so that both sides run one program of prefill.
        other.longest_draft = max(self.longest_draft, DraftPolicy(other.draft_tokens).longest)
        return other

    def _draft(self, draft_tokens: int | str) -> None:
        self.draft_tokens = draft_tokens  # a fixed length or "auto"
        self._policies: dict[int, DraftPolicy] = {}  # by rows: a round of eight costs other multiples than one of one

    def replace_drafter(self, propose: Callable[..., jax.Array], weights: Any) -> None:
        """Draft with a function instead: ``propose(weights, target, state, request, mode, steps, noise)`` gives int32
        (B, steps), see ``gemma4_jax.sample.decode.draft``. For measuring the loop at a scripted acceptance."""
        self._drafter = propose, weights
        self._compiled.clear()

    def cache_bytes(self, batch: int = 1) -> dict[str, int]:
        """See ``gemma4_jax.model.cache.cache_bytes``, for this sampler's settings."""
        return cache_bytes(self.config, self.max_length, self.longest_draft, self.cache_dtype, batch)

    def generate(
        self,
        prompts: Sequence[Any],
        images=None,
        audio=None,
        videos=None,
        *,
        max_new_tokens: int = 64,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        min_p: float | Sequence[float] = 0.0,
        repetition_penalty: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        stop_ids: Iterable[int] | None = None,
        on_token: Callable[[int, int, str], None] | None = None,
    ) -> Output:
        """Continue every prompt.

        Args:
          prompts: strings (encoded with one bos) or lists of ids (used as they are), one a row.
          images, audio, videos: per row a list of paths, PIL images or arrays; None: none.
          max_new_tokens: per row; 0 gives empty rows.
          temperature: 0 is greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. Each a number or one a
            row.
          seed: one a row, or a number s: row i uses s + i. A row's tokens depend on its prompt, its settings and its
            seed only, neither on other rows nor on drafting.
          stop_ids: ids that end a row (not emitted); None: the model's set, []: never stop.
          on_token: called with (row, id, text) as tokens arrive; the text of a row's calls adds up to its text.

        Raises:
          PromptError, MediaError, ConfigError: naming row and cause.
        """
        rows, prepared = self._encode(prompts, images, audio, videos)
        count = len(rows)
        wanted, mode = self._request(
            rows, max_new_tokens, (temperature, top_k, top_p, min_p, repetition_penalty), seed, stop_ids
        )
        stats = Stats(prefill_tokens=sum(len(row) for row in rows))
        run = _Run(self, rows, stats, on_token)
        if max_new_tokens == 0:
            return run.output([decode.FULL_LENGTH] * count)
        compiled, started = self._compile_seconds, time.perf_counter()
        state = self._begin(rows, prepared, wanted, mode)
        finished = np.asarray(state.finished)
        stats.prefill_seconds = time.perf_counter() - started - (self._compile_seconds - compiled)
        first = np.asarray(state.newest)[:, None], np.zeros((count, 1), bool), np.asarray(state.emitted)
        run.take(*first, finished != decode.RUNNING)
        while (finished == decode.RUNNING).any():
            state = self._rounds(state, wanted, mode, run)
            finished = np.asarray(state.finished)
        stats.compile_seconds = self._compile_seconds - compiled
        return run.output(finished.tolist())

    def _encode(self, prompts, images, audio, videos):
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            kind = "string" if isinstance(prompts, str) else type(prompts).__name__
            raise PromptError(f"prompts is a {kind}; give a list with one prompt a row")
        prompts = list(prompts)
        if any(given is not None for given in (images, audio, videos)):
            if self.processor is None:
                raise ConfigError("media given, but the bundle has no processor")
            batch = self.processor(prompts, images, audio, videos)
            rows = [tokens[:n] for tokens, n in zip(batch.tokens, batch.lengths, strict=True)]
            return request.check_tokens(self.config, rows, self.max_length), batch
        if self.tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
            row = next(i for i, prompt in enumerate(prompts) if isinstance(prompt, str))
            raise PromptError(f"row {row}: a string, but the bundle has no tokenizer; give lists of ids")
        ids = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        rows = request.check_tokens(self.config, ids, self.max_length)
        request.check_no_media(self.config, rows)
        return rows, None

    def _request(self, rows, max_new_tokens, settings, seed, stop_ids) -> tuple[decode.Request, Mode]:
        count = len(rows)
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens is {max_new_tokens!r}; it must be a number from 0 on")
        temperature = request.per_row("temperature", settings[0], count, 0.0)
        top_k = request.per_row("top_k", settings[1], count, 0, whole=True)
        top_p = request.per_row("top_p", settings[2], count, 0.0, 1.0)
        min_p = request.per_row("min_p", settings[3], count, 0.0, 1.0)
        penalty = request.per_row("repetition_penalty", settings[4], count, 1e-3)
        seeds = request.per_row("seed", seed, count, 0, 2**32 - 1, whole=True)
        if isinstance(seed, (int, np.integer)):
            seeds = seeds + np.arange(count)
        mode = Mode(
            sampled=bool((temperature > 0).any()),
            filtered=bool(((top_k > 0) | (top_p < 1) | (min_p > 0)).any()),
            penalized=bool((penalty != 1).any()),
        )
        if not mode.sampled:
            mode = dataclasses.replace(mode, filtered=False)
        controls = Controls(
            jnp.asarray(temperature, jnp.float32),
            jnp.asarray(np.minimum(top_k, self.config.vocab_size), jnp.int32),
            jnp.asarray(top_p, jnp.float32),
            jnp.asarray(min_p, jnp.float32),
            jnp.asarray(penalty, jnp.float32),
            jnp.asarray(np.asarray(seeds, np.uint64) % 2**32, jnp.uint32),
        )
        limits = np.minimum(max_new_tokens, self.max_length - np.asarray([len(row) for row in rows]))
        stops = jnp.asarray(request.stop_set(self.config, stop_ids))
        return decode.Request(controls, stops, self._bias, jnp.asarray(limits, jnp.int32)), mode

    def _begin(self, rows, prepared, wanted: decode.Request, mode: Mode) -> decode.State:
        seen = None
        if mode.penalized:
            marks = np.zeros((len(rows), self.config.vocab_size), bool)
            for i, row in enumerate(rows):
                marks[i, row[row < self.config.vocab_size]] = True
            seen = jnp.asarray(marks)
        return self.begin(self.prefill(rows, prepared), wanted, mode, seen)

    def begin(self, prefix: prefill.Prefix, wanted: decode.Request, mode: Mode, seen=None) -> decode.State:
        """See ``gemma4_jax.sample.decode.begin``."""
        return self._call(programs.begin, self._target, (prefix, wanted, seen), mode=mode)

    def empty(self, batch: int) -> prefill.Prefix:
        """Fresh caches of B rows, with nothing in them."""
        sizes = dict(batch=batch, max_length=self.max_length, draft_tokens=self.longest_draft, dtype=self.cache_dtype)
        return self._call(programs.empty, (), (), config=self.config, stacked=self._looped, **sizes)

    def prefill(self, rows: Sequence[np.ndarray], prepared=None, chunks: Sequence[prefill.Chunk] | None = None):
        """Run prompts through the network into fresh caches: a ``Prefix``.

        Args:
          rows: int32 ids of each row.
          prepared: the processor's ``Batch`` when there are media.
          chunks: calls to make; None: as planned by ``plan_chunks``.
        """
        count = len(rows)
        prefix = self.empty(count)
        runs = embeddings = None
        if prepared is not None and prepared.media is not None:
            runs = np.asarray(image_runs(jnp.asarray(prepared.token_types, jnp.int32)))
            embeddings = self._embed(prepared)
        pieces = [
            prefill.cut_row(len(row), self.chunk, None if runs is None else runs[i, : len(row)])
            for i, row in enumerate(rows)
        ]
        for chunk in prefill.plan_chunks(pieces, self.chunk) if chunks is None else chunks:
            counts = jnp.asarray(chunk.counts)
            if embeddings is None:
                tokens = np.zeros((count, chunk.size), np.int32)
                for i, (row, start, n) in enumerate(zip(rows, chunk.starts, chunk.counts, strict=True)):
                    tokens[i, :n] = row[start : start + n]
                prefix = self._call(programs.text_chunk, self._target, (prefix, counts, jnp.asarray(tokens)))
                continue
            index = chunk.starts[:, None] + np.arange(chunk.size, dtype=np.int32)[None]
            index = np.minimum(index, prepared.tokens.shape[1] - 1)
            x = jnp.take_along_axis(embeddings, jnp.asarray(index)[:, :, None], axis=1)
            types = jnp.asarray(np.take_along_axis(runs, index, axis=1))
            prefix = self._call(programs.media_chunk, self._target, (prefix, counts, x, types))
        return prefix

    def _embed(self, prepared) -> jax.Array:
        """Decoder inputs of whole rows, computed once: (B, T, D)."""
        return self._model.embed(jnp.asarray(prepared.tokens), prepared.media)

    def run_rounds(self, state: decode.State, wanted: decode.Request, mode: Mode, steps: int, rounds: int):
        """Up to ``rounds`` rounds that draft ``steps`` tokens each: the new state, and the ``Emission`` on the host."""
        network, arguments = (*self._target, *self._drafter), (state, wanted, np.int32(rounds))
        state, out = self._call(programs.rounds, network, arguments, steps=steps, mode=mode, buffer=BUFFER)
        return state, jax.device_get(out)

    def _call(self, program, network: tuple[Any, ...], arguments: tuple[Any, ...], **options):
        """Call a program. If it must be compiled for these shapes, that is done before, and timed apart."""
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(arguments))
        key = program, shapes, tuple(options.items())
        if key not in self._compiled:
            jax.block_until_ready(arguments)  # else what is still running would pass for compilation
            started = time.perf_counter()
            program.lower(*network, *arguments, **options).compile()
            give_back_freed_memory()
            self._compile_seconds += time.perf_counter() - started
            self._compiled.add(key)
        return program(*network, *arguments, **options)

    def _rounds(self, state: decode.State, wanted: decode.Request, mode: Mode, run: _Run) -> decode.State:
        policy = self._policies.setdefault(len(run.tokens), DraftPolicy(self.draft_tokens))
        steps, rounds = policy.next() if run.on_token is None else policy.next(STREAM_ROUNDS)
        compiled, started = self._compile_seconds, time.perf_counter()
        state, out = self.run_rounds(state, wanted, mode, steps, rounds)
        seconds = time.perf_counter() - started - (self._compile_seconds - compiled)
        run.count(steps, out, seconds)
        if self._compile_seconds == compiled:  # a program's first run takes ten times what the next ones do
            row_rounds = int(out.rounds.sum())
            policy.record(steps, int(out.rounds.max()), seconds, row_rounds, out.accepted.sum(axis=0).tolist())
        run.take(out.tokens, out.drafted, out.counts, np.asarray(state.finished) != decode.RUNNING)
        return state


class _Run:
    """What one ``generate`` has gathered on the host."""

    def __init__(self, sampler: Sampler, rows, stats: Stats, on_token):
        count = len(rows)
        self.tokenizer, self.stats, self.on_token = sampler.tokenizer, stats, on_token
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.drafted: list[list[bool]] = [[] for _ in range(count)]
        self.texts = [""] * count
        self.streams = [self.tokenizer.stream() for _ in range(count)] if self.tokenizer and on_token else None

    def take(self, tokens: np.ndarray, drafted: np.ndarray, counts: np.ndarray, ended: np.ndarray) -> None:
        """Append ``counts`` (B,) tokens of each row, and stream them. ended: bool (B,), rows without further tokens."""
        for row, n in enumerate(counts.tolist()):
            new = tokens[row, :n].tolist()
            self.tokens[row] += new
            self.drafted[row] += drafted[row, :n].tolist()
            if self.on_token is None:
                continue
            for place, token in enumerate(new):
                text = self.streams[row].push(token) if self.streams else ""
                if self.streams and ended[row] and place == n - 1:
                    text += self.streams[row].flush()
                self.on_token(row, token, text)

    def count(self, steps: int, out: decode.Emission, seconds: float) -> None:
        """Add a run of rounds to the statistics."""
        stats, accepted = self.stats, out.accepted.sum(axis=0).tolist()
        rounds = int(out.rounds.sum())
        stats.rounds += rounds
        stats.drafted += rounds * steps
        stats.accepted += int(out.drafted.sum())
        stats.accepted_per_step += [0] * (steps - len(stats.accepted_per_step))
        for j, n in enumerate(accepted):
            stats.accepted_per_step[j] += n
        stats.draft_lengths[steps] = stats.draft_lengths.get(steps, 0) + int(out.rounds.max())
        stats.decode_tokens += int(out.counts.sum())
        stats.decode_seconds += seconds

    def output(self, finished: list[int]) -> Output:
        """The result, once every row has ended."""
        if self.streams:  # a stop id may be all that came behind a piece of a character
            for row, stream in enumerate(self.streams):
                rest = stream.flush()
                if rest and self.tokens[row]:
                    self.on_token(row, self.tokens[row][-1], rest)
        texts = None if self.tokenizer is None else [self.tokenizer.decode(row) for row in self.tokens]
        reasons = [FINISH_REASONS[state] for state in finished]
        return Output(self.tokens, texts, reasons, self.drafted, self.stats)
