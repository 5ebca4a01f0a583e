"""Why a function of pairs cannot be in the kernels, told before anything is lowered."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.pallas_tpu.pair_steps import unserved
from flax_mha.attention.pallas_tpu.pairs import Pairs, as_mask, as_score, with_slope
from flax_mha.core.pairs.separated import Separated

SHAPE = (8, 128)  # of any part of a tile: a register


def pair_refusal(where: Any, score: Separated | None) -> str | None:
    """Of the functions of a call, the first reason."""
    named = [("the mask", one.pairs) for one in where]
    named += [] if score is None else [("the score", score)]
    for kind, pairs in named:
        why = _lookups(pairs) or _steps(pairs, kind == "the score")
        if why is not None:
            return f"{kind} {why}"
    return None


def _lookups(pairs: Separated) -> str | None:
    if not pairs.looks_up:
        return None
    shape = pairs.expression.shape
    steps = [x for x in pairs.expression.steps if any(map(shape, (*x.variables, *x.outputs)))]
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(x.primitive.name for x in steps))
    what = "looks up an array, or makes a vector, by query and key at once"
    return f"{what}, which the kernel cannot: {names}"


def _steps(separated: Separated, is_score: bool) -> str | None:
    count = len(separated.operands) + len(separated.tables)
    names = tuple(map(str, range(count)))  # the operands have none yet
    pairs = Pairs(separated.expression, names)
    types = [jax.ShapeDtypeStruct(SHAPE, jnp.dtype(t)) for t in pairs.types]
    if not is_score:
        return _told(unserved(as_mask(pairs), *types))
    logits = jax.ShapeDtypeStruct(SHAPE, jnp.dtype("float32"))
    moving = [i for i, x in enumerate([logits, *types]) if jnp.issubdtype(x.dtype, jnp.floating)]
    whole = lambda *values: [with_slope(as_score(pairs), i)(*values) for i in moving]  # noqa: E731
    # Itself first: of some steps JAX has no derivative.
    return _told(unserved(as_score(pairs), logits, *types) or unserved(whole, logits, *types))


def _told(step: str | None) -> str | None:
    return None if step is None else f"takes a step that the kernel does not have: {step}"
