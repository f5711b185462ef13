"""Text and media to model inputs: one bos, expanded placeholders, token types, media arrays in order of position.

Axis letters: B batch, T tokens, P patches, A audio frames, X numbers of a patch, S samples of a frame. Source of the
rules: spec, images / audio / video / attention groups.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma4_jax.config import ModelConfig
from gemma4_jax.errors import ConfigError, MediaError, PromptError
from gemma4_jax.media.audio import MAX_TOKENS, ON_LONG, prepare_audio
from gemma4_jax.media.images import BUDGETS, prepare_image
from gemma4_jax.media.video import BUDGET, NUM_FRAMES, prepare_video, timestamp
from gemma4_jax.model.vision import PADDING_POSITION, MediaInputs
from gemma4_jax.text.pieces import AUDIO, IMAGE, VIDEO, Control, Pieces, placeholder, split_controls

TEXT_TYPE, IMAGE_TYPE, VIDEO_TYPE, AUDIO_TYPE = 0, 1, 2, 3
_KIND = {IMAGE: "image", AUDIO: "audio", VIDEO: "video"}
_SMALLEST_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class MediaOptions:
    """How media are prepared.

    Raises:
      ConfigError: naming the field, its value and the choices.
    """

    image_budget: int = 280
    video_budget: int = BUDGET
    video_frames: int = NUM_FRAMES
    video_fps: float | None = None  # frames a second instead of video_frames
    max_audio_tokens: int = MAX_TOKENS
    long_audio: str = "raise"
    exact_jpeg: bool = False  # decode large JPEG files in full before resizing (gemma4_jax.media.prepare_image)

    def __post_init__(self):
        choices = {"image_budget": BUDGETS, "video_budget": BUDGETS, "long_audio": ON_LONG}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choices: {', '.join(map(str, allowed))}")
        for name in ("video_frames", "max_audio_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.video_fps is not None and self.video_fps <= 0:
            raise ConfigError(f"video_fps is {self.video_fps}; it must be positive")

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> MediaOptions:
        """Options of a checkpoint folder's ``processor_config.json``; defaults where it or a field is missing.

        Raises:
          ConfigError: the file is not JSON, or has a value outside of the choices.
        """
        path = pathlib.Path(folder) / "processor_config.json"
        if not path.is_file():
            return cls()
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        found = {
            "image_budget": _nested(stored, "image_processor", "max_soft_tokens"),
            "video_budget": _nested(stored, "video_processor", "max_soft_tokens"),
            "video_frames": _nested(stored, "video_processor", "num_frames"),
            "max_audio_tokens": stored.get("audio_seq_length"),
        }
        return cls(**{name: value for name, value in found.items() if value is not None})

    def to_json(self) -> str:
        """Text of a ``processor_config.json`` that ``from_folder`` reads back; what it has no field for is left out."""
        stored = {
            "image_processor": {"max_soft_tokens": self.image_budget},
            "video_processor": {"max_soft_tokens": self.video_budget, "num_frames": self.video_frames},
            "audio_seq_length": self.max_audio_tokens,
        }
        return json.dumps(stored, indent=2) + "\n"


class Row(NamedTuple):
    """One prompt or training example.

    tokens, token_types: (T,) int32. patches: (P, X) f32, patch_positions: (P, 2) int32, audio_frames: (A, S) f32: each
    in the order of its soft tokens and without padding.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    patches: np.ndarray
    patch_positions: np.ndarray
    audio_frames: np.ndarray


class Batch(NamedTuple):
    """Rows side by side.

    tokens, token_types: (B, T) int32, padded at the end with the pad token, type 0. lengths: (B,) int32. media: the
    model's ``media`` argument, None when no row has any.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    lengths: np.ndarray
    media: MediaInputs | None


class Processor:
    """Turns prompts into rows and rows into batches.

    Args:
      tokenizer: the project's tokenizer; None for prompts that are ids already.
      config: gives the token ids and the sizes of patches and frames.
      options: how media are prepared.
    """

    def __init__(self, tokenizer, config: ModelConfig, options: MediaOptions | None = None):
        self.tokenizer = tokenizer
        self.config = config
        self.options = options or MediaOptions()
        patch_dim = config.vision.patch_dim if config.vision else 0
        frame_samples = config.audio.audio_embed_dim if config.audio else 0
        self._no_media = (
            np.zeros((0, patch_dim), np.float32), np.zeros((0, 2), np.int32), np.zeros((0, frame_samples), np.float32)
        )  # fmt: skip

    def __call__(
        self,
        prompts: Sequence[str | Sequence[int] | Pieces],
        images: Sequence[Sequence[Any]] | None = None,
        audio: Sequence[Sequence[Any]] | None = None,
        videos: Sequence[Sequence[Any]] | None = None,
        *,
        length: int | None = None,
    ) -> Batch:
        """Encode and batch prompts with the media of each row.

        Args:
          prompts: what ``encode`` takes, one a row.
          images, audio, videos: for each row a list of sources, or None (for a row, or for all).
          length: T; None: that of the longest row.

        Raises:
          MediaError, PromptError: naming the row.
        """
        media = [_per_row(name, given, len(prompts)) for name, given in
                 (("images", images), ("audio", audio), ("videos", videos))]  # fmt: skip
        rows = []
        for index, (prompt, *sources) in enumerate(zip(prompts, *media, strict=True)):
            try:
                rows.append(self.encode(prompt, *sources))
            except (MediaError, PromptError) as error:
                raise type(error)(f"row {index}: {error}") from error
        return self.batch(rows, length)

    def encode(
        self,
        prompt: str | Sequence[int] | Pieces,
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        videos: Sequence[Any] = (),
    ) -> Row:
        """One prompt with its media.

        Args:
          prompt: a string, encoded with one bos, in which ``<|image|>``, ``<|audio|>`` and ``<|video|>`` mark the
            places of the media given with it (media without marks come first); ``Pieces`` as a chat renders them; or
            token ids, taken as they are, with one soft token for every patch and frame.
          images, audio, videos: sources in the order of their places.

        Raises:
          MediaError: a source cannot be prepared, or places and media differ in number.
          PromptError: an id out of range.
        """
        clips = [self._prepared("video", i, self._video, source) for i, source in enumerate(videos)]
        tiles = [self._prepared("image", i, self._image, source) for i, source in enumerate(images)]
        sounds = [self._prepared("audio", i, self._audio, source) for i, source in enumerate(audio)]
        if isinstance(prompt, (str, Pieces)):
            tokens = self._expand(self._pieces(prompt, tiles, sounds, clips), tiles, sounds, clips)
        else:
            tokens = _ids(prompt)
        return self._row(tokens, tiles, sounds, clips)

    def batch(self, rows: Sequence[Row], length: int | None = None) -> Batch:
        """Pad rows to one length and their media to one bucket. Raises PromptError for a row longer than ``length``."""
        longest = max(len(row.tokens) for row in rows)
        length = longest if length is None else length
        if longest > length:
            raise PromptError(f"a row has {longest} tokens but the batch is {length} long")
        tokens = [_pad(row.tokens, length, self.config.pad_token_id) for row in rows]
        types = [_pad(row.token_types, length, TEXT_TYPE) for row in rows]
        lengths = np.asarray([len(row.tokens) for row in rows], np.int32)
        return Batch(np.stack(tokens), np.stack(types), lengths, stack_media(rows))

    def _pieces(self, prompt: str | Pieces, tiles: list, sounds: list, clips: list) -> Pieces:
        if isinstance(prompt, Pieces):
            return prompt
        given = [mark for mark, media in ((IMAGE, tiles), (AUDIO, sounds), (VIDEO, clips)) if media]
        pieces = split_controls(prompt, given)
        first = []
        for mark, media in ((IMAGE, tiles), (AUDIO, sounds), (VIDEO, clips)):
            if media and mark not in pieces:
                first += [part for _ in media for part in placeholder(mark)]
        return Pieces([Control("<bos>"), *first, *pieces])

    def _expand(self, pieces: Pieces, tiles: list, sounds: list, clips: list) -> np.ndarray:
        """Ids of the pieces. Neighbouring texts are encoded as one: a frame's time merges with what precedes it."""
        config = self.config
        for mark, media in ((IMAGE, tiles), (AUDIO, sounds), (VIDEO, clips)):
            places, kind = sum(isinstance(piece, Control) and piece == mark for piece in pieces), _KIND[mark]
            if places != len(media):
                raise MediaError(f"{places} {kind} placeholders but {len(media)} {kind} inputs")
        left = {IMAGE: iter(tiles), AUDIO: iter(sounds), VIDEO: iter(clips)}
        ids, text = [], ""

        def put(*new: int):
            nonlocal text
            if text:
                ids.extend(self.tokenizer.encode(text, bos=False))
                text = ""
            ids.extend(new)

        for piece in pieces:
            if not isinstance(piece, Control):
                text += piece
            elif piece == IMAGE:
                count = len(next(left[IMAGE]).patches)
                put(config.boi_token_id, *[config.image_token_id] * count, config.eoi_token_id)
            elif piece == AUDIO:
                put(config.boa_token_id, *[config.audio_token_id] * len(next(left[AUDIO])), config.eoa_token_id)
            elif piece == VIDEO:
                clip = next(left[VIDEO])
                for number, seconds in enumerate(clip.seconds):
                    text += f"{' ' if number else ''}{timestamp(seconds)} "
                    put(config.boi_token_id, *[config.video_token_id] * clip.patches.shape[1], config.eoi_token_id)
            else:
                put(self.tokenizer.token_id(str(piece)))
        put()
        return np.asarray(ids, np.int32)

    def _row(self, tokens: np.ndarray, tiles: list, sounds: list, clips: list) -> Row:
        config = self.config
        types = token_types(config, tokens)
        if not types.any() and not (tiles or sounds or clips):
            return Row(tokens, types, *self._no_media)
        vision = types[(types == IMAGE_TYPE) | (types == VIDEO_TYPE)]
        no_patches, _, no_frames = self._no_media
        patches = np.zeros((len(vision), no_patches.shape[1]), np.float32)
        positions = np.zeros((len(vision), 2), np.int32)
        frames_of_clips = [(frame, clip.positions) for clip in clips for frame in clip.patches]
        for kind, type_id, parts in (("image", IMAGE_TYPE, tiles), ("video", VIDEO_TYPE, frames_of_clips)):
            place = vision == type_id
            _check_count(kind, int(place.sum()), sum(len(part[0]) for part in parts))
            if parts:
                patches[place] = np.concatenate([part[0] for part in parts])
                positions[place] = np.concatenate([part[1] for part in parts])
        frames = np.concatenate([no_frames, *sounds])
        _check_count("audio", int((types == AUDIO_TYPE).sum()), len(frames))
        return Row(tokens, types, patches, positions, frames)

    def _prepared(self, kind: str, index: int, prepare, source: Any):
        part = self.config.audio if kind == "audio" else self.config.vision
        if part is None:
            raise MediaError(f"{kind} {index} given, but the model has no {kind} input")
        try:
            return prepare(source)
        except MediaError as error:
            raise MediaError(f"{kind} {index}: {error}") from error

    def _image(self, source: Any):
        side = self.config.vision.model_patch_size
        image = prepare_image(source, self.options.image_budget, side, exact=self.options.exact_jpeg)
        self._check_positions(image.positions)
        return image

    def _video(self, source: Any):
        options, side = self.options, self.config.vision.model_patch_size
        clip = prepare_video(
            source, num_frames=options.video_frames, fps=options.video_fps, budget=options.video_budget, side=side
        )
        self._check_positions(clip.positions)
        return clip

    def _audio(self, source: Any) -> np.ndarray:
        return prepare_audio(
            source,
            max_tokens=self.options.max_audio_tokens,
            on_long=self.options.long_audio,
            frame_samples=self.config.audio.audio_embed_dim,
        )

    def _check_positions(self, positions: np.ndarray):
        size = self.config.vision.mm_posemb_size
        if positions.max() >= size:
            raise MediaError(f"patch position {positions.max()} is outside the model's position table of {size}")


def token_types(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Token types by id: int32 like ``tokens``; 0 text, 1 image, 2 video, 3 audio soft tokens."""
    types = np.zeros(np.shape(tokens), np.int32)
    soft = {IMAGE_TYPE: config.image_token_id, VIDEO_TYPE: config.video_token_id, AUDIO_TYPE: config.audio_token_id}
    for kind, index in soft.items():
        types[np.asarray(tokens) == index] = kind
    return types


def bucket(count: int, smallest: int = _SMALLEST_BUCKET) -> int:
    """The padded size for ``count`` media rows: 0, or a size of a grid with four steps to each doubling."""
    if count == 0:
        return 0
    top = smallest
    while top < count:
        top *= 2
    step = max(top // 8, 1)
    return top if top == smallest else -(-count // step) * step


def stack_media(
    rows: Iterable[Row], patch_count: int | None = None, frame_count: int | None = None, keep_empty: bool = False
) -> MediaInputs | None:
    """Media of rows in one fixed shape.

    Args:
      rows: the batch.
      patch_count, frame_count: P and A; None: the bucket of the row with the most.
      keep_empty: give arrays of the counts asked for even when no row has media, so that all batches have one shape.

    Returns:
      MediaInputs, a part of which is None when no row has it; None when no row has media.

    Raises:
      MediaError: a row with more than ``patch_count`` or ``frame_count``, by number.
    """
    rows = list(rows)
    patches = _stack("patches", [row.patches for row in rows], patch_count, 0, keep_empty)
    if patches is None:
        positions = None
    else:
        positions = _stack("patches", [row.patch_positions for row in rows], patches.shape[1], PADDING_POSITION, True)
    frames = _stack("audio frames", [row.audio_frames for row in rows], frame_count, 0, keep_empty)
    return None if patches is None and frames is None else MediaInputs(patches, positions, frames)


def check_counts(config: ModelConfig, tokens: np.ndarray, media: MediaInputs | None):
    """Refuse a batch whose soft tokens and media rows differ in number, before it meets a compiled function.

    Args:
      config: gives the soft tokens' ids.
      tokens: (B, T).
      media: the batch's media. Padding of sound cannot be told from silence, so for it only too few frames are found.

    Raises:
      MediaError: naming the row and both numbers.
    """
    types = token_types(config, np.asarray(tokens))
    vision = ((types == IMAGE_TYPE) | (types == VIDEO_TYPE)).sum(axis=1)
    sound = (types == AUDIO_TYPE).sum(axis=1)
    media = media or MediaInputs()
    patches, frames = np.zeros(len(types), int), 0
    if media.patches is not None:
        patches = (np.asarray(media.patch_positions)[:, :, 0] != PADDING_POSITION).sum(axis=1)
    if media.audio_frames is not None:
        frames = media.audio_frames.shape[1]
    for row in range(len(types)):
        if vision[row] != patches[row]:
            raise MediaError(f"row {row} has {vision[row]} image and video soft tokens but {patches[row]} patches")
        if sound[row] > frames:
            raise MediaError(f"row {row} has {sound[row]} audio soft tokens but {frames} audio frames")


def _ids(prompt: Sequence[int]) -> np.ndarray:
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not (ids.size == 0 or np.issubdtype(ids.dtype, np.integer)):
        raise PromptError(f"a prompt is a string or a flat list of ids, not {ids.dtype} of shape {ids.shape}")
    return ids.astype(np.int32)


def _check_count(kind: str, soft_tokens: int, entries: int):
    if soft_tokens != entries:
        raise MediaError(f"{soft_tokens} {kind} soft tokens but the {kind} inputs fill {entries}")


def _per_row(name: str, given: Sequence[Any] | None, rows: int) -> list[Sequence[Any]]:
    if given is None:
        return [()] * rows
    given = list(given)
    if len(given) != rows:
        raise MediaError(f"{name} has {len(given)} rows but there are {rows} prompts")
    for index, entry in enumerate(given):
        if entry is not None and not isinstance(entry, (list, tuple)):
            raise MediaError(f"row {index}: {name} is {type(entry).__name__}; each row takes a list of sources")
    return [() if entry is None else entry for entry in given]


def _pad(array: np.ndarray, length: int, value: int) -> np.ndarray:
    padded = np.full((length, *array.shape[1:]), value, array.dtype)
    padded[: len(array)] = array
    return padded


def _stack(name: str, arrays: list[np.ndarray], count: int | None, value: int, keep_empty: bool) -> np.ndarray | None:
    most = max(len(array) for array in arrays)
    count = bucket(most) if count is None else count
    for row, array in enumerate(arrays):
        if len(array) > count:
            raise MediaError(f"row {row} has {len(array)} {name}; the batch holds {count}")
    if count == 0 or (most == 0 and not keep_empty):
        return None
    return np.stack([_pad(array, count, value) for array in arrays])


def _nested(values: Any, *names: str) -> Any:
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values
