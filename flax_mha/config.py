"""The static description of one layer: Keras's constructor arguments, checked and hashable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flax_mha.attention import IMPLEMENTATIONS, ContextAxis
from flax_mha.attention.context.axis import context_axis_of
from flax_mha.core import checks
from flax_mha.core.typing import HeadDims
from flax_mha.keras.identifiers import Kind, resolve, serialize
from flax_mha.keras.policies import policy_dtypes
from flax_mha.positions.identifiers import resolve_position, serialize_position

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
        sliding_window: a query attends to keys less than this many positions away, either side.
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
        position: None, "rotary", "alibi", "relative_bias", or an object of `flax_mha.positions`.
        qk_norm: None; "rms", each head of query and key divided by its root mean square, times a
            learned scale `[H]`; or "l2", the same without scale: logits = sqrt(H) cos(query, key).
        qk_norm_epsilon: of "rms", added to the mean square, None = 1e-6; of "l2", the norm up to
            which a head counts as zero, and stays zero with gradient zero, None = 1e-12.
        soft_cap: logits q k / sqrt(H) become soft_cap * tanh(logits / soft_cap); None = as are.
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
    sliding_window: int | None = None
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
    position: Any = None
    qk_norm: str | None = None
    qk_norm_epsilon: float | None = None
    soft_cap: float | None = None
    use_sinks: bool = False
    dtype: Any = None
    param_dtype: Any = "float32"
    precision: Any = None
    implementation: str | None = None
    context_axis: Any = None

    def __post_init__(self) -> None:
        for name, check in _FIELD_CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        N, K = self.dims[:2]
        if N % K:
            rule = "`num_heads` (N) must be a multiple of `num_kv_heads` (K)."
            remedy = f"Choose `num_kv_heads` among {[k for k in range(1, N + 1) if N % k == 0]}."
            checks.fail(ValueError, rule, f"num_heads={N}, num_kv_heads={K}", remedy)
        if self.qk_norm is None and self.qk_norm_epsilon is not None:
            rule = "`qk_norm_epsilon` is read by `qk_norm` alone."
            checks.fail(ValueError, rule, f"qk_norm_epsilon={self.qk_norm_epsilon}, qk_norm=None")
        object.__setattr__(self, "use_bias", _biases(self.use_bias, self.projections))

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the layer's linear maps."""
        gate = ("gate",) if self.use_gate else ()
        return ("query", "key", "value", *gate, "attention_output")

    @property
    def biases(self) -> tuple[str, ...]:
        """The names of the projections that have a bias, whichever way `use_bias` says it."""
        if isinstance(self.use_bias, bool):
            return self.projections if self.use_bias else ()
        return self.use_bias

    @property
    def dims(self) -> HeadDims:
        """(N, K, H, V) with the defaults filled in."""
        K = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        V = self.key_dim if self.value_dim is None else self.value_dim
        return HeadDims(self.num_heads, K, self.key_dim, V)

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
        return {name: _plain(name, value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MultiHeadAttentionConfig:
        """The config whose `fields` `to_dict` wrote.

        Raises:
            ValueError: an unknown field, with the valid ones; otherwise as the constructor.
        """
        checks.known_names("A field of MultiHeadAttentionConfig", fields, field_names())
        return cls(**fields)

    @classmethod
    def from_keras_config(cls, config: Mapping[str, Any]) -> MultiHeadAttentionConfig:
        """From `config = layer.get_config()` of a Keras layer; Keras need not be installed.

        The dtype policy becomes `dtype` and `param_dtype`; `name` and `trainable` describe the
        Keras object, and have no meaning here.

        Raises:
            ValueError: a field that this package does not have; otherwise as the constructor.
        """
        fields = {name: value for name, value in config.items() if name not in _KERAS_ONLY}
        return cls.from_dict({**fields, **policy_dtypes(fields.pop("dtype", None))})


def field_names() -> tuple[str, ...]:
    """The names of the config's fields, in order."""
    return tuple(field.name for field in dataclasses.fields(MultiHeadAttentionConfig))


def _size(name: str, value: Any) -> int:
    return checks.integer(name, value, minimum=1)


def _optional(check: Any) -> Any:
    return lambda name, value: None if value is None else check(name, value)


def _output_shape(name: str, value: Any) -> tuple[int, ...] | None:
    """Keras: an int or an iterable of ints; None, 0 and () mean the query's own size."""
    entries = (value,) if hasattr(value, "__index__") else value
    if value is None or entries in ((), [], (0,)):
        return None
    if isinstance(entries, str) or not hasattr(entries, "__iter__"):
        rule = f"`{name}` must be an int or a tuple of ints."
        checks.fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}")
    return tuple(_size(name, entry) for entry in entries)


def _use_bias(name: str, value: Any) -> bool | tuple[str, ...]:
    if hasattr(value, "__index__") or isinstance(value, np.bool_):
        return checks.boolean(name, value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        rule = f"`{name}` must be True or False, or a tuple of names of projections."
        remedy = f"Pass `{name}=({value!r},)`." if isinstance(value, str) else ""
        checks.fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}", remedy)
    return tuple(value)


def _biases(use_bias: Any, projections: tuple[str, ...]) -> bool | tuple[str, ...]:
    """All names are True, none are False, some stand in order: equal configs hash alike."""
    if isinstance(use_bias, bool):
        return use_bias
    checks.known_names("A projection of this layer in `use_bias`", use_bias, projections)
    named = tuple(name for name in projections if name in use_bias)
    return named if named and named != projections else bool(named)


def _identifier(kind: Kind) -> Any:
    return lambda name, value: resolve(kind, value)


def _precision(name: str, value: Any) -> Any:
    """One precision for every product, in the one spelling that hashes alike."""
    try:
        return jax.lax.Precision(value)
    except ValueError:
        valid = [precision.name.lower() for precision in jax.lax.Precision]
        checks.fail(ValueError, f"`{name}` must be None or among {valid}.", f"{name}={value!r}")


def _implementation(name: str, value: Any) -> str:
    return checks.one_of(name, value, IMPLEMENTATIONS)


_FIELD_CHECKS: dict[str, Any] = {
    "num_heads": _size,
    "key_dim": _size,
    "value_dim": _optional(_size),
    "dropout": checks.rate,
    "use_bias": _use_bias,
    "output_shape": _output_shape,
    "attention_axes": _optional(checks.axes),
    "sliding_window": _optional(_size),
    "kernel_initializer": _identifier("initializer"),
    "bias_initializer": _identifier("initializer"),
    "kernel_regularizer": _identifier("regularizer"),
    "bias_regularizer": _identifier("regularizer"),
    "activity_regularizer": _identifier("regularizer"),
    "kernel_constraint": _identifier("constraint"),
    "bias_constraint": _identifier("constraint"),
    "use_gate": checks.boolean,
    "seed": _optional(checks.integer),
    "num_kv_heads": _optional(_size),
    "position": resolve_position,
    "qk_norm": _optional(lambda name, value: checks.one_of(name, value, ("rms", "l2"))),
    "qk_norm_epsilon": _optional(checks.positive),
    "soft_cap": _optional(checks.positive),
    "use_sinks": checks.boolean,
    "dtype": _optional(checks.floating_dtype),
    "param_dtype": checks.floating_dtype,
    "precision": _optional(_precision),
    "implementation": _optional(_implementation),
    "context_axis": _optional(lambda name, value: context_axis_of(value)),
}


def _plain(name: str, value: Any) -> Any:
    if name.endswith(("initializer", "regularizer", "constraint")):
        return serialize(value)
    if name == "position":
        return serialize_position(value)
    if isinstance(value, ContextAxis):
        return dataclasses.asdict(value)
    if isinstance(value, jax.lax.Precision):
        return value.name.lower()
    return list(value) if isinstance(value, tuple) else value
