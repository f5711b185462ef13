"""Measuring a bundle: likelihood of text, acceptance of drafts, retrieval from long contexts, media tasks, other harnesses.

Nothing in training or sampling imports this package; ``experiments/evaluate.py`` and scripts do.
"""

from gemma4_jax.evaluate.acceptance import Acceptance, decoding_acceptance, teacher_forced_acceptance
from gemma4_jax.evaluate.needle import Needle, needle_scores
from gemma4_jax.evaluate.scorer import Scorer
from gemma4_jax.evaluate.text_loss import TextLoss, text_loss

__all__ = [
    "Acceptance",
    "Needle",
    "Scorer",
    "TextLoss",
    "decoding_acceptance",
    "needle_scores",
    "teacher_forced_acceptance",
    "text_loss",
]
