"""Gemma 4 12B Unified in JAX/Flax: text, images, audio and video, with multi-token prediction."""

from gemma4_jax import errors
from gemma4_jax.bundle import Bundle, add_lora, init, load, merge_lora, save
from gemma4_jax.config import LoraConfig, ModelConfig, get_preset
from gemma4_jax.sample.chat import Chat, ChatReply
from gemma4_jax.sample.sampler import Output, Sampler
from gemma4_jax.scores import draft_logits, logits

__all__ = [
    "Bundle",
    "Chat",
    "ChatReply",
    "LoraConfig",
    "ModelConfig",
    "Output",
    "Sampler",
    "add_lora",
    "draft_logits",
    "errors",
    "get_preset",
    "init",
    "load",
    "logits",
    "merge_lora",
    "save",
]
