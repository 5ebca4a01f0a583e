"""Rotary positions as config.json describes them, in its spelling of any year."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from flax_mha.core import checks
from flax_mha.interop.huggingface.family import Index, Reader
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.positions import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rotary,
    Scaling,
    YarnScaling,
)

Kind = Callable[[Fields, Index], str]


def rotary(interleaved: bool = False) -> Reader:
    """All layers turn alike: `rope_theta` and `rope_scaling`, or `rope_parameters`."""

    def read(fields: Fields, at: Index) -> dict[str, Any]:
        return {"position": position(fields, parameters(fields), interleaved)}

    return read


def rotary_by_kind(
    kind: Kind,
    thetas: Mapping[str, str],
    scaled: tuple[str, ...] = ("full_attention",),
    interleaved: bool = False,
) -> Reader:
    """Layers turn by their kind: `rope_parameters` holds an object for each.

    Older files have the field of `thetas` for each kind, and a `rope_scaling` of those `scaled`.
    """

    def read(fields: Fields, at: Index) -> dict[str, Any]:
        this = kind(fields, at)
        values = {name: fields.optional_number(theta) for name, theta in thetas.items()}
        nested = fields.inner("rope_parameters")
        scaling = fields.inner("rope_scaling")
        inner = nested.inner(this)
        if this in scaled and scaling.values:
            inner = scaling
        inner.defaults = {"rope_theta": values.get(this)}
        _known_kinds(nested)
        return {"position": position(fields, inner, interleaved)}

    return read


def _known_kinds(nested: Fields) -> None:
    for name in nested.values:
        if not name.endswith("_attention"):
            nested.refuse(name, "rotary positions stand in an object for each kind of layer")


def parameters(fields: Fields) -> Fields:
    """The object of the rotary positions, with the fields beside it as its defaults."""
    new, old = fields.inner("rope_parameters"), fields.inner("rope_scaling")
    inner = old if old.values else new
    names = ("rope_theta", "partial_rotary_factor")
    inner.defaults = {name: fields.optional_number(name) for name in names}
    return inner


def position(
    fields: Fields, rope: Fields, interleaved: bool = False, size: int | None = None
) -> Rotary:
    """The `Rotary` of one object of rotary positions, for heads of `size`, or `head_dim`."""
    H = head_dim(fields) if size is None else size
    dim = H
    if rope.has("partial_rotary_factor"):
        dim = int(H * rope.number("partial_rotary_factor"))
    base = rope.number("rope_theta")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope.seen |= {"rope_type", "type"}
    if not isinstance(kind, str) or kind not in _TYPES:
        rope.refuse("rope_type", f"known are {sorted(_TYPES)}", kind)
    if dim != H and kind != "proportional" and "partial_rotary_factor" not in fields.defaults:
        rope.refuse("partial_rotary_factor", "a model of this type turns whole heads")
    base, scaling = _TYPES[kind](fields, rope, base, dim)
    for name in rope.unread():
        rope.refuse(name, f"rotary positions of type {kind!r} are not known to read it")
    part = None if dim == H or kind == "proportional" else dim
    return Rotary(base, part, interleaved, scaling)


def head_dim(fields: Fields) -> int:
    """H: its own field, or the features that each head has."""
    own = fields.optional_size("head_dim")
    if own is not None:
        return own
    D, N = fields.size("hidden_size"), fields.size("num_attention_heads")
    if D % N:
        rule = "config.json's `hidden_size` must be a multiple of `num_attention_heads`."
        checks.fail(ValueError, rule, f"{D} and {N}")
    return D // N


# --- types ---------------------------------------------------------------------------------------

Changed = tuple[float, Scaling | None]


def _default(fields: Fields, rope: Fields, base: float, dim: int) -> Changed:
    rope.seen |= {"factor", "original_max_position_embeddings"}  # said, and not read
    return base, None


def _linear(fields: Fields, rope: Fields, base: float, dim: int) -> Changed:
    return base, LinearScaling(rope.number("factor"))


def _dynamic(fields: Fields, rope: Fields, base: float, dim: int) -> Changed:
    """The base grows with the text, once it is longer than those of training."""
    rope.seen |= {"original_max_position_embeddings"}  # said, and not read
    factor, trained = rope.number("factor"), fields.size("max_position_embeddings")
    return base, DynamicScaling(factor, trained, _max_length(fields, "dynamic"))


def _llama3(fields: Fields, rope: Fields, base: float, dim: int) -> Changed:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (rope.number(name) for name in names)
    return base, Llama3Scaling(factor, low, high, _original(fields, rope))


def _yarn(fields: Fields, rope: Fields, base: float, dim: int) -> Changed:
    original = _original(fields, rope)
    factor = rope.optional_number("factor")
    if factor is None:
        factor = fields.size("max_position_embeddings") / original
    attention = rope.optional_number("attention_factor")
    by, all_dim = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    if attention is None and by and all_dim:
        attention = mscale(factor, by) / mscale(factor, all_dim)
    rope.defaults = {**rope.defaults, "truncate": True}
    scaling = YarnScaling(
        factor,
        original,
        rope.optional_number("beta_fast") or 32.0,
        rope.optional_number("beta_slow") or 1.0,
        attention,
        rope.flag("truncate"),
    )
    return base, scaling


def _longrope(fields: Fields, rope: Fields, base: float, dim: int) -> Changed:
    """One list of factors for texts as long as those of training, one for longer ones."""
    original, length = _original(fields, rope), _max_length(fields, "longrope")
    lists = {name: _factors(rope, name) for name in ("short_factor", "long_factor")}
    factor = rope.optional_number("factor")
    if factor is None:
        factor = fields.size("max_position_embeddings") / original
    attention = rope.optional_number("attention_factor")
    factors = lists["long_factor" if length > original else "short_factor"]
    return base, LongRopeScaling(factors, factor, original, attention)


def _factors(rope: Fields, name: str) -> tuple[float, ...]:
    values = rope.entries(name)
    if not values or not all(isinstance(x, int | float) for x in values):
        rope.fail(name, "a list of numbers", values)
    return tuple(float(x) for x in values)


def _proportional(fields: Fields, rope: Fields, base: float, dim: int) -> Changed:
    """The whole head turns in pairs, but the slower ones stand still."""
    factor, share = rope.optional_number("factor"), rope.optional_number("partial_rotary_factor")
    return base, ProportionalScaling(1.0 if share is None else share, factor or 1.0)


def mscale(factor: float, by: float) -> float:
    """By how much YaRN lets the logits of a text `factor` times as long grow."""
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original(fields: Fields, rope: Fields) -> int:
    """The longest text in training: a field of the model's own goes before that of the object."""
    beside = fields.optional_size("original_max_position_embeddings")
    within = rope.optional_size("original_max_position_embeddings")
    return beside or within or fields.size("max_position_embeddings")


def _max_length(fields: Fields, kind: str) -> int:
    if fields.max_length is None:
        rule = f"Rotary positions of type {kind!r} depend on the longest text that will be given."
        checks.fail(ValueError, rule, "max_length=None", "Pass `max_length=`, its tokens.")
    return fields.max_length


_TYPES: dict[str, Callable[[Fields, Fields, float, int], Changed]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # as the first Phi-3 called it
    "proportional": _proportional,
}
