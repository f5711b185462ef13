"""Speed beside installed peers, in turns within one run.

    python launch.py --config configs/benchmark.py:train   (or decode, prefill, speculative, load, device)

Needs the ``[test]`` extra for transformers and torch. Hardware: 2 CPU cores, 8 GB, a few minutes. Expected: ``results.json`` and
``table.md`` with tokens per second, peak memory and the ratio of both sides.
"""

from ml_collections import ConfigDict

from gemma4_jax.config import unknown_name


def _config(mode, **options):
    return ConfigDict(
        {"experiment": "benchmark", "benchmark": {"mode": mode, "threads": 2}, "options": options},
    ).lock()


def train():
    """Full training steps with AdamW at 140 M parameters, in f32 unless ``--config.options.dtype=bfloat16``;
    ``--config.options.lora_rank=8``: adapters, beside peft."""
    return _config(
        "train",
        model="bench",
        dtype="float32",
        batch_size=4,
        seq_len=256,
        rounds=5,
        remat="dots",
        scan_layers=False,
        token_chunk=1024,
        lora_rank=0,
    )


def _sampling(mode, **options):
    common = {"model": "bench", "dtypes": ("float32", "bfloat16"), "peers": ("transformers", "llama_cpp")}
    common["packed_dtypes"] = ("q8_0", "q4_0")
    sizes = {"rounds": 5, "new_tokens": 32, "prompt_tokens": 512, "rows": 8, "draft_tokens": 3, "acceptance": 0.7}
    return _config(mode, **{**common, **sizes, **options})


def decode():
    """New tokens a second: one row and eight, early and late in a text, at 140 M parameters in f32 and bf16."""
    return _sampling("decode")


def prefill():
    """Prompt tokens a second at 512 tokens."""
    return _sampling("prefill")


def speculative():
    """Speculative against plain decoding, drafts accepted at a scripted rate, the real drafter's cost included."""
    return _sampling("speculative", new_tokens=96)


def load():
    """Memory of the 12B with drafter and media, by weight format: at which length it fits which card. Nothing runs, unless
    ``--config.options.quality_source=runs/quickstart --config.options.quality_text=FILE`` asks what the formats cost."""
    return _config(
        "load",
        model="gemma4_12b",
        schemes=("none", "int8", "int4"),
        dtype="bfloat16",
        cache_dtype="bfloat16",
        lengths=(8192, 32_768, 131_072, 262_144),
        draft_tokens=4,
        chunk=512,
        cards_gb=(8, 12, 16, 24),
        reserve_gb=0.5,
        quality_source="",
        quality_text="",
        quality_tokens=8192,
    )


def device():
    """Sampling on the first device alone, by weight format: made-up weights of the 12B, shares of what the device can do.
    ``XLA_PYTHON_CLIENT_MEM_FRACTION=0.18`` holds a card of 80 GB to 15: ``--config.options.dtypes="('int8', 'int4')"`` fits, and
    ``--config.options.rows=2``: eight rows have 3 GB of caches."""
    return _config(
        "device",
        model="gemma4_12b",
        dtypes=("bfloat16", "int8", "int4"),
        modes=("decode", "prefill", "speculative"),
        rounds=3,
        new_tokens=96,
        prompt_tokens=4096,
        rows=8,
        chunk=2048,
        draft_tokens=4,
        acceptance=0.7,
    )


MODES = {
    "train": train,
    "decode": decode,
    "prefill": prefill,
    "speculative": speculative,
    "load": load,
    "device": device,
}


def get_config(arg="train"):
    """``arg``: one of ``MODES``."""
    arg = arg or "train"
    if arg not in MODES:
        raise unknown_name("argument of configs/benchmark.py", arg, MODES)
    return MODES[arg]()
