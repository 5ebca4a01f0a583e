"""Multi-head latent attention: keys and values that come of one small latent array."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax_mha.core import checks
from flax_mha.norms.identifiers import resolve_norm, serialize_norm
from flax_mha.positions import PositionFunction

# What works on the heads of keys or values themselves, which a cache of latents never makes.
_OF_HEADS = ("qk_norm", "value_norm", "clip_qkv")


@dataclasses.dataclass(frozen=True)
class Latent:
    """The sizes of multi-head latent attention (MLA), as in DeepSeek-V2 and V3.

        c = norm(x . W_latent)                          the latent, [S, L]
        k_n = [x . W_shared, c . W_key,n]               head n: the first W features are all heads'
        v_n = c . W_value,n
        q_n = norm(x . W_query_latent) . W_query,n      or x . W_query,n

    A cache holds c and the shared part, turned: L + W numbers a token, of all heads together. A
    call with a cache makes no heads of them: q_n meets the latents by W_key,n, and what it reads
    becomes values by W_value,n. The result is the same, up to rounding.

    Rotary embedding turns the shared part alone: `position=Rotary(dim=shared_dim)`. The layer's
    `key_dim` is H = W + U, `qk_head_dim` of the models' files; U features are a head's own.

    Args:
        rank: L, the latent's features: `kv_lora_rank`.
        shared_dim: W, the key's features that all heads share: `qk_rope_head_dim`.
        query_rank: Q, the features of the queries' latent: `q_lora_rank`; None = there is none.
        norm: what both latents pass: an object of `flax_mha.norms`, its name, or None.

    Raises:
        ValueError: a size below 1, an unknown norm.
        TypeError: a value of another type.

    Reference: DeepSeek-AI, "DeepSeek-V2", https://arxiv.org/abs/2405.04434.

    Example:
        >>> import flax_mha
        >>> from flax_mha.positions import Rotary
        >>> config = flax_mha.MultiHeadAttentionConfig(
        ...     num_heads=16,
        ...     key_dim=192,
        ...     value_dim=128,
        ...     use_bias=False,
        ...     position=Rotary(dim=64),
        ...     latent=flax_mha.Latent(rank=512, shared_dim=64),
        ... )
        >>> cache = flax_mha.init_cache(config, batch_shape=1, capacity=100)
        >>> cache.key.shape, cache.value.shape  # 16 heads of 192 + 128 would be 5120 a token
        ((1, 1, 100, 576), (1, 1, 100, 0))
    """

    rank: int
    shared_dim: int
    query_rank: int | None = None
    norm: Any = "rms"

    def __post_init__(self) -> None:
        for name in ("rank", "shared_dim", "query_rank"):
            size = getattr(self, name)
            if size is not None or name != "query_rank":
                size = checks.integer(f"Latent.{name}", size, minimum=1)
            object.__setattr__(self, name, size)
        object.__setattr__(self, "norm", resolve_norm("Latent.norm", self.norm))


def resolve_latent(name: str, value: Any) -> Latent | None:
    """A latent from itself, or from the dict that `serialize_latent` writes."""
    if value is None or isinstance(value, Latent):
        return value
    if not isinstance(value, Mapping):
        rule = f"`{name}` must be None or a flax_mha.Latent."
        checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}")
    fields = [field.name for field in dataclasses.fields(Latent)]
    checks.known_names("A field of Latent", value, fields)
    return Latent(**{"rank": None, "shared_dim": None, **value})


def serialize_latent(value: Latent) -> dict[str, Any]:
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {**fields, "norm": serialize_norm(value.norm)}


def check_latent(config: Any) -> None:
    """The fields that a latent layer reads fit together; those that need a key's heads are None."""
    latent = config.latent
    if latent is None:
        return
    N, K, H, _ = config.dims
    if K != N:
        rule = "In a latent layer each head makes its own keys: `num_kv_heads` must be None."
        checks.fail(ValueError, rule, f"num_heads={N}, num_kv_heads={K}")
    if latent.shared_dim >= H:
        rule = "`key_dim` counts the shared features and each head's own: it must be larger."
        checks.fail(ValueError, rule, f"key_dim={H}, {latent}")
    for name in _OF_HEADS:
        if getattr(config, name) is not None:
            rule = f"A latent layer has no `{name}`: it would need the heads, which no cache makes."
            evidence = f"{name}={getattr(config, name)!r}"
            checks.fail(NotImplementedError, rule, evidence, "The latents' norm is `Latent.norm`.")
    _check_turning(config)


def _check_turning(config: Any) -> None:
    position, W = config.position, config.latent.shared_dim
    if not isinstance(position, PositionFunction):
        return
    turned = position.turned_features(config.key_dim)
    if turned > W:
        rule = f"In a latent layer the shared features alone are turned, {W} of each head."
        evidence = f"position={position}, which turns {turned}"
        checks.fail(ValueError, rule, evidence, f"Set `dim={W}`.")


def projections_of(latent: Latent) -> tuple[str, ...]:
    """The linear maps that make queries, keys and values."""
    first = () if latent.query_rank is None else ("query_latent",)
    return (*first, "query", "latent", "shared_key", "key", "value")


def norms_of(latent: Latent) -> dict[str, Any]:
    """The norms of the latents by the names of their parameters."""
    names = ("latent_norm",) if latent.query_rank is None else ("query_latent_norm", "latent_norm")
    return dict.fromkeys(names, latent.norm)
