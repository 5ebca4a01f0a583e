"""The flax.nnx module: `nnx.Param`s, rng streams and modes around the pure function."""

import contextlib
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mha.config.config import MultiHeadAttentionConfig, field_names
from flax_mha.core import checks
from flax_mha.core.signatures import arguments_of
from flax_mha.core.typing import Array, Params, ParamsLike, PRNGKey
from flax_mha.functional import forward, results
from flax_mha.layer import Activations, CrossCache, KVCache
from flax_mha.masks import Mask
from flax_mha.params import LETTERS, check_params, features_of, module_sizes, param_shapes
from flax_mha.sharding.initial import Boxes, init_boxed, places_nowhere
from flax_mha.training import regularization_loss


def _metadata(array: Array, names: Any) -> nnx.VariableMetadata[Any]:
    """The names under the key of the installed Flax; without "mesh", which it would not look up."""
    made: Any = nnx.with_partitioning(lambda: array, names)()
    named = {key: value for key, value in made.metadata.items() if key != "mesh"}
    return nnx.VariableMetadata(array, metadata=named)


def _placing(value: Any) -> Any:
    """Without a mesh names are kept, and nothing is placed; flax before 0.12 never places."""
    eager = getattr(nnx, "use_eager_sharding", None)
    return eager(False) if eager and places_nowhere(value) else contextlib.nullcontext()


BOXES = Boxes("flax.nnx", _metadata)


class Projection(nnx.Module):
    """One linear map's parameters: `kernel`, and `bias` where it has one, as `nnx.Param`s."""

    def __init__(self, arrays: ParamsLike):
        for leaf, array in arrays.items():
            with _placing(array):
                setattr(self, leaf, nnx.Param(array))


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
        partition_rules: as the `rules` of `flax_mha.param_specs`; they become the `nnx.Param`s'
            metadata. Without a mesh, and by `from_params`, no array is placed.

    A call takes what `help(flax_mha.multi_head_attention)` lists, with `training` and `rngs` in
    place of `config` and `dropout_key`.

    Memory: as `multi_head_attention`. Guide: `python -m flax_mha guide in_flax`.

    Differs from Keras: (1) sizes are arguments, for nnx makes parameters at once; (2) a new layer
    is in evaluation mode. Differs from flax.nnx.MultiHeadAttention: (1) dropout with neither mode
    nor `training` is off, not an error; (2) the order of a call is query, value, key.

    Example:
        >>> import jax
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
        partition_rules: Any = None,
        **fields: Any,
    ):
        checks.known_names("A field of MultiHeadAttention", fields, field_names())
        self.config = MultiHeadAttentionConfig(*args, **fields)
        self.deterministic = True
        init_key = _stream("params", rngs)()
        sizes = module_sizes(query_features, value_features, key_features)
        for name, shapes in cast(ParamsLike, param_shapes(self.config, *sizes)).items():
            arrays = init_boxed(init_key, name, shapes, self.config, partition_rules, BOXES)
            setattr(self, name, Projection(arrays))
        self.rngs = nnx.data(_dropout_stream(self.config, rngs))

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
        partition_rules: Any = None,
    ) -> "MultiHeadAttention":
        """A layer of `config` around `params`; `rngs` serve dropout, `partition_rules` name axes.

        Raises:
            ValueError: parameters that do not fit the config.
        """
        named = {**features_of(params), "partition_rules": partition_rules}
        layer = nnx.eval_shape(lambda: cls.from_config(config, **named, rngs=nnx.Rngs(params=0)))
        layer.set_params(params)
        layer.rngs = nnx.data(_dropout_stream(config, rngs))
        return layer

    @property
    def params(self) -> Params:
        """The layer's parameters now, as `multi_head_attention` takes them."""
        names = [name for name in LETTERS if hasattr(self, name)]
        params = {name: nnx.to_pure_dict(nnx.state(getattr(self, name))) for name in names}
        return cast(Params, params)

    def set_params(self, params: ParamsLike) -> None:
        """Replaces the parameters by `params`, a tree as `layer.params`.

        Raises:
            ValueError: a tree that does not fit the layer, by name.
        """
        now = cast(ParamsLike, self.params)
        D, M, C = ((size,) for size in features_of(now).values())
        check_params(params, self.config, D, M, C)
        nnx.update(self, {name: jax.tree.map(jnp.asarray, dict(params[name])) for name in now})

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
            cast(ParamsLike, self.params),
            query,
            value,
            key,
            config=self.config,
            dropout_key=self._dropout_key(rngs) if training else None,
            **call,
        )

    def regularization_loss(self) -> Array:
        """`flax_mha.regularization_loss` of this layer's parameters: a scalar for the loss."""
        return regularization_loss(cast(ParamsLike, self.params), self.config)

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` may change.

        Args:
            deterministic: if True, dropout is off.
        """
        if deterministic is not None:
            self.deterministic = checks.boolean("deterministic", deterministic)

    def _dropout_key(self, rngs: Any) -> PRNGKey | None:
        """The next key of the call's `rngs`, or else of the stream that the layer holds."""
        rngs = self.rngs if rngs is None else rngs
        if self.config.dropout == 0:
            return None
        if rngs is None:
            rule = "Training with dropout > 0 needs a PRNG key."
            remedy = (
                "Pass `rngs=nnx.Rngs(dropout=0)` at construction or in the call, or set `seed`."
            )
            evidence = f"dropout={self.config.dropout}, no `rngs`"
            checks.fail(ValueError, rule, evidence, remedy)
        if isinstance(rngs, jax.Array):
            return rngs
        return rngs() if isinstance(rngs, nnx.RngStream) else _stream("dropout", rngs)()


def _stream(name: str, rngs: Any) -> nnx.RngStream:
    """The named stream, or the default one in its place."""
    streams = _streams(rngs)
    if not {name, "default"} & streams:
        rule = f"`rngs` must have the stream {name!r} or a default one."
        checks.fail(ValueError, rule, f"the streams {sorted(streams)}", "Pass `rngs=nnx.Rngs(0)`.")
    return rngs[name]


def _streams(rngs: Any) -> set[str]:
    if not isinstance(rngs, nnx.Rngs):
        evidence = f"rngs of type {type(rngs).__name__}"
        checks.fail(TypeError, "`rngs` must be an nnx.Rngs.", evidence, "Pass `rngs=nnx.Rngs(0)`.")
    return set(rngs)


def _dropout_stream(
    config: MultiHeadAttentionConfig, rngs: nnx.Rngs | None
) -> nnx.RngStream | None:
    """The stream that a layer holds; none where there is no dropout, or nothing to fork."""
    if config.dropout == 0:
        return None
    if config.seed is not None:
        return nnx.RngStream(config.seed, tag="dropout")
    if rngs is None or not {"dropout", "default"} & _streams(rngs):
        return None
    return _stream("dropout", rngs).fork()
