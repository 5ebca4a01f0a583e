"""The static description of one layer: Keras's constructor arguments, checked and hashable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax_mha.config.fields import (
    FIELD_CHECKS,
    canonical_biases,
    check_chunks,
    check_window,
    plain,
)
from flax_mha.config.latent import check_latent, norms_of, projections_of
from flax_mha.core import checks
from flax_mha.core.typing import HeadDims
from flax_mha.keras.policies import policy_dtypes
from flax_mha.norms import Norm
from flax_mha.positions.scores import check_score

# Entries of Keras's get_config() that describe the Keras object, not the attention.
_KERAS_ONLY = ("name", "trainable")


@dataclasses.dataclass(frozen=True)
class MultiHeadAttentionConfig:
    """Everything static about a multi-head attention layer; Keras 3.15's arguments and defaults.

    Frozen and hashable, so it can be a static argument of `jax.jit`; equal configs hash alike.

    Args:
        num_heads: N, the number of query heads.
        key_dim: H, the size of one head of query and key, not of all heads together.
        value_dim: V, the size of one head of value; None = key_dim.
        dropout: probability in [0, 1] of dropping an attention weight in training.
        use_bias: whether the projections have biases; or the names of those that have: "query",
            "key", "value", "gate", "attention_output". The others then have no such entry.
        output_shape: the output's feature shape E, an int or a tuple; None = the query's D.
        attention_axes: the axes that attend, an int or a tuple; None = all but the first and the
            features. Negative ones count from the features' end: -2 is the last before them.
        sliding_window: an int w, Keras's: a query attends to keys less than w positions away in
            raster order, either side: 2 w - 1 of them, at the ends fewer. Or a tuple, a size for
            each of `attention_axes` in their order, short for a `flax_mha.Neighborhood`, which
            takes a dilation and causal axes too: so many keys in all along each axis, at the
            borders too. `use_causal_mask=True` is raster order beside both. None = no window.
        kernel_initializer: a Keras name, a Keras config dict, an object of
            `flax_mha.keras.initializers`, or a JAX initializer `(key, shape, dtype)`.
        bias_initializer: likewise.
        kernel_regularizer: a Keras name, dict, an object of `flax_mha.keras.regularizers`, or a
            callable.
        bias_regularizer: likewise.
        activity_regularizer: likewise, of the projected arrays and the output.
        kernel_constraint: a Keras name, dict, an object of `flax_mha.keras.constraints`, or a
            callable.
        bias_constraint: likewise.
        use_gate: whether the context is multiplied by sigmoid(query . gate).
        seed: where a module is given no "dropout" stream, it draws from this seed: in linen the
            same mask each call, in nnx a new one.
        num_kv_heads: K, heads of key and value, a divisor of N; None = N.
        chunk_size: c, where the token at position p attends to those at p' with p' // c = p // c
            alone, as in Llama 4's local layers: a chunk is a part of the sequence, a block a tile
            of the computation. None = no chunks. Not beside a sliding window.
        latent: a `flax_mha.Latent`, where keys and values come of one small array; None = of the
            inputs.
        position: None, "rotary", "alibi", "relative_bias", or an object of `flax_mha.positions`.
        qk_norm: what each head of query and key passes before it is turned to its position: None,
            "rms", "l2", or an object of `flax_mha.norms`.
        value_norm: likewise, of the values' heads.
        clip_qkv: c, where the projections of query, key and value are clamped to [-c, c].
        scale: the factor of query . key; None = 1 / sqrt(H).
        soft_cap: logits scale q k become soft_cap * tanh(logits / soft_cap); None = as they are.
        score: a `flax_mha.positions.Score`: what becomes of each logit, after caps and biases and
            before the mask, by a function that may own parameters; None = as it is.
        use_sinks: whether each head has a learned logit that attends to nothing.
        dtype: the compute dtype; None = that of inputs and parameters, promoted.
        param_dtype: the dtype of the parameters.
        precision: of every product: None, a name such as "highest", or a `jax.lax.Precision`.
        implementation: one of `flax_mha.IMPLEMENTATIONS`; None chooses. See `flax_mha.explain`.
        context_axis: the mesh axis along which the sequence is cut: its name, or a
            `flax_mha.ContextAxis` that says how its parts meet; None = no axis. The mesh is that of
            `jax.set_mesh`, of the arrays, or of a `jax.shard_map` around the call.

    Raises:
        ValueError: a value out of range or an unknown name.
        TypeError: a value of the wrong type.

    Differs from Keras: (1) rates and axes are checked here, not at build; (2) `flash_attention` is
    spelled `implementation`; (3) NumPy integers pass, booleans as sizes do not; (4) `use_bias`
    takes names.

    Example:
        >>> from flax_mha import MultiHeadAttentionConfig
        >>> config = MultiHeadAttentionConfig(num_heads=2, key_dim=16, kernel_regularizer="l2")
        >>> config.kernel_regularizer
        L2(l2=0.01)
        >>> config.replace(num_heads=4).dims
        HeadDims(N=4, K=4, H=16, V=16)
        >>> config.replace(use_bias=("value", "query")).biases, config.projections
        (('query', 'value'), ('query', 'key', 'value', 'attention_output'))
        >>> config.cache_dims == config.dims
        True
        >>> config.replace(qk_norm="l2").norms
        {'query_norm': L2Norm(epsilon=1e-12), 'key_norm': L2Norm(epsilon=1e-12)}
        >>> MultiHeadAttentionConfig.from_dict(config.to_dict()) == config
        True
        >>> keras_config = {"num_heads": 2, "key_dim": 16, "name": "attention", "dtype": "float32"}
        >>> MultiHeadAttentionConfig.from_keras_config(keras_config).dtype
        'float32'
    """

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    dropout: float = 0.0
    use_bias: Any = True
    output_shape: Any = None
    attention_axes: Any = None
    sliding_window: Any = None
    kernel_initializer: Any = "glorot_uniform"
    bias_initializer: Any = "zeros"
    kernel_regularizer: Any = None
    bias_regularizer: Any = None
    activity_regularizer: Any = None
    kernel_constraint: Any = None
    bias_constraint: Any = None
    use_gate: bool = False
    seed: int | None = None
    _: dataclasses.KW_ONLY
    num_kv_heads: int | None = None
    chunk_size: int | None = None
    latent: Any = None
    position: Any = None
    qk_norm: Any = None
    value_norm: Any = None
    clip_qkv: float | None = None
    scale: float | None = None
    soft_cap: float | None = None
    score: Any = None
    use_sinks: bool = False
    dtype: Any = None
    param_dtype: Any = "float32"
    precision: Any = None
    implementation: str | None = None
    context_axis: Any = None

    def __post_init__(self) -> None:
        for name, check in FIELD_CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        N, K = self.dims[:2]
        if N % K:
            rule = "`num_heads` (N) must be a multiple of `num_kv_heads` (K)."
            some = [k for k in range(1, min(N, 1024) + 1) if N % k == 0]
            remedy = f"Choose `num_kv_heads` among {some}."
            checks.fail(ValueError, rule, f"num_heads={N}, num_kv_heads={K}", remedy)
        check_window(self)
        check_chunks(self)
        check_latent(self)
        check_score(self.score, N)
        object.__setattr__(self, "use_bias", canonical_biases(self.use_bias, self._may_have_bias))

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the layer's linear maps."""
        gate = ("gate",) if self.use_gate else ()
        heads = ("query", "key", "value") if self.latent is None else projections_of(self.latent)
        return (*heads, *gate, "attention_output")

    @property
    def _may_have_bias(self) -> tuple[str, ...]:
        """Not what a call with a cache takes to queries and context, as a product without bias."""
        absorbed = () if self.latent is None else ("key", "value")
        return tuple(name for name in self.projections if name not in absorbed)

    @property
    def biases(self) -> tuple[str, ...]:
        """The names of the projections that have a bias, whichever way `use_bias` says it."""
        if isinstance(self.use_bias, bool):
            return self._may_have_bias if self.use_bias else ()
        return self.use_bias

    @property
    def norms(self) -> dict[str, Norm]:
        """The norms of heads and latents, by the names of their parameters."""
        named = {"query_norm": self.qk_norm, "key_norm": self.qk_norm}
        named["value_norm"] = self.value_norm
        named |= {} if self.latent is None else norms_of(self.latent)
        return {name: norm for name, norm in named.items() if norm is not None}

    @property
    def dims(self) -> HeadDims:
        """(N, K, H, V) with the defaults filled in."""
        K = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        V = self.key_dim if self.value_dim is None else self.value_dim
        return HeadDims(self.num_heads, K, self.key_dim, V)

    @property
    def cache_dims(self) -> HeadDims:
        """(N, K, H, V) of what a cache holds: heads, or of a latent layer one of latents."""
        if self.latent is None:
            return self.dims
        return HeadDims(self.num_heads, 1, self.latent.rank + self.latent.shared_dim, 0)

    def replace(self, **changes: Any) -> MultiHeadAttentionConfig:
        """A checked copy with `changes`: some fields' new values.

        Raises:
            ValueError: an unknown field, with the closest name; otherwise as the constructor.
        """
        checks.known_names("A field of MultiHeadAttentionConfig", changes, field_names())
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict under Keras's names, the inverse of `from_dict`.

        Raises:
            TypeError: an initializer, regularizer or constraint is a plain callable.
        """
        values = {name: getattr(self, name) for name in field_names()}
        return {name: plain(name, value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MultiHeadAttentionConfig:
        """The config whose `fields` `to_dict` wrote.

        Raises:
            ValueError: an unknown field, with the valid ones; otherwise as the constructor.
        """
        checks.mapping("fields", fields)
        checks.known_names("A field of MultiHeadAttentionConfig", fields, field_names())
        lacking = [name for name in ("num_heads", "key_dim") if name not in fields]
        if lacking:
            rule = f"`fields` must hold `{lacking[0]}`."
            checks.fail(ValueError, rule, f"{sorted(fields)}")
        return cls(**fields)

    @classmethod
    def from_keras_config(cls, config: Mapping[str, Any]) -> MultiHeadAttentionConfig:
        """From `config = layer.get_config()` of a Keras layer; Keras need not be installed.

        The dtype policy becomes `dtype` and `param_dtype`; `name` and `trainable` describe the
        Keras object, and have no meaning here.

        Raises:
            ValueError: a field that this package does not have; otherwise as the constructor.
        """
        checks.mapping("config", config)
        fields = {name: value for name, value in config.items() if name not in _KERAS_ONLY}
        dtypes = policy_dtypes(fields.pop("dtype", None))
        return cls.from_dict({**fields, **dtypes})


def field_names() -> tuple[str, ...]:
    """The names of the config's fields, in order."""
    return tuple(field.name for field in dataclasses.fields(MultiHeadAttentionConfig))
