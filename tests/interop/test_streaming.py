"""Memory while importing: the result, and little else (fault 26)."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np

from gemma4_jax.config import ModelConfig
from gemma4_jax.interop import hf_config, names
from gemma4_jax.interop.safetensors_io import write_file
from gemma4_jax.train.state import Network

CONFIG = ModelConfig(
    vocab_size=32_768, hidden_size=1024, intermediate_size=8192, num_hidden_layers=12, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, global_head_dim=128, param_dtype="bfloat16", dtype="bfloat16",
)  # fmt: skip
LOAD = """
import json, sys
import gemma4_jax as g4

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

before = resident("VmRSS")
bundle = g4.load(sys.argv[1])
print(json.dumps({"growth": resident("VmHWM") - before, "dtype": str(bundle.model.embedder.table[...].dtype)}))
"""


def test_peak_memory_of_an_import(tmp_path):
    rows = names.target_rows(CONFIG, names.LAYOUTS["gemma4_unified"])
    shapes, kind = Network(CONFIG).shapes, np.dtype(ml_dtypes.bfloat16)
    tensors = {row.published: (kind, tuple(shapes[row.ours].shape[len(row.index) :])) for row in rows}
    size = write_file(tmp_path / "model.safetensors", tensors, lambda name: np.full(tensors[name][1], 0.01, kind))
    (tmp_path / "config.json").write_text(json.dumps(hf_config.published_config(CONFIG)))
    run = subprocess.run([sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["dtype"] == "bfloat16"
    assert size > 700e6
    assert found["growth"] <= 1.2 * size
