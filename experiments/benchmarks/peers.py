"""Other libraries' models at the shapes of ours. Imports them only when called: they come with the ``[test]`` extra."""

from __future__ import annotations

from gemma4_jax.config import ModelConfig


def transformers_model(c: ModelConfig):
    """transformers' own causal language model of a text-only configuration, with random weights."""
    from transformers import Gemma4UnifiedTextConfig
    from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedForCausalLM

    return Gemma4UnifiedForCausalLM(
        Gemma4UnifiedTextConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, global_head_dim=c.global_head_dim,
            num_global_key_value_heads=c.num_global_key_value_heads, sliding_window=c.sliding_window,
            attention_k_eq_v=c.attention_k_eq_v, final_logit_softcapping=c.final_logit_softcapping, pad_token_id=0,
        )
    )  # fmt: skip
