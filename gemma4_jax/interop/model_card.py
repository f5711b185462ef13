"""The model card (``README.md``) written beside an exported model: what the configuration knows, and what people have to fill in.

Section titles and the header's fields are those that model hubs read.
"""

from __future__ import annotations

from gemma4_jax.config import FULL, ModelConfig

CARD = "README.md"
_FILL = "*To be filled in: {}.*"


def model_card(config: ModelConfig, dtype: str, *, name: str = "model", form: str = "transformers") -> str:
    """Markdown text.

    Args:
      config: of target and drafter.
      dtype: of the stored weights.
      name: of the model, its title.
      form: ``transformers``, ``drafter`` (the drafter's subfolder of that) or ``gguf``.
    """
    parts = [
        _header(config, form),
        f"# {name}",
        _summary(config, dtype, form),
        "## How to use it",
        _usage(config, form),
    ]
    questions = {
        "Training data": "what it was trained on, in which languages, and what was left out",
        "Training": "the base model and its licence, the run's `config.json`, steps and tokens, hardware and energy",
        "Evaluation": "`results.json` of `configs/evaluate.py`: bits per byte, tasks, acceptance of the drafter",
        "Intended use and limits": "what it is for, what it must not be used for, known errors and biases",
        "Licence": "that of the weights, which follows from the base model's",
    }
    for title, question in questions.items():
        parts += [f"## {title}", _FILL.format(question)]
    return "\n\n".join(parts) + "\n"


def _header(config: ModelConfig, form: str) -> str:
    multimodal = form != "drafter" and (config.vision or config.audio)
    lines = [
        f"library_name: {'gguf' if form == 'gguf' else 'transformers'}",
        f"pipeline_tag: {'any-to-any' if multimodal else 'text-generation'}",
        "tags:",
        "- gemma4",
        *(["- speculative-decoding"] if config.drafter else []),
    ]
    return "\n".join(["---", *lines, "---"])


def _summary(config: ModelConfig, dtype: str, form: str) -> str:
    target = f"{config.num_hidden_layers} layers ({config.layer_types.count(FULL)} of them global) of width {config.hidden_size}"
    if form == "drafter":
        return (
            f"The multi-token drafter of the model one folder up ({target}): {config.num_parameters(drafter=True):,} weights "
            f"in {dtype}. It reads its target's keys and values and is of no use with any other model."
        )
    inputs = ["text", *(["images, video"] if config.vision else []), *(["audio"] if config.audio else [])]
    drafter = f", and a multi-token drafter of {config.num_parameters(drafter=True):,}" if config.drafter else ""
    return "\n".join(
        [
            f"- Decoder: {target}; {config.num_parameters():,} weights in {dtype}{drafter}",
            f"- Inputs: {', '.join(inputs)}",
            f"- Context: {config.max_position_embeddings:,} positions, local window {config.sliding_window:,}",
            f"- Vocabulary: {config.vocab_size:,}",
        ]
    )


def _usage(config: ModelConfig, form: str) -> str:
    if form == "gguf":
        return "For llama.cpp and programs built on it: `llama-cli -m model-….gguf`; `mmproj-….gguf`, if there, reads media."
    if form == "drafter":
        return '```python\nimport gemma4_jax as g4\n\nbundle = g4.load("FOLDER", drafter="FOLDER/drafter")\n```'
    kind = "Gemma4UnifiedForConditionalGeneration"
    drafter = ', drafter="FOLDER/drafter"' if config.drafter else ""
    lines = [
        "```python",
        f"from transformers import {kind}",
        "",
        f'model = {kind}.from_pretrained("FOLDER")',
        "```",
        "",
        "```python",
        "import gemma4_jax as g4",
        "",
        f'bundle = g4.load("FOLDER"{drafter})',
        'print(g4.Sampler(bundle).generate(["Hello"]).texts[0])',
        "```",
    ]
    return "\n".join(lines)
