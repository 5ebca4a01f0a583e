"""What a call of the layer is given, checked as far as types tell: before tracing hides values."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from flax_mha.attention.dropout import start_of
from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.masks import Mask
from flax_mha.positions import PositionFunction

Arrays: TypeAlias = tuple[Any, Any, Any]  # query, value, key


class Restrictions(NamedTuple):
    """What says who may attend to whom, and who stands where, as the caller gave it."""

    query_mask: Any = None
    value_mask: Any = None
    key_mask: Any = None
    attention_mask: Any = None
    bias: Any = None
    segment_ids: Any = None
    positions: Any = None
    dropout_start: Any = None  # restricts nothing: it stands where the caller's other data stand


def check_arrays(arrays: Any) -> None:
    """query, value and key, or the query alone, are floating."""
    letters = ("[..., T, D]", "[..., S, M]", "[..., S, C]")
    if len(arrays) > 1 and arrays[1] is None:
        rule = "`value` must be a floating-point array [..., S, M]."
        remedy = "Self-attention is `value=query`; None stands for a `CrossCache` as `cache=`."
        checks.fail(TypeError, rule, "value=None", remedy)
    for name, array, axes in zip(("query", "value", "key"), arrays, letters):
        checks.floating_array(name, array, axes)


def check_source(config: Any, arrays: Arrays) -> None:
    """A latent layer makes keys and values of one array, which two arguments cannot be."""
    if getattr(config, "latent", None) is not None and arrays[2] is not arrays[1]:
        rule = "A latent layer makes keys and values of one array."
        checks.fail(ValueError, rule, "a `key` beside `value`", "Pass `value` alone.")


def checked_restrictions(
    config: MultiHeadAttentionConfig, restrictions: Restrictions
) -> Restrictions:
    """Checks the types of what every call takes; the masks come back as booleans."""
    if not isinstance(config, MultiHeadAttentionConfig):
        rule = "`config` must be a MultiHeadAttentionConfig."
        checks.fail(TypeError, rule, f"config of type {type(config).__name__}")
    checks.x64_enabled("dtype", config.dtype)
    return _checked(config, restrictions)


def _checked(config: MultiHeadAttentionConfig, restrictions: Restrictions) -> Restrictions:
    masks = {
        name: _mask_of(name, mask)
        for name, mask in restrictions._asdict().items()
        if name.endswith("mask") and mask is not None
    }
    if restrictions.bias is not None:
        checks.floating_array("bias", restrictions.bias, "that broadcasts to [B, N, T, S]")
    floats = isinstance(config.position, PositionFunction) and config.position.takes_floats
    read = functools.partial(checks.token_positions, floats=floats)
    ids = {
        "segment_ids": _ids("segment_ids", restrictions.segment_ids, checks.integer_ids),
        "positions": _ids("positions", restrictions.positions, read),
    }
    dropout_start = start_of(restrictions.dropout_start)
    return restrictions._replace(**masks, **ids, dropout_start=dropout_start)


def _mask_of(name: str, value: Any) -> Any:
    """Booleans; of pairs of query and key a `Mask` too, as it is."""
    if isinstance(value, Mask):
        if name != "attention_mask":
            rule = f"`{name}` must be an array; a Mask of queries and keys is `attention_mask=`."
            checks.fail(TypeError, rule, f"{name} of type Mask")
        return value
    if callable(value) and not checks.is_array(value):
        rule = f"`{name}` must be a Mask or booleans; a function becomes one: `Mask.function(f)`."
        if name != "attention_mask":
            rule = f"`{name}` must be an array of booleans."
        checks.fail(TypeError, rule, f"{name} of type {type(value).__name__}")
    return checks.boolean_mask(name, value)


def _ids(name: str, value: Any, check: Callable[[str, Any], Any]) -> Any:
    """One array or a pair, looked at before `jit` keeps 32 bits of 64."""
    if value is None or checks.is_array(value):
        return None if value is None else check(name, value)
    if not isinstance(value, tuple | list) or len(value) != 2:
        rule = f"`{name}` must be integers [B, T], or a pair ([B, T], [B, S])."
        evidence = f"{name} of type {type(value).__name__}"
        is_list = name == "positions" and isinstance(value, tuple | list)
        remedy = (
            "Several axes are one array: `jnp.stack([time, rows, columns])`." if is_list else ""
        )
        checks.fail(TypeError, rule, evidence, remedy)
    return tuple(check(name, array) for array in value)
