"""The one training step and the one evaluation step.

Axis letters: B rows of the whole step over all devices, A micro-batches, T positions.

Loss terms are sums over supervised tokens divided by the counts of the whole step, so that splitting a batch into
micro-batches or over devices changes nothing but the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma4_jax.losses import LossConfig, compute_losses, evaluation_sums, loss_denominators
from gemma4_jax.model.decoder import is_stacked
from gemma4_jax.preference import preference_denominators, preference_losses, preference_means
from gemma4_jax.train import optimizer as optimizers
from gemma4_jax.train.sharding import BATCH_AXES, batch_sharding, replicated
from gemma4_jax.train.state import Network, TrainState, reference_weights

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]

STOP_VOTES = "stop_votes"  # int32 (B,), in runs of several processes: who was asked to stop says so in its rows


def gradients(
    network: Network, loss: LossConfig, params, frozen, batch: Batch, *, accumulation: int = 1, mesh: Mesh | None = None
) -> tuple[dict[str, jax.Array], Metrics]:
    """Gradients of the step's loss and its parts.

    Args:
      params, frozen: flat dicts of weights; only ``params`` is differentiated.
      batch: ``tokens``, ``loss_mask``, ``segment_ids``, ``positions`` (B, T) and whatever else has rows in front.
      accumulation: A micro-batches, run one after another.
      mesh: keeps every micro-batch spread over the batch axes.

    Returns:
      gradients by name (f32 when A > 1, else in the weights' dtype); and ``loss``, ``supervised_tokens`` and the mean of
      each loss term. Without any supervised token all of them are 0.
    """
    denominators = denominators_of(batch, loss)

    # Straight-through gradients are those at the rounded weights, so rounding stays out of what is differentiated.
    params, rest = network.round(params), network.round(frozen)

    def micro(params, rows):
        return _micro_losses(network, {**params, **rest}, frozen, rows, loss, denominators)

    value_and_grad = value_and_grad_in_place(micro)
    if accumulation == 1:
        (total, sums), grads = value_and_grad(params, batch)
    else:

        def add(carry, rows):
            result = value_and_grad(params, rows)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), carry, result), None

        shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[: x.shape[0] // accumulation], batch))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
        ((total, sums), grads), _ = jax.lax.scan(add, zeros, _micro_batches(batch, accumulation, mesh))
    metrics = {"loss": total, "supervised_tokens": denominators["next_token"]}
    if loss.name == "dpo":
        return grads, metrics | preference_means(sums, denominators)
    metrics |= {f"{term}_loss": sums[term] / jnp.maximum(denominators[term], 1.0) for term in sums}
    return grads, metrics


def value_and_grad_in_place(function: Callable[..., tuple[jax.Array, Any]]) -> Callable[..., tuple[Any, Any]]:
    """``jax.value_and_grad(function, has_aux=True)`` by its first argument, a flat dict of weights.

    The gradient of a stack of layers is written layer by layer into one array; the plain form adds an array as large as the
    whole stack for every layer. ``function`` must read the stacks as they are given: JAX (0.10.2) mixes up the gradients of
    a loop's constants when some of them are written in place and others, computed from ``params``, are not.
    """

    def evaluate(params: Mapping[str, jax.Array], *args):
        total, pullback, aux = jax.vjp(lambda params: function(params, *args), params, has_aux=True)
        stacks = {name: jax.new_ref(jnp.zeros_like(leaf)) for name, leaf in params.items() if is_stacked(name)}
        (grads,) = pullback.with_refs({name: stacks.get(name, jax.ad.GradValue()) for name in params})(
            jnp.ones_like(total)
        )
        return (total, aux), {name: stacks[name][...] if name in stacks else grads[name] for name in params}

    return evaluate


def denominators_of(batch: Batch, loss: LossConfig) -> dict[str, jax.Array]:
    """What each loss term's sum over a batch is divided by; adds over micro-batches."""
    return preference_denominators(batch) if loss.name == "dpo" else loss_denominators(batch, loss)


def _micro_losses(network: Network, weights, frozen, rows: Batch, loss: LossConfig, denominators):
    """weights: all, rounded already. frozen: as stored; the reference of ``dpo`` is made from it."""
    model, drafter = network.assemble(weights)
    if loss.name == "dpo":
        reference, _ = network.merge({**frozen, **reference_weights(frozen)})
        return preference_losses(model, reference, rows, loss, denominators)
    return compute_losses(model, drafter, rows, loss, denominators)


def _micro_batches(batch: Batch, accumulation: int, mesh: Mesh | None) -> Batch:
    """(B, …) → (A, B/A, …): micro-batch a takes rows a, a+A, …, so that no row leaves its device."""

    def split(x):
        x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))

    return jax.tree.map(split, batch)


def make_train_step(
    network: Network,
    loss: LossConfig,
    optimizer: optimizers.Optimizer,
    schedule: optimizers.Schedule,
    *,
    accumulation: int,
    mesh: Mesh,
    shardings: TrainState,
    ema_decay: float = 0.0,
    skip_bad: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step ``(state, batch) -> (state, metrics)``; the state is donated.

    Metrics are f32 scalars: those of ``gradients``, ``learning_rate``, ``gradient_norm`` (before clipping),
    ``update_ratio`` (norm of the update over that of the trained weights), ``tokens`` (not padding), ``empty_steps`` (1 when
    nothing was supervised). With ``skip_bad`` a step whose loss or gradient is not finite changes nothing but the count of
    steps, and ``skipped_steps`` is 1. With ``STOP_VOTES`` in the batch, ``STOP_VOTES`` is how many rows carry a 1 there.
    """

    def train_step(state: TrainState, batch: Batch):
        batch = dict(batch)
        votes = batch.pop(STOP_VOTES, None)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # where layers keep the rows of a batch apart
            grads, metrics = gradients(
                network, loss, state.params, state.frozen, batch, accumulation=accumulation, mesh=mesh
            )
            params, opt_state, moved = optimizers.update(
                optimizer, grads, state.opt_state, state.params, metrics["loss"]
            )
        average = optimizers.average(state.average, params, ema_decay, state.step) if ema_decay else state.average
        metrics |= {
            **moved,
            "learning_rate": schedule(state.step),
            "tokens": jnp.sum(batch["segment_ids"] != 0, dtype=jnp.float32),
            "empty_steps": (metrics["supervised_tokens"] == 0).astype(jnp.float32),
        }
        changed = (params, opt_state, average)
        if skip_bad:
            good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
            before = (state.params, state.opt_state, state.average)
            changed = jax.tree.map(lambda new, old: jnp.where(good, new, old), changed, before)
            metrics["skipped_steps"] = 1.0 - good.astype(jnp.float32)
        if votes is not None:
            metrics[STOP_VOTES] = jnp.sum(votes, dtype=jnp.float32)
        params, opt_state, average = changed
        return TrainState(params, state.frozen, opt_state, state.step + jnp.int32(1), state.key, average), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def make_eval_step(
    network: Network, loss: LossConfig, *, mesh: Mesh, shardings: TrainState
) -> Callable[[dict, dict, Batch], Metrics]:
    """The compiled evaluation ``(params, frozen, batch) -> sums``; add them over batches and give them to ``eval_means``.

    Sums are f32 scalars: ``next_token`` (nats), ``count_next_token``, and with a drafter those of
    ``losses.draft_agreement`` and of each draft step's loss; for ``dpo`` those of ``preference_losses``.
    """

    def eval_step(params, frozen, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return sums_of(params, frozen, batch)

    def sums_of(params, frozen, batch):
        denominators = denominators_of(batch, loss)
        if loss.name == "dpo":
            _, sums = _micro_losses(network, network.round({**params, **frozen}), frozen, batch, loss, denominators)
        else:
            model, drafter = network.merge({**params, **frozen})
            sums = evaluation_sums(model, drafter, batch, loss)
        return sums | {f"count_{term}": count for term, count in denominators.items()}

    return jax.jit(
        eval_step,
        in_shardings=(shardings.params, shardings.frozen, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def eval_means(sums: Mapping[str, float], loss: LossConfig) -> dict[str, float]:
    """Means over the held-out rows: ``next_token_loss``, ``mtp_j_loss``, ``acceptance_j``, ``mean_accepted``, ….

    ``acceptance_j`` is how often step j's token equals the target's choice with the true tokens before it;
    ``mean_accepted`` is 1 (the target's own token) plus the sum of the products: the tokens that a round would emit if the
    steps failed independently. ``acceptance_sampled_1`` is the probability that the target gives to the first drafted token:
    how often sampling at temperature 1 keeps it when drafting by argmax.
    """
    if loss.name == "dpo":
        counts = {term: sums[f"count_{term}"] for term in ("next_token", "preference")}
        return {name: float(value) for name, value in preference_means(sums, counts).items()}
    means = {"next_token_loss": sums["next_token"] / max(sums["count_next_token"], 1.0)}
    if not loss.uses_drafter:
        return means
    kept, mean_accepted = 1.0, 1.0
    for j in range(1, loss.mtp_steps + 1):
        means[f"mtp_{j}_loss"] = sums[f"mtp_{j}"] / max(sums[f"count_mtp_{j}"], 1.0)
        means[f"acceptance_{j}"] = sums[f"agree_{j}"] / max(sums[f"count_{j}"], 1.0)
        kept *= means[f"acceptance_{j}"]
        mean_accepted += kept
    means["mean_accepted"] = mean_accepted
    means["acceptance_sampled_1"] = sums["probability_1"] / max(sums["count_1"], 1.0)
    return means
