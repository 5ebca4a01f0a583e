"""The flax.linen module around the pure function; see `python -m flax_mha guide in_flax`."""

from typing import Any

from flax import linen as nn
from flax import serialization

from flax_mha.config.config import MultiHeadAttentionConfig, field_names
from flax_mha.core import checks
from flax_mha.core.typing import Array, ParamsLike
from flax_mha.functional import forward, results
from flax_mha.layer.arguments import Restrictions, check_arrays
from flax_mha.layer.caches import CrossCache, KVCache, register_state
from flax_mha.masks import Mask
from flax_mha.params.quantized import has_quantized
from flax_mha.params.tree import check_params, param_shapes
from flax_mha.sharding.initial import Boxes, init_boxed, rules_of_a_field
from flax_mha.training.adapters import lora_of
from flax_mha.training.sown import sow
from flax_mha.training.streams import dropout_key

register_state(serialization.register_serialization_state)
BOXES = Boxes("flax.linen", nn.Partitioned, nn.logical_to_mesh_axes)


class MultiHeadAttention(nn.Module):
    """Keras's MultiHeadAttention as a flax.linen module; `variables["params"]` is the params tree.

    Args: those of `MultiHeadAttentionConfig` (`help(flax_mha.MultiHeadAttentionConfig)`), and
        sow_attention_scores: collect the scores, with `mutable=["intermediates"]`.
        lora: a `flax_mha.Lora`, adapters in the collection "lora", which train alone.
        partition_rules: as the `rules` of `flax_mha.param_specs`; parameters are `nn.Partitioned`.

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
    lora: Any = None
    sow_attention_scores: bool = False
    partition_rules: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "partition_rules", rules_of_a_field(self.partition_rules))
        super().__post_init__()

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
        attention_mask: Mask | Array | None = None,
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
        arrays = (query, value, value if key is None else key)
        params = self._params(config := self.config, *arrays)
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
            dropout_key=dropout_key(self, self.dropout, training),
            cache=cache,
            **lora_of(self, config, training, *arrays),
            **Restrictions(*masks, bias, segment_ids, positions, dropout_start)._asdict(),
        )
        sow(self, params, activations, config, sow_scores)
        return results(activations, with_scores)

    def _params(self, config: MultiHeadAttentionConfig, *arrays: Any) -> Any:
        held = nn.meta.unbox(self.variables.get("params", {}))
        if arrays[1] is None or has_quantized(held):  # a cross cache's, or of no initializer
            return held
        check_arrays(arrays)
        if held and not self.is_mutable_collection("params"):  # Flax's own check names no leaf
            check_params(held, config, *(array.shape for array in arrays))
        shapes: ParamsLike = param_shapes(config, *(array.shape for array in arrays))
        rules = self.partition_rules if self.is_mutable_collection("params") else None
        return {n: self.param(n, init_boxed, n, shapes[n], config, rules, BOXES) for n in shapes}
