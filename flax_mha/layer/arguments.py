"""What a call of the layer is given, checked as far as types tell: before tracing hides values."""

from typing import Any, NamedTuple, TypeAlias

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks

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


def check_arrays(arrays: Any) -> None:
    """query, value and key, or the query alone, are floating."""
    letters = ("[..., T, D]", "[..., S, M]", "[..., S, C]")
    for name, array, axes in zip(("query", "value", "key"), arrays, letters):
        checks.floating_array(name, array, axes)


def checked_restrictions(
    config: MultiHeadAttentionConfig, restrictions: Restrictions
) -> Restrictions:
    """Checks the types of what every call takes; the masks come back as booleans."""
    if not isinstance(config, MultiHeadAttentionConfig):
        rule = "`config` must be a MultiHeadAttentionConfig."
        checks.fail(TypeError, rule, f"config of type {type(config).__name__}")
    checks.x64_enabled("dtype", config.dtype)
    return _booleans(restrictions)


def _booleans(restrictions: Restrictions) -> Restrictions:
    masks = {
        name: checks.boolean_mask(name, mask)
        for name, mask in restrictions._asdict().items()
        if name.endswith("mask") and mask is not None
    }
    if restrictions.bias is not None:
        checks.floating_array("bias", restrictions.bias, "that broadcasts to [B, N, T, S]")
    return restrictions._replace(**masks)
