"""Inside the kernels, what functions of pairs say of one part of a tile, entry by entry."""

import jax.numpy as jnp

from flax_mha.attention.pallas_tpu.lanes import as_column, wide
from flax_mha.attention.pallas_tpu.operands import kind_of
from flax_mha.attention.pallas_tpu.pair_steps import stepwise
from flax_mha.attention.pallas_tpu.pairs import Pairs, as_mask, as_score, restored, with_slope
from flax_mha.attention.pallas_tpu.part import Here
from flax_mha.core.typing import Array, DType


def agrees(here: Here, pairs: Pairs) -> Array:
    """Booleans: the part's pairs that a mask function lets attend."""
    (x,) = stepwise(as_mask(pairs), *_values(here, pairs))
    return _shaped(here, x)


def score_of(here: Here, logits: Array) -> Array:
    """The part's logits through the score function."""
    pairs = _score(here)
    (x,) = stepwise(as_score(pairs), logits, *_values(here, pairs))
    return _shaped(here, x)


def score_and_slope(here: Here, logits: Array, of: str | None = None) -> list[Array]:
    """The same with its slope; `of` an operand of the kernel, or of the logits before."""
    pairs = _score(here)
    place = 0 if of is None else 1 + pairs.inputs.index(of)
    return stepwise(with_slope(as_score(pairs), place), logits, *_values(here, pairs))


def through(d: Array, slope: Array) -> Array:
    """A gradient times a slope, which may be infinite where nothing is attended."""
    return jnp.where(d == 0, 0.0, d * slope)


def _score(here: Here) -> Pairs:
    assert here.plan.score is not None
    return here.plan.score


def _shaped(here: Here, x: Array) -> Array:
    return jnp.broadcast_to(x, (here.part.rows, here.part.columns))


def _values(here: Here, pairs: Pairs) -> list[Array]:
    """Each input at every entry of the part: so all operations are of whole registers."""
    return [_value(here, name, dtype) for name, dtype in zip(pairs.inputs, pairs.types)]


def _value(here: Here, name: str, dtype: DType) -> Array:
    ref, kind = here.refs[name], kind_of(name)
    if kind == "row":
        x = wide(as_column(ref[:, here.rows]), here.part.columns)
    elif kind == "column":
        x = _shaped(here, ref[:, here.columns])
    else:
        heads = here.plan.shape(name)[1]
        n = here.at.k * here.plan.G + here.at.g if heads > 1 else 0
        x = jnp.full((here.part.rows, here.part.columns), here.scalar(name, n))
    return restored(x, dtype)
