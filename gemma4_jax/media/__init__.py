"""Images, sound and video as arrays, and the processor that interleaves them with text."""

from gemma4_jax.media.audio import prepare_audio
from gemma4_jax.media.images import prepare_image, target_size
from gemma4_jax.media.processor import (
    Batch,
    MediaOptions,
    Processor,
    Row,
    bucket,
    check_counts,
    stack_media,
    token_types,
)
from gemma4_jax.media.video import prepare_video
from gemma4_jax.model.vision import MediaInputs

__all__ = [
    "Batch", "MediaInputs", "MediaOptions", "Processor", "Row", "bucket", "check_counts", "prepare_audio",
    "prepare_image", "prepare_video", "stack_media", "target_size", "token_types",
]  # fmt: skip
