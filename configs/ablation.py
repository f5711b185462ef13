"""Ablations of the multi-token drafter and of the architecture, at a size that two laptop cores train in minutes.

    python launch.py --config configs/ablation.py --sweep draft_steps
    python launch.py --config configs/ablation.py --sweep draft_steps --dry_run
    python launch.py --config configs/ablation.py:mini --sweep first_result
    python launch.py --config configs/ablation.py:frozen --sweep drafter_depth --config.base.checkpoint=FOLDER

Every ``sweep_NAME()`` below changes what its first line names and nothing else; any other field is set for all its members on
the command line (``--config.train.steps=2000``, ``--config.data.batch_size=16``). Hardware: 2 CPU cores, 2 GB, some minutes
a member. Expected: in the sweep's folder ``sweep.md`` with mean and spread over seeds, ``sweep.csv`` and ``plots/``.
"""

from configs import finetune
from gemma4_jax.config import unknown_name
from gemma4_jax.train.defaults import override_model, training_config
from gemma4_jax.train.sweeps import over_seeds


def base():
    """6 layers of width 192, vocabulary 2048, rows of 128 tokens, three draft steps: half a million tokens in ten minutes."""
    config = training_config("pretrain")
    config.model = "tiny"
    override_model(
        config,
        vision=None, audio=None, vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, global_head_dim=128, sliding_window=64,
        drafter={"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
    )  # fmt: skip
    config.data.update(source="python_stdlib", vocab_size=2048, seq_len=128, batch_size=4)
    config.data.update(heldout_fraction=0.02, heldout_overlap=32)
    config.loss.update(mtp_steps=3, mtp_query_stride=2)
    config.optimizer.update(learning_rate=5e-3, warmup_steps=30, final_fraction=0.02, b2=0.98)
    config.train.update(steps=1000, eval_every=100, eval_batches=8, final_eval_batches=64)
    config.samples.update(prompts=3, prompt_tokens=32, new_tokens=64, draft_tokens=8, dtypes=("float32",))
    return config


def mini():
    """3 layers of width 96, vocabulary 1024: for one core and many members."""
    config = base()
    override_model(
        config,
        vocab_size=1024, hidden_size=96, intermediate_size=256, num_hidden_layers=3, sliding_window_pattern=3,
        head_dim=32, global_head_dim=64,
        drafter={"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    )  # fmt: skip
    config.data.update(vocab_size=1024, batch_size=8)
    config.train.update(steps=400, final_eval_batches=32)
    return config


def frozen():
    """The drafter alone, on a target that a run of ``mini`` (``loss.mtp_weight=0``: without a drafter) has trained before."""
    config, like = finetune.get_config("drafter"), mini()
    config.base.checkpoint = "runs/ablation-mini"
    for section in ("data", "loss", "optimizer", "train"):
        kept = ("mtp_stop_gradient", "trainable")
        config[section].update({name: value for name, value in like[section].items() if name not in kept})
    return config


SIZES = {"base": base, "mini": mini, "frozen": frozen}


def get_config(arg="base"):
    """``arg``: one of ``SIZES``."""
    arg = arg or "base"
    if arg not in SIZES:
        raise unknown_name("argument of configs/ablation.py", arg, SIZES)
    return SIZES[arg]()


# What the drafter is trained on.


def sweep_draft_steps():
    """K: how many tokens are drafted from one row of the target; 0 has no multi-token term."""
    for steps in (0, 1, 2, 4, 8):
        yield from over_seeds({"loss.mtp_steps": steps})


def sweep_mtp_weight():
    """λ: how much the multi-token term counts beside the next token's."""
    for weight in (0.1, 0.3, 1.0, 3.0):
        yield from over_seeds({"loss.mtp_weight": weight})


def sweep_decay():
    """How fast later draft steps lose weight."""
    for decay in (0.5, 0.8, 1.0):
        yield from over_seeds({"loss.mtp_decay": decay})


def sweep_distill():
    """Hard labels, or the target's own distribution."""
    for distill in (False, True):
        yield from over_seeds({"loss.mtp_distill": distill})


def sweep_joint():
    """Whether the drafter's gradient reaches the target (a target that is frozen altogether: ``:frozen``)."""
    for stop in (False, True):
        yield from over_seeds({"loss.mtp_stop_gradient": stop})


def sweep_teacher_forcing():
    """Later draft steps read the true tokens, or the drafter's own."""
    for forcing in (True, False):
        yield from over_seeds({"loss.mtp_teacher_forcing": forcing})


def sweep_pairing():
    """Which hidden row meets the newest token: the one before it, as in sampling, or its own."""
    for pairing in ("inference", "same_row"):
        yield from over_seeds({"loss.mtp_pairing": pairing})


def sweep_drafter_depth():
    """Layers of the drafter."""
    for layers in (1, 2, 4):
        yield from over_seeds({"model_overrides.drafter.num_hidden_layers": layers})


def sweep_drafter_width():
    """Width of the drafter, its feed-forward width along with it."""
    for width in (48, 96, 192):
        fields = {"hidden_size": width, "intermediate_size": width * 8 // 3}
        yield from over_seeds({f"model_overrides.drafter.{name}": value for name, value in fields.items()})


# What the target is.


def sweep_pattern():
    """Local layers to a global one: none, 1, 2, 5."""
    for period in (1, 2, 3, 6):
        kinds = {"drafter.layer_types": ("full_attention",) * 2} if period == 1 else {}  # no local layer to read
        overrides = {"sliding_window_pattern": period, **kinds}
        yield from over_seeds({f"model_overrides.{name}": value for name, value in overrides.items()})


def sweep_window():
    """How far local layers see."""
    for window in (16, 32, 64, 128):
        yield from over_seeds({"model_overrides.sliding_window": window})


def sweep_k_eq_v():
    """Global layers with one projection for keys and values, or with two."""
    for shared in (True, False):
        yield from over_seeds({"model_overrides.attention_k_eq_v": shared})


def sweep_global_rope():
    """Share of a global head's width that is rotated."""
    for fraction in (0.125, 0.25, 0.5, 1.0):
        yield from over_seeds({"model_overrides.partial_rotary_factor": fraction})


def sweep_value_norm():
    """Values normed, as published, or not."""
    for norm in (True, False):
        yield from over_seeds({"model_overrides.value_norm": norm})


# How it is trained.


def sweep_optimizer():
    """The optimiser, each at three peak learning rates."""
    for name in ("adamw", "adafactor", "muon"):
        for rate in (2e-3, 5e-3, 1e-2):
            yield from over_seeds({"optimizer.name": name, "optimizer.learning_rate": rate})


def sweep_learning_rate():
    """Peak learning rate."""
    for rate in (1e-3, 2e-3, 5e-3, 1e-2):
        yield from over_seeds({"optimizer.learning_rate": rate})


def sweep_seeds():
    """The noise floor: nothing but the seed differs."""
    yield from over_seeds({}, seeds=range(5))


def sweep_first_result():
    """The members of docs/mtp_ablation.md: every setting once, most informative first, then more seeds where it matters."""
    twice = [{}, {"loss.mtp_steps": 0}, {"loss.mtp_distill": True}, {"loss.mtp_stop_gradient": True}]
    twice += [{"loss.mtp_teacher_forcing": False}]
    once = [{"loss.mtp_steps": steps} for steps in (1, 2, 4, 8)]
    once += [{"loss.mtp_weight": weight} for weight in (0.3, 3.0)]
    once += [{"model_overrides.drafter.num_hidden_layers": layers} for layers in (1, 4)]
    once += [{"loss.mtp_pairing": "same_row"}]
    for overrides in [*twice, *once]:
        yield from over_seeds(overrides, seeds=(0,))
    for seed in (1, 2):
        for overrides in twice:
            yield from over_seeds(overrides, seeds=(seed,))
