"""Small random models of the reference implementation, with every weight away from its initial value."""

import torch
import transformers

torch.set_num_threads(2)

WINDOW = 8
PATTERN = ("sliding_attention",) * 2 + ("full_attention",)


def _sizes():
    return {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "layer_types": list(PATTERN * 2),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }


def text_config(**changes):
    """A text configuration of tiny size: 6 layers in two groups of 2 sliding + 1 global."""
    values = {
        **_sizes(),
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": WINDOW,
        "max_position_embeddings": 256,
        "final_logit_softcapping": 30.0,
    }
    return transformers.Gemma4UnifiedTextConfig(**{**values, **changes})


def randomize(model, seed):
    """Random weights: norms and scalars within a factor of their usual size, matrices of unit gain."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("layer_scalar"):
                uniform(tensor, 0.1, 0.9)
            elif name.endswith("token_ordering"):
                tensor.copy_(torch.randperm(len(tensor), generator=generator))
            elif name.endswith((".q_norm.weight", ".k_norm.weight")):
                uniform(tensor, 0.5, 1.5)
                if "Gemma3" not in type(model).__name__:
                    tensor.mul_(1.3 * len(tensor) ** -0.25)
            elif tensor.ndim == 1 and name.endswith(("norm.weight", "ln1.weight", "ln2.weight")):
                uniform(tensor, 0.5, 1.5)
            elif name.endswith("bias"):
                uniform(tensor, -0.3, 0.3)
            elif tensor.ndim >= 2:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1.5 * tensor.shape[-1] ** -0.5)
    return model.eval()


def target(seed=0, media=True, **changes):
    """The composite model, with media parts unless told otherwise."""
    config = transformers.Gemma4UnifiedConfig(
        text_config=text_config(**changes),
        vision_config=transformers.Gemma4UnifiedVisionConfig(
            mm_embed_dim=48, output_proj_dims=48, mm_posemb_size=16, patch_size=2
        )
        if media
        else None,
        audio_config=transformers.Gemma4UnifiedAudioConfig(audio_embed_dim=20) if media else None,
        image_token_id=60,
        audio_token_id=61,
        video_token_id=62,
        attn_implementation="eager",
    )
    return randomize(transformers.Gemma4UnifiedForConditionalGeneration(config), seed)


def drafter(seed=1, ordered=False, **changes):
    """A drafter for ``target``: two layers of width 32."""
    values = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
    }
    config = transformers.Gemma4UnifiedAssistantConfig(
        text_config=text_config(**{**values, **changes}),
        backbone_hidden_size=64,
        use_ordered_embeddings=ordered,
        num_centroids=8,
        centroid_intermediate_top_k=2,
        attn_implementation="eager",
    )
    return randomize(transformers.Gemma4UnifiedAssistantForCausalLM(config), seed)


def gemma3(seed=2, **changes):
    """A Gemma 3 text model: no value norm, separate values, full RoPE, an attention scale, norms stored as w - 1."""
    values = {
        **_sizes(),
        "query_pre_attn_scalar": 9,
        "sliding_window": WINDOW,
        "max_position_embeddings": 256,
        "final_logit_softcapping": None,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        },
    }
    config = transformers.Gemma3TextConfig(**{**values, **changes}, attn_implementation="eager")
    return randomize(transformers.Gemma3ForCausalLM(config), seed)


def logits(model, tokens, **inputs):
    """f32 numpy logits of whole rows (B, T, V)."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens), use_cache=False, **inputs).logits.numpy()


def greedy(model, tokens, count, **options):
    """``count`` greedy tokens after one row of ids, never stopping."""
    row = torch.tensor([tokens])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    with torch.no_grad():
        out = model.generate(row, attention_mask=torch.ones_like(row), **options)
    return out[0, len(tokens) :].tolist()


def first_round(model, assistant, tokens, steps):
    """The reference's own first drafting round after a prompt: its newest token, and logits (steps, V)."""
    from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

    assistant.generation_config.num_assistant_tokens = steps
    settings = transformers.GenerationConfig(max_length=1000)
    generator = SinglePositionMultiTokenCandidateGenerator(assistant, model.get_input_embeddings(), settings)
    prompt = torch.tensor([tokens])
    with torch.no_grad():
        out = model(input_ids=prompt, use_cache=True, output_hidden_states=True, return_shared_kv_states=True)
        newest = out.logits[:, -1:].argmax(-1)
        row = torch.cat([prompt, newest], dim=1)
        _, drafted = generator.get_candidates(
            row, {"attention_mask": torch.ones_like(row)}, out, is_first_iteration=False, n_last_matches=0
        )
    return int(newest), drafted[0].numpy()
