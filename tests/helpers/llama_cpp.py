"""Asks llama.cpp, in a process of its own, for greedy continuations of GGUF files."""

import json
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).with_name("gguf_client.py")


def ask(folder, prompts, **job):
    """What llama.cpp answers: one dict a prompt."""
    job = {"model": str(folder / "model-f32.gguf"), "prompts": prompts, **job}
    run = subprocess.run([sys.executable, CLIENT, json.dumps(job)], capture_output=True, text=True, timeout=120)
    lines = [line for line in run.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, run.stderr[-2000:]
    return json.loads(lines[0].removeprefix("ANSWERS "))
