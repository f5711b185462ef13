"""Turn one form of a checkpoint into another.

    python launch.py --config configs/convert.py:from_hf --config.convert.source=FOLDER --config.convert.drafter=FOLDER
    python launch.py --config configs/convert.py:to_hf --config.convert.source=runs/quickstart
    python launch.py --config configs/convert.py:to_gguf --config.convert.source=runs/quickstart
    --config.convert.dtype=q8_0
    python launch.py --config configs/convert.py:quantize --config.convert.source=FOLDER
    --config.convert.quantization=int8

The source is a run's folder, one of our checkpoints or a Hugging Face folder. Hardware: memory for the weights in the
dtype they are loaded in; with ``quantization``, which packs a Hugging Face folder as it is read, for the packed ones.
Expected: the result in ``workdir/output`` (or ``--config.convert.output``), and ``results.json`` with tensors, bytes before
and after, time; ``checksums.json`` has the SHA-256 of every file.
"""

from ml_collections import ConfigDict

from gemma4_jax.config import unknown_name

FORMATS = {"from_hf": "checkpoint", "to_hf": "huggingface", "to_gguf": "gguf", "quantize": "checkpoint"}


def get_config(arg="to_hf"):
    """``arg``: one of ``FORMATS``."""
    arg = arg or "to_hf"
    if arg not in FORMATS:
        raise unknown_name("argument of configs/convert.py", arg, FORMATS)
    return ConfigDict(
        {
            "experiment": "convert",
            "convert": {
                "source": "runs/quickstart",
                "drafter": "",
                "output": "",
                "format": FORMATS[arg],
                "load_dtype": "",  # empty: as stored
                "quantization": "int4" if arg == "quantize" else "",  # int8, int4; empty: as stored
                "dtype": "",  # empty: as loaded
                "workers": 2,
            },
        }
    ).lock()
