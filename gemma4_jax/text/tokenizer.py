"""Text to token ids and back: byte-fallback BPE in the form of Gemma, loaded from ``tokenizer.json`` or trained here.

Rules of the form: a space becomes U+2581, nothing is put before the text, a character without an entry becomes its
UTF-8 bytes ``<0x00>`` … ``<0xFF>``. So every string survives encoding and decoding unchanged, with one exception that
the form itself makes: U+2581 in a text comes back as a space.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken

from gemma4_jax.errors import ConfigError, PromptError

SPACE = "\u2581"
PAD, EOS, BOS, UNK, MASK = BASE_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
CONTROL_TOKENS = (
    "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>", "<|image>", "<|image|>", "<image|>",
    "<|audio>", "<|audio|>", "<audio|>", "<|video|>",
)  # fmt: skip
SPECIAL_TOKENS = BASE_TOKENS + CONTROL_TOKENS
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_BYTE_VALUE = {name: byte for byte, name in enumerate(BYTE_TOKENS)}


class Tokenizer:
    """A ``tokenizers`` tokenizer with the project's rules for bos and control tokens.

    Control tokens (turn marks, media placeholders, bos, …) written inside a text stay text unless ``allow_control``
    is set; they never become control ids by accident.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any] | None = None):
        """Args: ``backend``: the tokenizer; ``settings``: contents of its ``tokenizer_config.json``, if any."""
        self._backend = backend
        self.settings = settings
        vocab = backend.get_vocab(with_added_tokens=True)
        # Some files list control tokens as ordinary added tokens, which the backend would find inside any text.
        marked = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        unmarked = [name for name in SPECIAL_TOKENS if name in vocab and name not in marked]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in unmarked])
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # the backend's name for "leave special tokens in a text as text"
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: index for index, token in added.items() if token.special}
        self._special_pattern = re.compile(
            "(" + "|".join(re.escape(name) for name in sorted(self._special, key=len, reverse=True)) + ")"
        )
        self._size = 1 + max(vocab.values())
        self._pieces: list[str] | None = None
        self._fingerprint: str | None = None
        self.byte_fallback = backend.decoder is not None and b"ByteFallback" in backend.decoder.__getstate__()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a folder that holds ``tokenizer.json``, or of such a file.

        Raises:
          PromptError: no such file, or one that cannot be read.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise PromptError(f"no tokenizer at {file}")
        settings_file = file.with_name("tokenizer_config.json")
        try:
            text = file.read_text(encoding="utf-8")
            json.loads(text)
            settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PromptError(f"{file}: not a tokenizer: {error}") from error
        return cls.from_json(text, settings, origin=str(file))

    @classmethod
    def from_json(cls, text: str, settings: dict[str, Any] | None = None, origin: str = "tokenizer json") -> Tokenizer:
        """The tokenizer that a ``tokenizer.json`` text describes. Raises PromptError naming ``origin``."""
        description = json.loads(text)
        if not isinstance(description, dict) or "model" not in description:
            raise PromptError(f"{origin}: not a tokenizer: no field 'model'")
        return cls(tokenizers.Tokenizer.from_str(text), settings)

    @classmethod
    def of_entries(
        cls, names: Sequence[str], merges: Sequence[tuple[str, str]], special: Sequence[str], added: Sequence[str] = ()
    ) -> Tokenizer:
        """A tokenizer of Gemma's form from its parts.

        Args:
          names: entries in the order of their ids. merges: pairs of entries, most frequent first.
          special: control tokens. added: entries that are found whole in any text.

        Raises:
          PromptError: parts that do not fit together.
        """
        known = set(names)
        if len(known) != len(names):
            raise PromptError(f"a tokenizer of {len(names)} entries has {len(names) - len(known)} of them twice")
        missing = next((name for name in (BOS, UNK, *special, *added) if name not in known), None)
        if missing is not None:
            raise PromptError(f"the tokenizer has no entry {missing!r}")
        wrong = next((pair for pair in merges if not {*pair, "".join(pair)} <= known or len(pair) != 2), None)
        if wrong is not None:
            raise PromptError(f"the tokenizer's merge {' '.join(wrong)!r} is of entries that it does not have")
        return cls(_backend(names, list(merges), special, [name for name in added if name not in SPECIAL_TOKENS]))

    def to_json(self) -> str:
        """The text of a ``tokenizer.json``, readable by ``tokenizers`` and ``transformers``."""
        return self._backend.to_str(pretty=True)

    def save(self, folder: str | Path) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json`` into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.to_json(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(self.settings_json(), encoding="utf-8")

    def settings_json(self) -> str:
        """The text of its ``tokenizer_config.json``."""
        settings = self.settings if self.settings is not None else _default_settings()
        return json.dumps(settings, indent=2) + "\n"

    @property
    def chat_template(self) -> str | None:
        """The template that its ``tokenizer_config.json`` holds: a text, or of a list of named ones the one named default.

        Raises:
          PromptError: it is neither.
        """
        found = (self.settings or {}).get("chat_template")
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            if "default" not in named:
                raise PromptError(
                    f"tokenizer_config.json: chat_template has no default; choices: {', '.join(map(str, named))}"
                )
            found = named["default"]
        if found is not None and not isinstance(found, str):
            raise PromptError(f"tokenizer_config.json: chat_template is {type(found).__name__}; a text is expected")
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_json, (self._backend.to_str(), self.settings)

    def fingerprint(self) -> str:
        """A hash that is equal for two tokenizers exactly if they give equal ids."""
        if self._fingerprint is None:
            self._fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()
        return self._fingerprint

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._size

    @property
    def bos_id(self) -> int:
        """Id of ``<bos>``."""
        return self.token_id(BOS)

    @property
    def eos_id(self) -> int:
        """Id of ``<eos>``."""
        return self.token_id(EOS)

    @property
    def pad_id(self) -> int:
        """Id of ``<pad>``."""
        return self.token_id(PAD)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Names and ids of the control tokens, the base tokens among them."""
        return dict(self._special)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return frozenset(self._special.values())

    def token_id(self, name: str) -> int:
        """The id of an entry by its exact name. Raises PromptError naming it if there is none (never ``<unk>``)."""
        index = self._backend.token_to_id(name)
        if index is None:
            raise PromptError(f"the tokenizer has no token {name!r} among its {self._size} entries")
        return index

    def token_name(self, index: int) -> str:
        """The name of an entry. Raises PromptError for an id outside the table."""
        pieces = self._piece_table()
        if not 0 <= index < len(pieces):
            raise PromptError(f"token id {index} is outside the tokenizer's {self._size} entries")
        return pieces[index]

    def encode(self, text: str, bos: bool = True, allow_control: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
          text: any string without lone surrogates.
          bos: start with exactly one bos; a text that already begins with one (``allow_control``) gets no second.
          allow_control: let names of control tokens inside the text stand for these tokens.

        Raises:
          PromptError: the text is not a string or has no UTF-8 form.
        """
        return self.encode_batch([text], bos=bos, allow_control=allow_control)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = True, allow_control: bool = False) -> list[list[int]]:
        """``encode`` for many texts at once, on all cores."""
        for text in texts:
            _check_text(text)
        start = [self.bos_id] if bos else []
        if not allow_control:
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [start + encoding.ids for encoding in encoded]
        rows = [self._encode_with_control(text) for text in texts]
        return [ids if start and ids[:1] == start else start + ids for ids in rows]

    def _encode_with_control(self, text: str) -> list[int]:
        ids: list[int] = []
        parts = self._special_pattern.split(text) if self._special else [text]
        for part in parts:
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._backend.encode(part, add_special_tokens=False).ids)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids; bytes that form no UTF-8 become U+FFFD.

        Args:
          ids: token ids.
          skip_special: leave control tokens out instead of writing their names.

        Raises:
          PromptError: an id outside the table.
        """
        stream = self.stream(skip_special)
        return "".join([stream.push(index) for index in ids]) + stream.flush()

    def stream(self, skip_special: bool = False) -> StreamDecoder:
        """A decoder that takes one id at a time."""
        return StreamDecoder(self, skip_special)

    def byte_lengths(self) -> np.ndarray:
        """How many UTF-8 bytes of text each id stands for: int32 (V,), 0 for control tokens.

        The sum over the ids of a text is its length in bytes (see the module's note on U+2581).
        """
        return np.asarray(
            [
                0 if name in self._special else 1 if name in _BYTE_VALUE else len(name.replace(SPACE, " ").encode())
                for name in self._piece_table()
            ],
            np.int32,
        )

    def _piece_table(self) -> list[str]:
        if self._pieces is None:
            pieces = [""] * self._size
            for name, index in self._backend.get_vocab(with_added_tokens=True).items():
                pieces[index] = name
            self._pieces = pieces
        return self._pieces


class StreamDecoder:
    """Turns ids into text one at a time without ever emitting half a character.

    The pieces that ``push`` and ``flush`` return add up to ``Tokenizer.decode`` of the same ids, also for ids that
    are not valid text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        """Args: ``tokenizer``; ``skip_special``: leave control tokens out instead of writing their names."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []  # only for tokenizers of another form, which are decoded from the start each time
        self._emitted = 0

    def push(self, index: int) -> str:
        """The text that has become certain with this id: empty in the middle of a character."""
        index = int(index)
        name = self._tokenizer.token_name(index)
        if not self._tokenizer.byte_fallback:
            return self._push_other(index)
        byte = _BYTE_VALUE.get(name)
        if byte is not None:
            return self._utf8.decode(bytes([byte]))
        text = self.flush()
        if name in self._tokenizer._special:
            return text if self._skip_special else text + name
        return text + name.replace(SPACE, " ")

    def flush(self) -> str:
        """The rest: U+FFFD for a character that was never completed."""
        if self._tokenizer.byte_fallback:
            return self._utf8.decode(b"", final=True)
        return self._rest(self._decode_other())

    def _push_other(self, index: int) -> str:
        self._ids.append(index)
        return self._rest(self._decode_other().rstrip("\ufffd"))

    def _decode_other(self) -> str:
        return self._tokenizer._backend.decode(self._ids, skip_special_tokens=self._skip_special)

    def _rest(self, text: str) -> str:
        rest = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return rest


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise PromptError(f"text must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: no UTF-8 form"
        ) from error


def _default_settings() -> dict[str, Any]:
    return {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000_000_000_000,
    }


def minimum_vocab_size() -> int:
    """Entries that every trained tokenizer has: control tokens, bytes and the space."""
    return len(SPECIAL_TOKENS) + len(BYTE_TOKENS) + 1


def check_vocab_size(vocab_size: int) -> None:
    """Raises ConfigError if a tokenizer of this size cannot hold the fixed entries."""
    if vocab_size < minimum_vocab_size():
        raise ConfigError(
            f"vocab_size {vocab_size} is below the {minimum_vocab_size()} fixed entries "
            f"({len(SPECIAL_TOKENS)} control tokens, {len(BYTE_TOKENS)} bytes, the space)"
        )


# Where training may not join two characters. Each rule looks only at two neighbours, so an encoder that splits a text
# elsewhere, or nowhere, applies the same merges and finds the same ids: a Gemma tokenizer of another library as well.
_LETTERS = r"\p{L}\p{M}_"
_TRAINING_WORDS = (
    rf"\n+|\p{{N}}|{SPACE}*[{_LETTERS}]+|{SPACE}*[^{_LETTERS}\p{{N}}{SPACE}\n]+|{SPACE}+"  # digits stay single
)
_LINES = r"[^\n]+|\n+"  # what encoding splits at: lines and the runs of newlines between them
_COUNT_BLOCK = 1 << 22  # characters counted at once


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-fallback BPE of the form of Gemma, learnt from texts.

    Ids 0-4 are the base tokens, then come the control tokens, the bytes, the characters and the merges; what the
    texts cannot fill is named ``<unused0>``, … so that the table has exactly ``vocab_size`` entries. Equal texts in
    equal order give equal tokenizers.

    Args:
      texts: documents; read twice, so an iterator is first made a list.
      vocab_size: entries of the table.

    Raises:
      ConfigError: ``vocab_size`` does not hold the fixed entries.
      PromptError: a text that is no string or has no UTF-8 form.
    """
    check_vocab_size(vocab_size)
    if iter(texts) is texts:
        texts = list(texts)
    free = vocab_size - minimum_vocab_size() + 1  # the space is one of the characters
    # One twelfth of a table for single characters covers ASCII in small ones and leaves rare ones to the bytes.
    alphabet = _frequent_characters(texts, min(free, max(96, free // 12)))
    entries, merges = _learn_merges(texts, alphabet, free)
    return Tokenizer(_gemma_form(entries, merges, vocab_size))


def _frequent_characters(texts: Iterable[str], count: int) -> list[str]:
    """The space first, for without it the bytes of U+2581 would stand for spaces, then the most frequent others."""
    counts = np.zeros(0x110000, np.int64)
    block: list[str] = []
    size = 0
    for text in texts:
        _check_text(text)
        block.append(text)
        size += len(text)
        if size >= _COUNT_BLOCK:
            counts += _count_characters(block)
            block, size = [], 0
    counts += _count_characters(block)
    counts[ord(" ")] = counts[ord(SPACE)] = 0
    order = np.argsort(-counts, kind="stable")[: count - 1]
    return [SPACE, *(chr(code) for code in order if counts[code])]


def _count_characters(block: list[str]) -> np.ndarray:
    codes = np.frombuffer("".join(block).encode("utf-32-le"), np.uint32)
    return np.bincount(codes, minlength=0x110000)


def _learn_merges(texts: Iterable[str], alphabet: list[str], free: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Entries beside the fixed ones, at most ``free``, and the merges that make them."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_TRAINING_WORDS), "isolated")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=free,
        min_frequency=2,
        initial_alphabet=alphabet,  # with the limit below: exactly these, whatever order a hash map has
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    entries, merges = dict.fromkeys(alphabet), []
    reserved = {*SPECIAL_TOKENS, *BYTE_TOKENS}
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        # A text full of a control token's name must not teach how to spell it.
        if left in entries and right in entries and left + right not in reserved:
            entries[left + right] = None
            merges.append((left, right))
    return list(entries), merges


def _gemma_form(entries: list[str], merges: list[tuple[str, str]], vocab_size: int) -> tokenizers.Tokenizer:
    names = [*SPECIAL_TOKENS, *BYTE_TOKENS, *entries]
    taken = set(names)
    unused = (name for index in range(2 * vocab_size) if (name := f"<unused{index}>") not in taken)
    names += [next(unused) for _ in range(vocab_size - len(names))]
    return _backend(names, merges, SPECIAL_TOKENS)


def _backend(names: Sequence[str], merges, special: Sequence[str], added: Sequence[str] = ()) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=merges,
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_LINES), "isolated")
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace(SPACE, " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    bos = (BOS, names.index(BOS))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[bos]
    )
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    return backend
