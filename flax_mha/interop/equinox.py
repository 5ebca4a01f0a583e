"""Equinox's `eqx.nn.MultiheadAttention`, in and out: the config and the weights of one layer.

Equinox itself is not imported: its modules are read by their attributes, and made from another of
their kind.
"""

from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Params, ParamsLike
from flax_mha.interop.layout import PLAIN, Entry, from_table, only, to_table

# Where Equinox keeps each projection, and the axes of its weight and its bias there.
_PLACES = {
    "query": ("query_proj", "(N H) D", "(N H)"),
    "key": ("key_proj", "(K H) C", "(K H)"),
    "value": ("value_proj", "(K V) M", "(K V)"),
    "attention_output": ("output_proj", "E (N V)", "E"),
}


def from_equinox(module: Any) -> tuple[MultiHeadAttentionConfig, Params]:
    """The config and the parameters of an `equinox.nn.MultiheadAttention`.

    Args:
        module: the layer. Its biases may be there in some projections alone: `use_bias` of the
            config names them. Whether it is in inference mode does not matter: here a key means
            dropout.

    Returns:
        `(config, params)` such that, for one sequence `[T, D]`, `[S, C]`, `[S, M]`,
        `multi_head_attention(params, query, value, key, config=config)` is
        `module(query, key, value)`. The arrays keep their dtypes.

    Raises:
        TypeError: not such a module, or weights that are not arrays of floats.
        ValueError: weights that do not fit it, such as those of several layers stacked; arrays
            that `equinox.nn.MultiheadAttention` does not have, as in a class derived from it.

    Differs from Equinox: (1) the order is query, value, key; (2) any number of batch axes goes
    without vmap; (3) a query that may attend nowhere has context 0, not mean(value).

    Example:
        >>> import pytest
        >>> equinox = pytest.importorskip("equinox")
        >>> import jax
        >>> from flax_mha.interop.equinox import from_equinox
        >>> module = equinox.nn.MultiheadAttention(4, 32, dropout_p=0.1, key=jax.random.key(0))
        >>> config, params = from_equinox(module)
        >>> config.dims, config.dropout, params["query"]["kernel"].shape
        (HeadDims(N=4, K=4, H=8, V=8), 0.1, (32, 4, 8))
    """
    arrays = _arrays(module)
    config = MultiHeadAttentionConfig(
        num_heads=module.num_heads,
        key_dim=module.qk_size,
        value_dim=module.vo_size,
        dropout=_rate(module),
        use_bias=tuple(n for n, (place, *_) in _PLACES.items() if f"{place}.bias" in arrays),
        output_shape=module.output_size,
        param_dtype=str(arrays["query_proj.weight"].dtype),
    )
    return config, from_table(_table(config, arrays), arrays, config)


def to_equinox(params: ParamsLike, config: MultiHeadAttentionConfig, module_like: Any) -> Any:
    """An `equinox.nn.MultiheadAttention` with these parameters, the inverse of `from_equinox`.

    Args:
        params: what `init_params` returns.
        config: the layer. Initializers, regularizers, constraints, `seed`, `precision` and
            `implementation` do not belong to the weights, and stay behind.
        module_like: a module of the wanted sizes and biases; its arrays are replaced, and may be
            `jax.ShapeDtypeStruct`s, as `equinox.filter_eval_shape` makes them.

    Returns:
        A copy of `module_like` whose arrays are these parameters, in their dtypes.

    Raises:
        ValueError: `module_like` has other sizes or another dropout rate, a bias that the config
            lacks, or none for one that is not zero; the config asks for what Equinox does not have
            (a gate, grouped heads, a window, attention axes, a compute dtype, an output of several
            axes).
        TypeError: `module_like` is not such a module.

    Example:
        >>> import pytest
        >>> equinox = pytest.importorskip("equinox")
        >>> import jax
        >>> from flax_mha.interop.equinox import from_equinox, to_equinox
        >>> module = equinox.nn.MultiheadAttention(4, 32, key=jax.random.key(0))
        >>> config, params = from_equinox(module)
        >>> bool(equinox.tree_equal(to_equinox(params, config, module), module))
        True
    """
    checks.instance("config", config, MultiHeadAttentionConfig)
    likes = _arrays(module_like)
    only("equinox", config, {**PLAIN, "dtype": None, "num_kv_heads": config.num_heads})
    _same_layer(config, module_like, likes)
    arrays = to_table(_table(config, likes), params, config)
    for name, like in likes.items():
        if arrays[name].shape != like.shape:
            rule = f"`module_like.{name}` must be {arrays[name].shape}, as the parameters are."
            checks.fail(ValueError, rule, f"shape {tuple(like.shape)}")

    def replaced(path: tuple[Any, ...], leaf: Any) -> Any:
        name = jax.tree_util.keystr(path).removeprefix(".")
        return jnp.array(arrays[name]) if name in arrays else leaf

    return jax.tree_util.tree_map_with_path(replaced, module_like)


def _arrays(module: Any) -> dict[str, Any]:
    """Weights and biases by the names of their attributes: "query_proj.weight"."""
    arrays = {}
    for place, _, _ in _PLACES.values():
        for leaf in ("weight", "bias"):
            array = getattr(getattr(module, place, None), leaf, None)
            if array is not None:
                arrays[f"{place}.{leaf}"] = array
        if not checks.is_array(arrays.get(f"{place}.weight")):
            rule = (
                "The module must be an equinox.nn.MultiheadAttention, with its own Linear layers."
            )
            evidence = f"{type(module).__name__} without an array `{place}.weight`"
            checks.fail(TypeError, rule, evidence)
    _no_others(module, arrays)
    return arrays


def _no_others(module: Any, arrays: dict[str, Any]) -> None:
    """A derived class may hold a norm or a table of its own, and use it."""
    leaves = jax.tree_util.tree_leaves_with_path(module)
    paths = [jax.tree_util.keystr(path) for path, leaf in leaves if checks.is_array(leaf)]
    found = [path.removeprefix(".") for path in paths]
    others = [name for name in found if name not in {*arrays, "dropout.p", "dropout.inference"}]
    if others:
        rule = f"The arrays of the module must be {sorted(arrays)}."
        checks.fail(ValueError, rule, f"{type(module).__name__} that also has {sorted(others)}")


def _rate(module: Any) -> float:
    """Equinox lets the rate be a 0-dimensional array."""
    p = module.dropout.p
    return float(p) if checks.is_array(p) and p.shape == () else p


def _table(config: MultiHeadAttentionConfig, arrays: Any) -> list[Entry]:
    """Every array of the layer; a bias that Equinox's lacks has no name there."""
    table = []
    for projection, (place, weight_axes, bias_axes) in _PLACES.items():
        table.append(Entry((projection, "kernel"), f"{place}.weight", weight_axes))
        if projection in config.biases:
            name = f"{place}.bias"
            table.append(Entry((projection, "bias"), name if name in arrays else None, bias_axes))
    return table


def _same_layer(config: MultiHeadAttentionConfig, module: Any, arrays: Any) -> None:
    """What shapes do not show: 4 heads of 8 have the arrays of 8 heads of 4."""
    N, _, H, V = config.dims
    ours = {"num_heads": N, "qk_size": H, "vo_size": V, "dropout.p": config.dropout}
    sizes = (module.num_heads, module.qk_size, module.vo_size, _rate(module))
    theirs = dict(zip(ours, sizes))
    if ours != theirs:
        checks.fail(ValueError, f"`module_like` must have the config's {ours}.", f"{theirs}")
    biases = [f"{_PLACES[projection][0]}.bias" for projection in config.biases]
    extra = [name for name in arrays if name.endswith("bias") and name not in biases]
    if extra:
        rule = f"`module_like` must have no biases where the config has use_bias={config.use_bias}."
        checks.fail(ValueError, rule, f"{extra}", "Make it with `use_query_bias=False` and so on.")
