"""The flax.linen module around the pure function; see `python -m flax_mha guide in_flax`."""

from typing import Any

import jax
from flax import linen as nn
from flax import serialization

from flax_mha.config import MultiHeadAttentionConfig, field_names
from flax_mha.core import checks
from flax_mha.core.typing import Array, ParamsLike, PRNGKey
from flax_mha.functional import forward, results
from flax_mha.layer.arguments import Restrictions
from flax_mha.layer.caches import CrossCache, KVCache, register_state
from flax_mha.params import init_projection, param_shapes
from flax_mha.training import activity_loss, regularization_loss

register_state(serialization.register_serialization_state)


class MultiHeadAttention(nn.Module):
    """Keras's MultiHeadAttention as a flax.linen module; `variables["params"]` is the params tree.

    Args: those of `MultiHeadAttentionConfig` (`help(flax_mha.MultiHeadAttentionConfig)`), and
        sow_attention_scores: collect the scores, with `mutable=["intermediates"]`.

    A call takes what `help(flax_mha.multi_head_attention)` lists, and `training`: True draws from
    the "dropout" rng stream, or else from `seed`. `mutable=["losses"]` collects the penalties,
    "regularization" (once) and "activity" (a call each). Memory: as `multi_head_attention`.
    Differs from Keras: (1) `training=False` is the default; (2) sizes are fixed by the first call.

    Example:
        >>> import jax, flax_mha
        >>> layer = flax_mha.MultiHeadAttention(num_heads=2, key_dim=16, dropout=0.1)
        >>> x = jax.random.normal(jax.random.key(0), (4, 8, 32))
        >>> variables = layer.init(jax.random.key(1), x, x)
        >>> layer.apply(variables, x, x, training=True, rngs={"dropout": jax.random.key(2)}).shape
        (4, 8, 32)
        >>> flax_mha.MultiHeadAttention.from_config(layer.config).config == layer.config
        True
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
    sow_attention_scores: bool = False

    @classmethod
    def from_config(cls, config: MultiHeadAttentionConfig, **module_fields: Any) -> Any:
        """A module with the fields of `config`; `module_fields` are `name`, `parent` and such."""
        return cls(**{name: getattr(config, name) for name in field_names()}, **module_fields)

    @property
    def config(self) -> MultiHeadAttentionConfig:
        """The fields as a checked, hashable config."""
        return MultiHeadAttentionConfig(**{name: getattr(self, name) for name in field_names()})

    @nn.compact
    def __call__(
        self,
        query: Array,
        value: Array | None,
        key: Array | None = None,
        query_mask: Array | None = None,
        value_mask: Array | None = None,
        key_mask: Array | None = None,
        attention_mask: Array | None = None,
        return_attention_scores: bool = False,
        training: bool = False,
        use_causal_mask: bool = False,
        *,
        bias: Array | None = None,
        segment_ids: Array | tuple[Array, Array] | None = None,
        positions: Array | tuple[Array, Array] | None = None,
        cache: KVCache | CrossCache | None = None,
        dropout_start: Any = None,
    ) -> Any:
        """See `multi_head_attention`; with `training=True`, dropout acts."""
        flags = (return_attention_scores, training, use_causal_mask)
        with_scores, training, is_causal = checks.module_flags(type(self).__call__, *flags)
        params = self._params(config := self.config, query, value, value if key is None else key)
        sow_scores = self.sow_attention_scores and self.is_mutable_collection("intermediates")
        masks = (query_mask, value_mask, key_mask, attention_mask)
        activations = forward(
            params,
            query,
            value,
            key,
            config=config,
            use_causal_mask=is_causal,
            return_attention_scores=with_scores or sow_scores,
            dropout_key=self._dropout_key(training),
            cache=cache,
            **Restrictions(*masks, bias, segment_ids, positions, dropout_start)._asdict(),
        )
        self._sow_losses(params, activations, config)
        if sow_scores:
            self.sow("intermediates", "attention_scores", activations.attention_scores)
        return results(activations, with_scores)

    def _params(self, config: MultiHeadAttentionConfig, *arrays: Any) -> Any:
        if arrays[1] is None:  # a cross cache holds what came of value and key
            return self.variables.get("params", {})
        for name, array in zip(("query", "value", "key"), arrays):
            checks.floating_array(name, array, "[..., length, features]")
        shapes: ParamsLike = param_shapes(config, *(array.shape for array in arrays))
        return {n: self.param(n, init_projection, n, shapes[n], config) for n in shapes}

    def _dropout_key(self, training: bool) -> PRNGKey | None:
        if not training or self.dropout == 0 or self.is_initializing():
            return None
        if self.has_rng("dropout"):
            return self.make_rng("dropout")
        if self.seed is not None:
            return jax.random.key(self.seed)
        checks.no_dropout_stream(self.dropout, "rngs={'dropout': jax.random.key(0)}` to `apply")

    def _sow_losses(self, params: Any, activations: Any, config: MultiHeadAttentionConfig) -> None:
        """Scalars in the "losses" collection; parameters shared by two calls count once."""
        if self.is_initializing() or not self.is_mutable_collection("losses"):
            return
        if config.kernel_regularizer is not None or config.bias_regularizer is not None:
            penalty = regularization_loss(params, config)
            self.sow("losses", "regularization", penalty, reduce_fn=lambda _, new: new)
        if config.activity_regularizer is not None:
            total: Any = dict(reduce_fn=jax.numpy.add, init_fn=lambda: jax.numpy.zeros(()))
            self.sow("losses", "activity", activity_loss(activations, config), **total)
