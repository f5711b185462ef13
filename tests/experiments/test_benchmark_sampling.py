"""The benchmark of speculation in this process at a small size, and what the results say of measurements."""

import pytest
from small_models import small_config

from experiments.benchmarks import sampling

OPTIONS = {
    **dict(model="bench", dtypes=("float32",), peers=("llama_cpp",), packed_dtypes=(), new_tokens=40, prompt_tokens=64),
    **dict(draft_tokens=3, acceptance=1.0, mode="speculative", side="ours", dtype="float32"),
}


def test_speculation_at_a_scripted_acceptance(monkeypatch):
    """Drafts that are always right: four tokens a round, the real drafter beside them."""
    config = small_config()
    monkeypatch.setattr(sampling, "model_config", lambda options, dtype="float32": config)
    numbers = sampling._prepare(OPTIONS)()
    assert numbers["accepted_share"] == 1.0
    assert numbers["tokens_per_round"] == pytest.approx(39 / 10)
    assert all(numbers[f"{name}_seconds"] > 0 for name in ("round", "verification", "draft", "plain_round"))
    assert numbers["speedup"] == pytest.approx(
        numbers["speculative_tokens_per_second"] / numbers["plain_tokens_per_second"]
    )


def test_ratios_and_shares():
    taken = {
        "machine_float32": {"bytes_per_second": 2e10, "operations_per_second": 1e11},
        "ours_float32": {"decode_tokens_per_second": 30.0},
        "llama_cpp_float32": {"decode_tokens_per_second": 20.0},
    }
    results = sampling._results({**OPTIONS, "mode": "decode"}, taken)
    assert results["decode_ratio_to_llama_cpp_float32"] == 1.5
    assert results["share_of_bandwidth_float32"] == pytest.approx(results["parameters"] * 4 * 30 / 2e10)
    assert results["machine_operations_per_second"] == 1e11
