"""Data: sources of documents, their tokens, packing into rows, and the Grain pipeline that makes batches of them."""

from gemma4_jax.data.media_rows import make_processor
from gemma4_jax.data.options import DataOptions, data_defaults
from gemma4_jax.data.pipeline import (
    BatchDataset,
    BatchIterator,
    compressed_bits_per_byte,
    get_tokenizer,
    heldout_conversations,
    heldout_text,
    learnt_bytes,
    make_dataset,
)

__all__ = [
    "BatchDataset",
    "BatchIterator",
    "DataOptions",
    "compressed_bits_per_byte",
    "data_defaults",
    "get_tokenizer",
    "heldout_conversations",
    "heldout_text",
    "learnt_bytes",
    "make_dataset",
    "make_processor",
]
