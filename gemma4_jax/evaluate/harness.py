"""The bridge to lm-eval (extra ``eval``): importing this module registers the model class ``gemma4_jax``.

Log-likelihoods are those of ``Scorer``; prompts are encoded with one bos, as the checkpoint's own tokenizer does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import gemma4_jax as g4
from gemma4_jax.errors import ConfigError
from gemma4_jax.evaluate.scorer import Scorer
from gemma4_jax.text import chat
from gemma4_jax.text.pieces import END_TURN, to_text

NEW_TOKENS = 256  # of an answer, unless the task says otherwise
# Names that lm-eval gives the model class beside the user's own arguments.
_GIVEN_BY_HARNESS = ("device", "max_batch_size")


@register_model("gemma4_jax")
class Gemma4LM(TemplateLM):
    """A bundle as lm-eval sees it.

    Args:
      pretrained: what ``g4.load`` takes, or a bundle.
      drafter, dtype, quantization: of ``g4.load``.
      batch_size: rows at once.
      max_length: longest context and answer together; None: the model's max_position_embeddings.
      draft_tokens: of the sampler.
      add_bos_token: begin encoded texts with bos (a text that begins with it keeps its own).

    Raises:
      ConfigError: a bundle without a tokenizer, an argument that is not known, or a batch size below 1.
    """

    def __init__(
        self,
        pretrained: Any,
        drafter: str | None = None,
        dtype: str | None = "float32",
        quantization: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        draft_tokens: int | str = "auto",
        add_bos_token: bool = True,
        **others: Any,
    ):
        super().__init__()
        unknown = sorted(set(others) - set(_GIVEN_BY_HARNESS))
        if unknown:
            raise ConfigError(f"unknown model argument {unknown[0]!r} of gemma4_jax in lm-eval")
        if isinstance(pretrained, str):
            pretrained = g4.load(pretrained, drafter=drafter, dtype=dtype, quantization=quantization)
        if pretrained.tokenizer is None:
            raise ConfigError("lm-eval asks with text: this bundle has no tokenizer")
        self.bundle, self.batch_size = pretrained, int(batch_size)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        self.max_length = int(max_length or pretrained.config.max_position_embeddings)
        self.draft_tokens, self.add_bos_token = draft_tokens, add_bos_token
        self.scorer = Scorer(pretrained, batch_size=self.batch_size)
        self._sampler: g4.Sampler | None = None
        self._pieces: list[str] | None = None

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.bundle.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self.bundle.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in caches of requests."""
        return self.bundle.tokenizer.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; control tokens that it spells out are control tokens (templates write them)."""
        tokenizer = self.bundle.tokenizer
        bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if string.startswith(tokenizer.token_name(tokenizer.bos_id)):
            bos = False
        return tokenizer.encode(string, bos=bos, allow_control=True)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The checkpoint's own template, or a note that the built-in renderer is used."""
        return self.bundle.chat_template or "built in"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text; with ``add_generation_prompt`` False its last turn is left open."""
        tokenizer = self.bundle.tokenizer
        prompt = chat.render(
            chat_history,
            generate=add_generation_prompt,
            template=self.bundle.chat_template,
            controls=tokenizer.special_tokens,
        )
        text = to_text(prompt.pieces)
        return text if add_generation_prompt else text.removesuffix("\n").removesuffix(END_TURN)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in the harness's own windows."""
        windows, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for context, target in map(make_disjoint_window, rolling):
                windows.append((None, context, target))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        rows = [[*context, *target][-(self.max_length + 1) :] for _, context, target in requests]
        first = [max(1, len(row) - len(target)) for row, (_, _, target) in zip(rows, requests, strict=True)]
        scored = self.scorer.score(rows, first)
        found = [(float(part.log_probabilities.sum(dtype="float64")), bool(part.greedy.all())) for part in scored]
        for (key, _, _), result in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut before the first of the task's stop strings."""
        answers: list[str | None] = [None] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in by_settings.values():
            prompts = {index: self.tok_encode(requests[index].args[0]) for index in indices}
            order = sorted(indices, key=lambda index: -len(prompts[index]))
            for at in range(0, len(order), self.batch_size):
                batch = order[at : at + self.batch_size]
                settings = dict(requests[batch[0]].args[1])
                texts = self._generate([prompts[index] for index in batch], settings)
                for index, text in zip(batch, texts, strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        new_tokens = int(settings.pop("max_gen_toks", NEW_TOKENS))
        sampling = _sampling(settings)
        room = self.max_length - new_tokens
        if room < 1:
            raise ConfigError(f"max_gen_toks {new_tokens} leaves no room for a prompt in max_length {self.max_length}")
        prompts = [prompt[-room:] for prompt in prompts]
        sampler = self._sampler_for(max(map(len, prompts)) + new_tokens)
        stops = {*sampler.config.stop_token_ids, *self._stops_at_once(until)}
        out = sampler.generate(
            prompts,
            max_new_tokens=new_tokens,
            stop_ids=[index for index in stops if index < sampler.config.vocab_size],
            **sampling,
        )
        return [_cut(text, until) for text in out.texts]

    def _sampler_for(self, length: int) -> g4.Sampler:
        """The sampler, made anew when it cannot hold ``length`` tokens."""
        if self._sampler is None or self._sampler.max_length < length:
            size = min(max(256, 1 << (length - 1).bit_length()), self.bundle.config.max_position_embeddings)
            self._sampler = g4.Sampler(self.bundle, max_length=size, draft_tokens=self.draft_tokens)
        return self._sampler

    def _stops_at_once(self, until: Sequence[str]) -> list[int]:
        """Tokens whose text begins with a stop string: once one is chosen, all of the answer is there."""
        tokenizer = self.bundle.tokenizer
        if self._pieces is None:
            self._pieces = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
        return [index for index, piece in enumerate(self._pieces) if any(piece.startswith(s) for s in until if s)]


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's generation settings as the sampler's. Raises ConfigError naming one that it does not have."""
    names = {
        "temperature": float,
        "top_p": float,
        "top_k": int,
        "min_p": float,
        "repetition_penalty": float,
        "seed": int,
    }
    found = {name: kind(settings[name]) for name, kind in names.items() if settings.get(name) is not None}
    unknown = sorted(set(settings) - set(names) - {"do_sample"})
    if unknown:
        raise ConfigError(
            f"generation setting {unknown[0]!r} of the task; choices: {', '.join(names)}, do_sample, until"
        )
    if not settings.get("do_sample", found.get("temperature", 0.0) > 0):
        found["temperature"] = 0.0
    return found


def _cut(text: str, until: Sequence[str]) -> str:
    ends = [at for at in (text.find(stop) for stop in until if stop) if at >= 0]
    return text[: min(ends)] if ends else text


def run_tasks(
    bundle, tasks: Sequence[str], *, include_path: str = "", limit: int | None = None, num_fewshot: int | None = None,
    batch_size: int = 8, max_length: int | None = None, evaluate: Callable[..., Any] = lm_eval.simple_evaluate,
) -> dict[str, float]:  # fmt: skip
    """Run tasks of lm-eval on a bundle: ``TASK_METRIC`` -> number, metrics with a filter as ``TASK_METRIC_FILTER``.

    Args:
      tasks: names; those of ``include_path`` (a folder of task files) too.
      limit: first questions only. num_fewshot: None: as the task says.
    """
    manager = TaskManager(include_path=include_path or None)
    model = Gemma4LM(bundle, batch_size=batch_size, max_length=max_length)
    found = evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=num_fewshot, bootstrap_iters=0
    )
    return {
        "_".join([task, metric, *([kind] if kind != "none" else [])]): float(value)
        for task, values in found["results"].items()
        for metric, _, kind in [key.partition(",") for key in values]
        for value in [values[f"{metric},{kind}" if kind else metric]]
        if kind and not metric.endswith("_stderr") and isinstance(value, (int, float))
    }
