"""Weights of flax's own attention layers, in and out, for both of flax's APIs.

Flax itself is not imported: parameters are plain mappings of arrays.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Array, Params, ParamsLike
from flax_mha.interop.layout import PLAIN, Entry, from_table, only, to_table
from flax_mha.norms import LayerNorm
from flax_mha.params.tree import places

# Where flax keeps each projection, and the axes of its kernel and its bias there.
PROJECTIONS = {
    "query": ("query", "D N H", "N H"),
    "key": ("key", "C K H", "K H"),
    "value": ("value", "M K V", "K V"),
    "attention_output": ("out", "N V E", "E"),
}
NORMS = {"query_norm": "query_ln", "key_norm": "key_ln"}
NORM = LayerNorm(epsilon=1e-6)  # of each head of queries and keys, where `normalize_qk=True`


def from_flax_params(params: ParamsLike, config: MultiHeadAttentionConfig) -> Params:
    """This package's parameters from those of a flax attention layer.

    Args:
        params: `variables["params"]` of a flax.linen `MultiHeadDotProductAttention`,
            `MultiHeadAttention` or `SelfAttention`, or `nnx.to_pure_dict` of an nnx
            `MultiHeadAttention`'s `nnx.Param`s: "query" DNH, "key" CKH, "value" MKH, "out" NHE;
            with `normalize_qk=True` also "query_ln" and "key_ln".
        config: the layer; `from_linen_module` and `from_nnx_module` make it of flax's module.
            `normalize_qk=True` is `qk_norm=LayerNorm(epsilon=1e-6)`.

    Returns:
        The tree of `init_params`, in the arrays' own dtypes, the same bits.

    Raises:
        TypeError: leaves that are not arrays of floats, such as boxes of metadata.
        ValueError: missing or unknown arrays, or shapes that do not fit the config; layer norms
            and a config with another `qk_norm`.

    Differs from flax: (1) the order of inputs is query, value, key; (2) a query that may attend
    nowhere has context 0, not mean(value).

    Example:
        >>> import jax
        >>> from flax import linen as nn
        >>> from flax_mha import MultiHeadAttentionConfig
        >>> from flax_mha.interop.flax import from_flax_params
        >>> layer = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=32)
        >>> variables = layer.init(jax.random.key(0), jax.numpy.ones((4, 8, 24)))
        >>> config = MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> from_flax_params(variables["params"], config)["attention_output"]["kernel"].shape
        (2, 16, 24)
    """
    checks.instance("config", config, MultiHeadAttentionConfig)
    arrays, wanted = dict(flat(params)), places(config)
    if config.qk_norm != NORM and any(f"{place}.scale" in arrays for place in NORMS.values()):
        rule = "The layer norms of `normalize_qk=True` have one `qk_norm` in the config."
        remedy = f"Set `qk_norm={NORM}`, of flax_mha.norms."
        checks.fail(ValueError, rule, f"qk_norm={config.qk_norm}", remedy)
    table = [entry for entry in _table(config) if entry.place in wanted or entry.name in arrays]
    return from_table(table, arrays, config)


def to_flax_params(
    params: ParamsLike, config: MultiHeadAttentionConfig
) -> dict[str, dict[str, Array]]:
    """The inverse of `from_flax_params` for flax.linen, bit for bit.

    Args:
        params: what `init_params` returns.
        config: the layer. Initializers, regularizers, constraints, `seed`, dtypes, `precision`,
            `dropout` and `implementation` do not belong to the weights, and stay behind.

    Returns:
        `{"query": {"kernel": DNH, "bias": NH}, "key": ..., "value": ..., "out": {"kernel": NHE,
        "bias": E}}`, for a layer of `qkv_features = N H` and `out_features = E`. It has all biases
        or none: one that `use_bias` does not name is zeros, which come back as none.

    Raises:
        ValueError: the config asks for what flax.linen's layer does not have: grouped heads, a
            `value_dim` other than `key_dim`, a gate, norms but for `LayerNorm(epsilon=1e-6)` of
            queries and keys, a position, a window, a cap, sinks, a scale, attention axes, an output
            of several axes.

    Example:
        >>> import jax
        >>> from flax import linen as nn
        >>> from flax_mha import MultiHeadAttentionConfig, init_params
        >>> from flax_mha.interop.flax import to_flax_params
        >>> config = MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> params = init_params(jax.random.key(0), config, (8, 24))
        >>> layer = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=32)
        >>> x = jax.random.normal(jax.random.key(1), (4, 8, 24))
        >>> layer.apply({"params": to_flax_params(params, config)}, x).shape
        (4, 8, 24)
    """
    checks.instance("config", config, MultiHeadAttentionConfig)
    only("flax.linen", config, {**_fixed(config), "num_kv_heads": config.num_heads})
    return _nested(params, config)


def to_nnx_state(
    params: ParamsLike, config: MultiHeadAttentionConfig
) -> dict[str, dict[str, Array]]:
    """The parameters as a pure dict for `nnx.update`, the inverse of `from_nnx_module`.

    Args:
        params: what `init_params` returns.
        config: the layer, as in `to_flax_params`; its heads may be grouped, where the installed
            flax has `num_kv_heads`.

    Returns:
        A dict as of `to_flax_params`, with "key" CKH and "value" MKH.

    Raises:
        ValueError: as `to_flax_params`, but for grouped heads; key and value of different sizes,
            which nnx calls `in_kv_features`.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flax_mha import MultiHeadAttentionConfig, init_params
        >>> from flax_mha.interop.flax import to_nnx_state
        >>> config = MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> params = init_params(jax.random.key(0), config, (8, 24))
        >>> layer = nnx.MultiHeadAttention(2, 24, 32, decode=False, rngs=nnx.Rngs(0))
        >>> nnx.update(layer, to_nnx_state(params, config))
        >>> bool((layer.query.kernel[...] == params["query"]["kernel"]).all())
        True
    """
    checks.instance("config", config, MultiHeadAttentionConfig)
    only("flax.nnx", config, _fixed(config))
    state = _nested(params, config)
    C, M = (state[name]["kernel"].shape[0] for name in ("key", "value"))
    if C != M:
        rule = "flax.nnx's layer has one size of key and value, `in_kv_features`: C = M."
        checks.fail(ValueError, rule, f"C = {C}, M = {M}")
    return state


def _fixed(config: MultiHeadAttentionConfig) -> dict[str, Any]:
    """What both of flax's layers have, by the names of the config's fields."""
    norm = NORM if config.qk_norm == NORM else None
    return {**PLAIN, "qk_norm": norm, "value_dim": config.key_dim}


def _table(config: MultiHeadAttentionConfig) -> list[Entry]:
    # flax's layer has all biases or none: one that the config lacks is a bias of zeros there.
    leaves = ("kernel", "bias") if config.use_bias else ("kernel",)
    table = [
        Entry((projection, leaf), f"{place}.{leaf}", axes)
        for projection, (place, *both) in PROJECTIONS.items()
        for leaf, axes in zip(leaves, both)
    ]
    norms = NORMS if config.qk_norm == NORM else {}
    return table + [Entry((name, "scale"), f"{place}.scale", "H") for name, place in norms.items()]


def flat(params: ParamsLike) -> Iterator[tuple[str, Any]]:
    """Arrays by "query.kernel"."""
    if not isinstance(params, Mapping) or not all(isinstance(p, Mapping) for p in params.values()):
        rule = '`params` must be flax\'s {"query": {"kernel", "bias"}, "key", "value", "out"}.'
        checks.fail(TypeError, rule, f"a {type(params).__name__}")
    if "params" in params:
        rule = "`params` must be the layer's own parameters."
        remedy = "Pass `variables['params']`."
        checks.fail(ValueError, rule, f"collections {sorted(params)}", remedy)
    for place, leaves in params.items():
        for leaf, array in leaves.items():
            if not checks.is_array(array) and not isinstance(array, Mapping):
                remedy = "Boxes of metadata open by `flax.linen.meta.unbox(params)`."
                evidence = f"{type(array).__name__}"
                checks.fail(TypeError, f"`{place}.{leaf}` must be an array.", evidence, remedy)
            yield f"{place}.{leaf}", array


def _nested(params: ParamsLike, config: MultiHeadAttentionConfig) -> dict[str, dict[str, Array]]:
    nested: dict[str, dict[str, Array]] = {}
    for name, array in to_table(_table(config), params, config).items():
        place, leaf = name.split(".")
        nested.setdefault(place, {})[leaf] = jnp.array(array)
    return nested
