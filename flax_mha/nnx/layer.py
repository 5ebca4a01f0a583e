"""The layer, and what a call of it hands to the pure function."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mha.config import Lora
from flax_mha.config.config import MultiHeadAttentionConfig, field_names
from flax_mha.core import checks
from flax_mha.core.signatures import arguments_of
from flax_mha.core.typing import Array, Params, ParamsLike, PRNGKey
from flax_mha.functional import forward, results
from flax_mha.layer import Activations, CrossCache, KVCache
from flax_mha.masks import Mask
from flax_mha.nnx.streams import dropout_key, dropout_stream, stream
from flax_mha.nnx.variables import BOXES, Adapters, Projection, tree_of
from flax_mha.params.lora import check_lora, check_rule, lora_params
from flax_mha.params.quantized import is_quantized, read_kernels
from flax_mha.params.tree import LETTERS, check_params, features_of, module_sizes, param_shapes
from flax_mha.sharding.initial import init_boxed
from flax_mha.training import regularization_loss


class MultiHeadAttention(nnx.Module):
    """Keras's MultiHeadAttention as a flax.nnx module; `layer.params` is the params tree.

    Dropout acts in training: after `train()`, until `eval()`, or in a call with `training=True`.
    Its key comes from the call's `rngs`, or from the stream that the layer holds as `layer.rngs`:
    a fork of the constructor's "dropout" stream, or one that starts from `seed` where that is set.

    A penalty is a number that the loss adds, and no hidden state: `layer.regularization_loss()`,
    and `activity_loss(layer.forward(query, value), layer.config)`.

    Args: those of `MultiHeadAttentionConfig` (`help(flax_mha.MultiHeadAttentionConfig)`), and
        query_features: D, the query's last size.
        value_features: M, the value's last size; None = query_features.
        key_features: C, the key's last size; None = value_features.
        rngs: `nnx.Rngs`; its stream "params" initializes, and "dropout" is forked with dropout > 0.
        lora: a `flax_mha.Lora`, adapters as `nnx.LoRAParam`s, which train alone.
        partition_rules: as the `rules` of `flax_mha.param_specs`; they become the `nnx.Param`s'
            metadata. Without a mesh, and by `from_params`, no array is placed.

    A call takes what `help(flax_mha.multi_head_attention)` lists, with `training` and `rngs` in
    place of `config` and `dropout_key`.

    Memory: as `multi_head_attention`. Guide: `python -m flax_mha guide in_flax`.

    Differs from Keras: (1) sizes are arguments, for nnx makes parameters at once; (2) a new layer
    is in evaluation mode. Differs from flax.nnx.MultiHeadAttention: (1) dropout with neither mode
    nor `training` is off, not an error; (2) the order of a call is query, value, key.

    Example:
        >>> import jax, flax_mha
        >>> from flax import nnx
        >>> from flax_mha.nnx import MultiHeadAttention
        >>> layer = MultiHeadAttention(2, 16, dropout=0.1, query_features=32, rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (4, 8, 32))
        >>> layer(x, x, training=True).shape
        (4, 8, 32)
        >>> layer.query.kernel.shape, layer.params["query"]["kernel"].shape
        ((32, 2, 16), (32, 2, 16))
        >>> again = MultiHeadAttention.from_params(layer.params, layer.config)
        >>> bool((again(x, x) == layer(x, x)).all())
        True
        >>> other = MultiHeadAttention.from_config(
        ...     layer.config, query_features=32, rngs=nnx.Rngs(1)
        ... )
        >>> other.set_params(layer.params)
        >>> layer.forward(x, x).attention_scores is None, float(layer.regularization_loss())
        (True, 0.0)
        >>> adapted = MultiHeadAttention.from_config(
        ...     layer.config, query_features=32, lora=flax_mha.Lora(rank=4), rngs=nnx.Rngs(1)
        ... )
        >>> adapted.set_lora_params(jax.tree.map(lambda x: x + 1, adapted.lora_params))
        >>> adapted.lora_params["query"]["a"].shape
        (32, 4)
        >>> layer.set_view(deterministic=False)  # what `nnx.view` calls
        >>> layer.deterministic
        False
    """

    @arguments_of(MultiHeadAttentionConfig)
    def __init__(
        self,
        *args: Any,
        query_features: int,
        value_features: int | None = None,
        key_features: int | None = None,
        rngs: nnx.Rngs,
        lora: Lora | None = None,
        partition_rules: Any = None,
        **fields: Any,
    ):
        checks.known_names("A field of MultiHeadAttention", fields, field_names())
        self.config = MultiHeadAttentionConfig(*args, **fields)
        self.deterministic = True
        init_key = stream("params", rngs)()
        sizes = module_sizes(query_features, value_features, key_features)
        for name, shapes in param_shapes(self.config, *sizes).items():
            arrays = init_boxed(init_key, name, shapes, self.config, partition_rules, BOXES)
            setattr(self, name, Projection(arrays))
        self.lora = lora
        self.adapters = nnx.data(self._new_adapters(sizes, rngs))
        self.rngs = nnx.data(self._dropout_stream(rngs))

    @classmethod
    def from_config(
        cls, config: MultiHeadAttentionConfig, **features_and_rngs: Any
    ) -> "MultiHeadAttention":
        """A layer with the fields of `config`; `features_and_rngs` as in the constructor."""
        fields = {name: getattr(config, name) for name in field_names()}
        return cls(**fields, **features_and_rngs)

    @classmethod
    def from_params(
        cls,
        params: ParamsLike,
        config: MultiHeadAttentionConfig,
        *,
        rngs: nnx.Rngs | None = None,
        lora: Lora | None = None,
        lora_params: ParamsLike | None = None,
        partition_rules: Any = None,
    ) -> "MultiHeadAttention":
        """A layer of `config` around `params`; `rngs` serve dropout, `partition_rules` name axes.

        With `lora`, `lora_params` are its adapters.

        Raises:
            ValueError: parameters that do not fit the config; `lora` without its adapters.
        """
        named = {**features_of(params), "partition_rules": partition_rules, "lora": lora}
        layer = nnx.eval_shape(lambda: cls.from_config(config, **named, rngs=nnx.Rngs(params=0)))
        layer.set_params(params)
        if lora is not None or lora_params is not None:
            layer.set_lora_params(lora_params)
        layer.rngs = nnx.data(layer._dropout_stream(rngs))
        return layer

    @property
    def params(self) -> Params:
        """The layer's parameters now, as `multi_head_attention` takes them."""
        return tree_of(self, LETTERS)

    @property
    def lora_params(self) -> Params:
        """The layer's adapters now, as `lora=` of `multi_head_attention`; `{}` without any."""
        return {} if self.adapters is None else tree_of(self.adapters, LETTERS)

    def set_params(self, params: ParamsLike) -> None:
        """Replaces the parameters by `params`, a tree as `layer.params`, quantized or not.

        Raises:
            ValueError: a tree that does not fit the layer, by name.
        """
        now = self.params
        D, M, C = ((size,) for size in features_of(now).values())
        check_params(read_kernels(params), self.config, D, M, C)
        for name, leaves in now.items():
            arrays = jax.tree.map(jnp.asarray, dict(params[name]))
            if is_quantized(arrays) != is_quantized(leaves):
                setattr(self, name, Projection(arrays))
            else:
                nnx.update(getattr(self, name), arrays)

    def set_lora_params(self, lora_params: Any) -> None:
        """Replaces the adapters by `lora_params`, a tree as `layer.lora_params`.

        Raises:
            ValueError: a tree that does not fit the layer and its `lora`, by name and rank.
        """
        check_rule(self.lora, lora_params)
        check_lora(lora_params, self.params)
        nnx.update(self.adapters, jax.tree.map(jnp.asarray, dict(lora_params)))

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
        training: bool | None = None,
        use_causal_mask: bool = False,
        *,
        bias: Array | None = None,
        segment_ids: Array | tuple[Array, Array] | None = None,
        positions: Array | tuple[Array, Array] | None = None,
        cache: KVCache | CrossCache | None = None,
        dropout_start: Any = None,
        rngs: nnx.Rngs | nnx.RngStream | PRNGKey | None = None,
    ) -> Any:
        """See `multi_head_attention`; `training=None` is the mode of `train()` and `eval()`.

        `rngs` is `nnx.Rngs`, of which "dropout" is drawn, a stream or one key; it goes before the
        stream that the layer holds.
        """
        activations = self.forward(
            query,
            value,
            key,
            training=training,
            rngs=rngs,
            use_causal_mask=use_causal_mask,
            return_attention_scores=return_attention_scores,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            bias=bias,
            segment_ids=segment_ids,
            positions=positions,
            cache=cache,
            dropout_start=dropout_start,
        )
        return results(activations, return_attention_scores)

    def forward(
        self,
        query: Array,
        value: Array | None,
        key: Array | None = None,
        *,
        training: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | PRNGKey | None = None,
        **call: Any,
    ) -> Activations:
        """A call with everything it computed, as `flax_mha.forward`: what `activity_loss` needs.

        Args:
            query: as in a call.
            value: as in a call.
            key: as in a call.
            training: whether dropout acts; None = the mode.
            rngs: what dropout draws from; None = the stream that the layer holds.
            **call: any further argument of a call, by name.
        """
        training = not self.deterministic if training is None else training
        training = checks.boolean("training", training)
        return forward(
            self.params,
            query,
            value,
            key,
            config=self.config,
            dropout_key=self._dropout_key(self.config.dropout, rngs) if training else None,
            **self._lora_call(rngs, training),
            **call,
        )

    def regularization_loss(self) -> Array:
        """`flax_mha.regularization_loss` of this layer's parameters: a scalar for the loss."""
        return regularization_loss(self.params, self.config)

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` may change.

        Args:
            deterministic: if True, dropout is off.
        """
        if deterministic is not None:
            self.deterministic = checks.boolean("deterministic", deterministic)

    def _new_adapters(self, sizes: Any, rngs: nnx.Rngs) -> Adapters | None:
        if self.lora is None:
            return None
        checks.instance("lora", self.lora, Lora)
        own: Any = {"rank": self.lora.rank, "which": self.lora.which}
        init_key = stream("params", rngs)()
        return Adapters(lora_params(init_key, self.config, *sizes, **own))

    def _lora_call(self, rngs: Any, training: bool) -> dict[str, Any]:
        """The arguments of `flax_mha.forward` for the adapters."""
        if self.lora is None:
            return {}
        rate = self.lora.dropout
        key = self._dropout_key(rate, rngs) if training else None
        call = {"lora": self.lora_params, "lora_scale": self.lora.scale, "lora_dropout": rate}
        return {**call, "lora_dropout_key": key}

    def _dropout_stream(self, rngs: nnx.Rngs | None) -> nnx.RngStream | None:
        rate = max(self.config.dropout, 0.0 if self.lora is None else self.lora.dropout)
        return dropout_stream(rate, self.config.seed, rngs)

    def _dropout_key(self, rate: float, rngs: Any) -> PRNGKey | None:
        """The next key of the call's `rngs`, or else of the stream that the layer holds."""
        return dropout_key(rate, self.rngs if rngs is None else rngs)
