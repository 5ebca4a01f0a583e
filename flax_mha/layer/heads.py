"""Query, key and value heads: projected, clamped, normalized, placed: turned or grown.

heads = placed(norm(clip(x . W + b)), position)
"""

import dataclasses

import jax.numpy as jnp

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.nans import nan_where
from flax_mha.core.typing import Array, ParamsLike
from flax_mha.layer.call import Call
from flax_mha.layer.extend import View
from flax_mha.layer.projection import as_rank
from flax_mha.positions import PositionFunction


@dataclasses.dataclass(frozen=True, eq=False)
class Heads:
    """How a layer makes the heads of one call, and what becomes of their context."""

    params: ParamsLike
    call: Call
    config: MultiHeadAttentionConfig

    def query(self) -> Array:
        query_BTNH = self.projected("BTD,DNH->BTNH", self.call.query_BTD, "query")
        return self.placed_query(self.normalized("query_norm", self._clamped(query_BTNH)))

    def key(self) -> Array:
        key_BSKH = self.projected("BSC,CKH->BSKH", self.call.key_BSC, "key")
        return self.placed_key(self.normalized("key_norm", self._clamped(key_BSKH)))

    def value(self) -> Array:
        value_BSKV = self.projected("BSM,MKV->BSKV", self.call.value_BSM, "value")
        return self.normalized("value_norm", self._clamped(value_BSKV))

    @property
    def scale(self) -> float | None:
        """The factor of the logits; None = one over the root of the heads' size."""
        return self.config.scale

    def read(self, view: View) -> View:
        """What attention reads of the keys and values that a call or a cache shows."""
        return view

    def context(self, context_BTNV: Array) -> Array:
        """The context of the values' heads, from that of what attention has read."""
        return context_BTNV

    # --- the steps ------------------------------------------------------------------------------

    def projected(self, equation: str, x: Array | None, name: str) -> Array:
        return self.call.project(equation, x, self.params[name])

    def _clamped(self, x: Array) -> Array:
        c = self.config.clip_qkv
        return x if c is None else jnp.clip(x, -c, c)

    def normalized(self, name: str, x: Array) -> Array:
        """The norm of that name, where there is one; at least float32 inside."""
        norm = self.config.norms.get(name)
        if norm is None:
            return x
        wide, params = x.astype(wide_dtype(x.dtype)), self.params.get(name, {})
        if not self.call.mask.removes_positions:
            return norm(wide, params).astype(x.dtype)
        # NaN at a removed position times a zero cotangent would reach the scale's gradient.
        finite = as_rank(jnp.isfinite(x).all((-2, -1)), x.ndim)
        normal = norm(jnp.where(finite, wide, 0), params)
        return jnp.where(finite, normal, nan_where(~finite, normal.dtype)).astype(x.dtype)

    def placed_query(self, x: Array) -> Array:
        position = self._position_function
        return x if position is None else position.of_query(x, self.call.query_position_bT)

    def placed_key(self, x: Array) -> Array:
        position = self._position_function
        return x if position is None else position.of_key(x, self.call.key_position_bS)

    @property
    def _position_function(self) -> PositionFunction | None:
        position = self.config.position
        return position if isinstance(position, PositionFunction) else None
