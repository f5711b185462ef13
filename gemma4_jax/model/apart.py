"""Parts of a program that XLA:CPU runs as programs of their own.

XLA:CPU orders operations by how many can run at once, and drops optimisation barriers before that. In a network without loops
it then recomputes every layer at the start of the backward pass, or leaves weight gradients to its end, and holds what
these read until then. A called program that is not inlined is one operation to it: what it computes between is freed when it
returns, before the next layer begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

_F32_BITS = {"exponent_bits": 8, "mantissa_bits": 23}


def runs_apart() -> bool:
    """Whether programs of their own pay: on CPU, in no mesh of several devices (``jax.sharding.use_abstract_mesh``)."""
    return jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


def apart(function: Callable) -> Callable:
    """The same function, whose forward and backward pass XLA neither inlines nor mixes with what surrounds them.

    Only what is differentiated has a gradient made: frozen weights cost none.
    """

    def call(*args):
        leaves, tree = jax.tree.flatten(args)
        return _on_leaves(lambda *leaves: function(*jax.tree.unflatten(tree, leaves)))(*leaves)

    return call


def _on_leaves(function: Callable) -> Callable:
    run = jax.custom_vjp(function)

    def forward(*primals):
        values = [primal.value for primal in primals]
        moving = [i for i, primal in enumerate(primals) if primal.perturbed]
        layout: dict[str, Any] = {}

        def program(values):
            def of_moving(*some):
                changed = dict(zip(moving, some, strict=True))
                return function(*(changed.get(i, value) for i, value in enumerate(values)))

            out, pullback = jax.vjp(of_moving, *(values[i] for i in moving))
            kept, layout["tree"] = jax.tree.flatten(pullback)
            # What was given is not given back: an output of the program would be a copy.
            layout["given"] = [next((i for i, v in enumerate(values) if v is leaf), None) for leaf in kept]
            return out, [leaf for leaf, place in zip(kept, layout["given"], strict=True) if place is None]

        out, made = own_program(_without_rounding_to_f32(program), values)
        return out, jax.tree_util.Partial(lambda *residuals: _pull_back(moving, layout, *residuals), values, made)

    def backward(pull_back, g):
        return pull_back(g)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _pull_back(moving: list[int], layout: dict[str, Any], values, made, g) -> tuple[jax.Array | None, ...]:
    """Cotangents of all values, None for those that do not move. g: cotangents of the output, or SymbolicZero."""
    cotangents, tree = jax.tree.flatten(g, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    live = {i: leaf for i, leaf in enumerate(cotangents) if not isinstance(leaf, SymbolicZero)}

    def program(values, made, live):
        rest = iter(made)
        kept = [next(rest) if place is None else values[place] for place in layout["given"]]
        full = [live[i] if i in live else jnp.zeros(leaf.shape, leaf.dtype) for i, leaf in enumerate(cotangents)]
        return jax.tree.unflatten(layout["tree"], kept)(jax.tree.unflatten(tree, full))

    given = {place: values[place] for place in layout["given"] if place is not None}
    found = dict(zip(moving, own_program(program, given, made, live), strict=True))
    return tuple(found.get(i) for i in range(len(values)))


def _without_rounding_to_f32(function: Callable) -> Callable:
    """``function`` of one list of arrays, less what rounds f32 to f32.

    ``jax.checkpoint`` rounds all that it keeps to its own precision, against compilers that hold more. In f32 that changes
    nothing, and XLA:CPU copies each kept product for it.
    """

    def run(values):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(values)
        same: dict[Any, Any] = {}

        def unrounded(atoms):
            return [atom if isinstance(atom, core.Literal) else same.get(atom, atom) for atom in atoms]

        kept = []
        for eqn in closed.jaxpr.eqns:
            inputs = unrounded(eqn.invars)
            if (
                eqn.primitive.name == "reduce_precision"
                and eqn.params == _F32_BITS
                and inputs[0].aval.dtype == jnp.float32
            ):
                same[eqn.outvars[0]] = inputs[0]
            else:
                kept.append(eqn.replace(invars=inputs))
        plain = closed.jaxpr.replace(eqns=kept, outvars=unrounded(closed.jaxpr.outvars))
        outputs = core.jaxpr_as_fun(core.ClosedJaxpr(plain, closed.consts))(*jax.tree.leaves(values))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return run


def apart_if_traced(function: Callable, *args):
    """``function(*args)``, by ``own_program`` where that pays and a program is being traced: called eagerly it would be compiled
    anew each time."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args))
    return own_program(function, *args) if traced and runs_apart() else function(*args)


def own_program(function: Callable, *args):
    """``function(*args)``, compiled as a program that is called, not inlined."""
    return set_xla_metadata(jax.jit(function)(*args), inlineable="false")
