"""A low-rank adapter beside a kernel, in one call: y = x . W + (drop(x) . a) scale . b."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from flax_mha.core import boxes, checks
from flax_mha.core.typing import Array, DType, ParamsLike, PRNGKey
from flax_mha.params.lora import check_lora, check_scale
from flax_mha.params.tree import LETTERS


class Adapter(NamedTuple):
    """One projection's, with what the call makes of it; a pytree."""

    a: Array  # [*inputs, r]
    b: Array  # [r, *outputs]
    scale: Any
    dropout: Any  # the rate, where there is a key
    key: PRNGKey | None

    def dropped(self, x: Array) -> Array:
        """x as the adapter reads it: some numbers are zeros, and the others grow instead."""
        if self.key is None:
            return x
        keep = 1 - jnp.asarray(self.dropout, "float32")  # 16 bits would draw of 256 numbers
        kept = jax.random.bernoulli(self.key, keep, x.shape)
        return jnp.where(kept, x / keep.astype(x.dtype), 0)

    def factor(self, dtype: DType) -> Array:
        return jnp.asarray(self.scale).astype(dtype)

    def flat(self) -> "Adapter":
        """With the axes of the outputs merged."""
        return self._replace(b=self.b.reshape(self.b.shape[0], -1))


class LoraCall(NamedTuple):
    """What a call says of adapters; a pytree."""

    params: ParamsLike | None = None
    scale: Any = 1.0
    dropout: Any = 0.0
    dropout_key: PRNGKey | None = None


def checked_lora(lora: LoraCall) -> LoraCall | None:
    """The same, as far as values tell, before tracing hides them; None without adapters."""
    if lora.params is None:
        unset = {"lora_scale": 1.0, "lora_dropout": 0.0, "lora_dropout_key": None}
        given = dict(zip(unset, lora[1:]))
        if extra := [name for name, x in given.items() if not _is(x, unset[name])]:
            rule = "Without `lora` there is nothing to scale or to drop."
            checks.fail(TypeError, rule, ", ".join(extra))
        return None
    if isinstance(lora.params, Mapping):  # what else it is, is refused by name when it is read
        boxes.refuse(lora.params, "lora")
    rate = checks.rate_below_one("lora_dropout", lora.dropout)
    if lora.dropout_key is not None:
        checks.prng_key("lora_dropout_key", lora.dropout_key)
    check_scale(lora.scale)
    return lora if rate else lora._replace(dropout_key=None)


def _is(value: Any, unset: float | None) -> bool:
    """Whether an argument was left as it is; what is traced was given."""
    return value is None if unset is None else isinstance(value, float | int) and value == unset


def adapted(params: ParamsLike, lora: LoraCall | None) -> Any:
    """The parameters, with an adapter beside each kernel that has one."""
    if lora is None or lora.params is None:
        return params
    check_lora(lora.params, params)
    beside = {name: {"lora": _adapter(lora, name)} for name in lora.params}
    return {name: {**leaves, **beside.get(name, {})} for name, leaves in params.items()}


def _adapter(lora: LoraCall, name: str) -> Adapter:
    """With a key of its own, whichever others there are."""
    leaves, key = cast(Any, lora.params)[name], lora.dropout_key
    own = None if key is None else jax.random.fold_in(key, list(LETTERS).index(name))
    return Adapter(leaves["a"], leaves["b"], lora.scale, lora.dropout, own)


def kernel_of(projection: Any, dtype: DType) -> Array:
    """The kernel with its adapter in it, where the kernel itself is met and no input of it."""
    kernel, adapter = projection["kernel"].astype(dtype), projection.get("lora")
    if adapter is None:
        return kernel
    if adapter.key is not None:
        rule = "Where a cache of latents meets the kernels, an adapter has no dropout."
        checks.fail(NotImplementedError, rule, "lora_dropout and a cache", "Train without a cache.")
    scaled_a = adapter.a.astype(dtype) * adapter.factor(dtype)
    return kernel + jnp.tensordot(scaled_a, adapter.b.astype(dtype), 1)
