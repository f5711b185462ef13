"""Bundled tasks with media, without a download: handwritten digits to name, telephone tones to transcribe.

Both are sources of conversations whose answers are exact, so what a model has learnt can be counted.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from typing import Any

import numpy as np
from PIL import Image

from gemma4_jax.errors import DataError

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROW_TONES = (697.0, 770.0, 852.0, 941.0)  # Hz, ITU-T Q.23
COLUMN_TONES = (1209.0, 1336.0, 1477.0)
KEYS = ("123", "456", "789", "*0#")
TONES = {
    key: (low, high)
    for low, row in zip(ROW_TONES, KEYS, strict=True)
    for high, key in zip(COLUMN_TONES, row, strict=True)
    if key.isdigit()
}
SAMPLE_RATE = 16_000
TONE_SECONDS, PAUSE_SECONDS = 0.08, 0.04
HELDOUT_EVERY = 6  # digits: every sixth image is held out
VARIANTS = 6  # of each digit that is trained on
DTMF_EXAMPLES = {"train": 8_000, "heldout": 300}


def question(kind: str, source: Any, text: str, answer: str) -> dict[str, Any]:
    """A document: the user gives a medium and asks, the model answers."""
    content = [{"type": kind, kind: source}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}, {"role": "model", "content": answer}]}


class Digits:
    """The 1 797 handwritten digits of scikit-learn, 8x8 pixels in 17 greys, each with its name.

    The training split has each of its digits in ``VARIANTS`` forms, the first as it is, the others a little distorted:
    so few pictures are learnt by heart otherwise.
    """

    name = "digits"
    text = "Which digit?"

    def __init__(self, split: str):
        """Args: ``split``: "train" or "heldout". Raises DataError when scikit-learn is not installed."""
        if importlib.util.find_spec("sklearn") is None:
            raise DataError("data source 'digits' needs scikit-learn; install the extra: gemma4_jax[tasks]")
        data = importlib.import_module("sklearn.datasets").load_digits()
        heldout = np.arange(len(data.target)) % HELDOUT_EVERY == 0
        chosen = heldout if split == "heldout" else ~heldout
        self._split = split
        self._images = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)
        self._labels = data.target[chosen]

    def __len__(self) -> int:
        return len(self._labels) * (VARIANTS if self._split == "train" else 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        variant, index = divmod(index, len(self._labels))
        image = self._images[index]
        if variant:
            image = distort(image, np.random.default_rng([index, variant]))
        return question("image", image, self.text, DIGIT_NAMES[self._labels[index]])

    def place(self, index: int) -> str:
        """Name, split and number."""
        return f"{self.name} {self._split} {index}"

    def fingerprint(self) -> str:
        """Hash of images, labels and the number of examples."""
        return hashlib.sha256(repr(len(self)).encode() + self._images.tobytes() + self._labels.tobytes()).hexdigest()


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey pixels (H, W) uint8 turned by up to 10 degrees, moved by up to half a pixel, scaled by up to 10 %."""
    height, width = image.shape
    angle, scale = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(0.9, 1.1)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array([width, height]) / 2
    offset = centre - turn @ centre + rng.uniform(-0.5, 0.5, 2)
    matrix = np.column_stack([turn, offset]).ravel()
    moved = Image.fromarray(image).transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.asarray(moved)


class Dtmf:
    """Strings of telephone tones, made from the number of the example; see ``dial`` for what differs."""

    name = "dtmf"
    text = "Which keys?"

    def __init__(self, split: str, digits: tuple[int, int] = (4, 10)):
        """Args: ``split``: "train" or "heldout"; ``digits``: least and most in a string."""
        self._split, self._digits = split, digits

    def __len__(self) -> int:
        return DTMF_EXAMPLES[self._split]

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Held-out strings come from another stream of numbers than the training ones.
        rng = np.random.default_rng([index, int(self._split == "heldout")])
        keys = "".join(rng.choice(list(TONES), rng.integers(self._digits[0], self._digits[1] + 1)))
        return question("audio", (dial(keys, rng), SAMPLE_RATE), self.text, keys)

    def place(self, index: int) -> str:
        """Name, split and number."""
        return f"{self.name} {self._split} {index}"

    def fingerprint(self) -> str:
        """Hash of the split and of the first examples."""
        first = [self[index]["messages"][0]["content"][0]["audio"][0].tobytes() for index in range(3)]
        return hashlib.sha256(repr((self._split, self._digits, len(self))).encode() + b"".join(first)).hexdigest()


def dial(keys: str, rng: np.random.Generator) -> np.ndarray:
    """The sound of keys dialled by a machine: each tone lasts 80 ms, each pause 40 ms.

    The first tone begins within 40 ms, every tone has its own two phases and tilt between its two frequencies; the string
    has one level (0 to 18 dB below full scale) and white noise 20 to 40 dB below the tones.

    Args:
      keys: digits.
      rng: decides everything else.

    Returns:
      f32 (n,) at 16 kHz.
    """
    time = np.arange(int(TONE_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    pause = np.zeros(int(PAUSE_SECONDS * SAMPLE_RATE))
    parts = [pause[: rng.integers(len(pause))]]
    for key in keys:
        tilt = rng.uniform(0.7, 1.0, 2)
        waves = [a * np.sin(2 * np.pi * (f * time + rng.random())) for a, f in zip(tilt, TONES[key], strict=True)]
        parts += [0.5 * sum(waves), pause]
    sound = np.concatenate(parts)
    noise = rng.standard_normal(len(sound)) * 0.5 * 10 ** (-rng.uniform(20, 40) / 20)
    level = 10 ** (-rng.uniform(0, 18) / 20)
    return np.clip(level * (sound + noise), -1, 1).astype(np.float32)
