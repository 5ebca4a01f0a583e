"""The heads of multi-head latent attention: made from the latents, or met by the queries there.

    logits = q . [shared, W_key c] = [q W_key, q's shared part] . [c, shared]
    context = (weights . c) W_value = weights . (c W_value)

so that a cache holds latents and attention reads them as one head, of N query heads. The shared
part stands first in a head, for what turns is first, and last in a cache.
"""

import functools
import math

import jax.numpy as jnp

from flax_mha.attention.contract import Scales
from flax_mha.core.typing import Array
from flax_mha.layer.adapters import kernel_of
from flax_mha.layer.extend import View
from flax_mha.layer.heads import Heads
from flax_mha.layer.projection import isolated


class LatentHeads(Heads):
    """Every head's keys and values, expanded from the latents: a call without a cache."""

    def query(self) -> Array:
        if "query_latent" not in self.params:
            return self.placed_query(self.projected("BTD,DNH->BTNH", self.call.query_BTD, "query"))
        latent_BTQ = self.projected("BTD,DQ->BTQ", self.call.query_BTD, "query_latent")
        latent_BTQ = self.normalized("query_latent_norm", latent_BTQ[:, :, None])[:, :, 0]
        return self.placed_query(self.projected("BTQ,QNH->BTNH", latent_BTQ, "query"))

    def key(self) -> Array:
        own_BSKU = self.projected("BSL,LKU->BSKU", self.latent_BSL, "key")
        shared = jnp.broadcast_to(self.shared_BS1W, (*own_BSKU.shape[:3], self._W))
        return jnp.concatenate([shared, own_BSKU], -1)

    def value(self) -> Array:
        return self.projected("BSL,LKV->BSKV", self.latent_BSL, "value")

    @functools.cached_property
    def latent_BSL(self) -> Array:
        latent_BSL = self.projected("BSC,CL->BSL", self.call.key_BSC, "latent")
        return self.normalized("latent_norm", latent_BSL[:, :, None])[:, :, 0]

    @functools.cached_property
    def shared_BS1W(self) -> Array:
        shared_BSW = self.projected("BSC,CW->BSW", self.call.key_BSC, "shared_key")
        return self.placed_key(shared_BSW[:, :, None])

    @property
    def _W(self) -> int:
        return self.config.latent.shared_dim


class AbsorbedHeads(LatentHeads):
    """Queries that meet the latents themselves: a call with a cache, which makes no other heads."""

    def query(self) -> Array:
        shared_BTNW, own_BTNU = jnp.split(super().query(), [self._W], -1)
        met = isolated(self._to_latents, own_BTNU) if self._isolates else self._to_latents(own_BTNU)
        return jnp.concatenate([met, shared_BTNW], -1)

    def key(self) -> Array:
        return jnp.concatenate([self.latent_BSL[:, :, None], self.shared_BS1W], -1)

    def value(self) -> Array:
        """Nothing: the keys hold the latents."""
        return self.latent_BSL[:, :, None, :0]

    @property
    def scale(self) -> float:
        """That of the heads, which are not what attention reads."""
        scale = self.config.scale
        return 1 / math.sqrt(self.config.key_dim) if scale is None else scale

    def read(self, view: View) -> View:
        """Keys that are their own values: to cut the shared part off would copy the cache."""
        scales = None if view.scales is None else Scales(view.scales.key_BSK, view.scales.key_BSK)
        return view._replace(value_BSKV=view.key_BSKH, scales=scales)

    def context(self, context_BTNV: Array) -> Array:
        latent_BTNL = context_BTNV[..., : self.config.latent.rank]
        return self._met("BTNL,LNV->BTNV", latent_BTNL, "value")

    def _to_latents(self, own_BTNU: Array) -> Array:
        return self._met("BTNU,LNU->BTNL", own_BTNU, "key")

    def _met(self, equation: str, x: Array, name: str) -> Array:
        kernel = kernel_of(self.params[name], x.dtype)
        return jnp.einsum(equation, x, kernel, precision=self.config.precision)

    @property
    def _isolates(self) -> bool:
        return self.call.mask.removes_positions
