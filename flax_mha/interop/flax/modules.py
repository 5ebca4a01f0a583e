"""Flax's own attention modules as a config and parameters: each attribute honoured or refused.

Modules are read by their attributes, of whichever version of flax.
"""

import inspect
from typing import Any

import jax

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Array, Params, ParamsLike
from flax_mha.interop.flax.attention import attention_fn
from flax_mha.interop.flax.weights import NORM, NORMS, PROJECTIONS, flat, from_flax_params

# Functions that a flax module can be told to call instead of its own.
_FUNCTIONS = (
    "qkv_dot_general",
    "out_dot_general",
    "qkv_dot_general_cls",
    "out_dot_general_cls",
    "qk_attn_weights_einsum_cls",
    "attn_weights_value_einsum_cls",
    "qkv_promote_dtype",
    "out_promote_dtype",
    "attention_fn",
)
_LINEN = ("num_heads", "qkv_features", "out_features", "force_fp32_for_softmax")
_NNX = ("num_heads", "head_dim", "in_features", "out_features", "query", "key", "value", "out")


def from_linen_module(module: Any, params: ParamsLike) -> tuple[MultiHeadAttentionConfig, Params]:
    """The config and the parameters of a flax.linen attention layer.

    Args:
        module: a `MultiHeadDotProductAttention`, `MultiHeadAttention` or `SelfAttention`. Its
            `deterministic` and `decode` do not matter: here a key means dropout, and decoding has
            functions of its own. Its initializers stay behind.
        params: its `variables["params"]`.

    Returns:
        `(config, params)` such that `multi_head_attention(params, query, value, key,
        config=config)` is `module.apply(variables, query, key, value)`; boolean masks `[N, T, S]`
        go as they are.

    Raises:
        TypeError: another kind of module.
        ValueError: parameters that do not fit it.
        NotImplementedError: what cannot be honoured, by its name: functions of its
            own (an `attention_fn` other than flax's and this package's), dropout equal for all
            examples and heads (`broadcast_dropout=True`), `force_fp32_for_softmax` in a layer of
            16 bits throughout.

    Differs from flax: as `from_flax_params`; and the softmax is in float32 at least.

    Example:
        >>> import jax
        >>> from flax import linen as nn
        >>> from flax_mha.interop.flax import from_linen_module
        >>> layer = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=32, out_features=8)
        >>> variables = layer.init(jax.random.key(0), jax.numpy.ones((4, 8, 24)))
        >>> config, params = from_linen_module(layer, variables["params"])
        >>> config.dims, config.output_shape
        (HeadDims(N=2, K=2, H=16, V=16), (8,))
    """
    _is_layer(module, _LINEN, "a flax.linen MultiHeadDotProductAttention")
    _refuse_unlike(module)
    arrays = dict(flat(params))
    features = module.qkv_features or _query_kernel(arrays).shape[0]
    config = _config(module, arrays, features // module.num_heads, None)
    narrow = config.dtype is None and config.param_dtype in ("float16", "bfloat16")
    if module.force_fp32_for_softmax and narrow:
        rule = "`force_fp32_for_softmax=True` would make float32 of a 16-bit layer's output."
        remedy = "Set it to False: here the softmax is in float32 in any case."
        checks.fail(NotImplementedError, rule, f"param_dtype={config.param_dtype}", remedy)
    return config, from_flax_params(params, config)


def from_nnx_module(module: Any) -> tuple[MultiHeadAttentionConfig, Params]:
    """The config and the parameters of an `nnx.MultiHeadAttention`.

    Args:
        module: the layer, as in `from_linen_module`; its heads may be grouped (`num_kv_heads`).

    Returns:
        `(config, params)` such that `multi_head_attention(params, query, value, key,
        config=config)` is `module(query, key, value)`.

    Raises:
        TypeError: another kind of module, or one whose Linears were replaced (by adapters).
        ValueError: parameters that do not fit it, such as those of several layers stacked, or that
            flax's layer does not have, as in a class derived from it.
        NotImplementedError: as `from_linen_module`.

    Differs from flax: as `from_linen_module`.

    Example:
        >>> from flax import nnx
        >>> from flax_mha.interop.flax import from_nnx_module
        >>> layer = nnx.MultiHeadAttention(2, 24, 32, decode=False, rngs=nnx.Rngs(0))
        >>> config, params = from_nnx_module(layer)
        >>> config.dims, params["attention_output"]["kernel"].shape
        (HeadDims(N=2, K=2, H=16, V=16), (2, 16, 24))
    """
    _is_layer(module, _NNX, "an nnx.MultiHeadAttention")
    _refuse_unlike(module)
    params = {place: _linear(module, place) for place, _, _ in PROJECTIONS.values()}
    if module.normalize_qk:
        params |= {place: {"scale": getattr(module, place).scale[...]} for place in NORMS.values()}
    _no_others(module, params)
    kv_heads = getattr(module, "num_kv_heads", module.num_heads)  # flax before 0.12 has no groups
    kv_heads = None if kv_heads == module.num_heads else kv_heads
    config = _config(module, dict(flat(params)), module.head_dim, kv_heads)
    return config, from_flax_params(params, config)


def _is_layer(module: Any, attributes: tuple[str, ...], what: str) -> None:
    if not all(hasattr(module, name) for name in attributes):
        checks.fail(TypeError, f"`module` must be {what}.", f"{type(module).__name__}")


def _refuse_unlike(module: Any) -> None:
    """What changes the numbers of flax's module and has no counterpart here."""
    for name in _FUNCTIONS:
        function = getattr(module, name, None)
        if function is not None and function not in (_default(module, name), attention_fn):
            rule = f"`{name}` of the module cannot be honoured: it must be flax's default."
            remedy = "`from_flax_params` takes the weights alone, with a config of your own."
            checks.fail(NotImplementedError, rule, f"{name}={function!r}", remedy)
    if module.broadcast_dropout and module.dropout_rate > 0:
        rule = "Dropout that is equal for all examples and heads cannot be honoured here."
        evidence = f"dropout_rate={module.dropout_rate}, broadcast_dropout=True"
        remedy = "Read a module with `broadcast_dropout=False`; True is flax's default."
        checks.fail(NotImplementedError, rule, evidence, remedy)


def _default(module: Any, name: str) -> Any:
    """What the constructor that names this argument takes in its absence."""
    classes: tuple[Any, ...] = type(module).__mro__
    for cls in classes:
        parameters = inspect.signature(cls.__init__).parameters
        if name in parameters:
            return parameters[name].default
    return None


def _config(
    module: Any, arrays: dict[str, Any], head_dim: int, kv_heads: int | None
) -> MultiHeadAttentionConfig:
    return MultiHeadAttentionConfig(
        num_heads=module.num_heads,
        key_dim=head_dim,
        dropout=module.dropout_rate,
        use_bias=module.use_bias,
        output_shape=module.out_features,
        num_kv_heads=kv_heads,
        qk_norm=NORM if module.normalize_qk else None,
        dtype=module.dtype,
        param_dtype=_query_kernel(arrays).dtype,
        precision=module.precision,
    )


def _query_kernel(arrays: dict[str, Any]) -> Array:
    kernel: Any = arrays.get("query.kernel")
    if not checks.is_array(kernel) or len(kernel.shape) != 3:
        rule = "`query.kernel` must be an array [D, N, H]."
        evidence = f"arrays {sorted(arrays)}, shape {getattr(kernel, 'shape', None)}"
        checks.fail(ValueError, rule, evidence, "Layers that were stacked: one at a time.")
    return kernel


def _no_others(module: Any, params: Any) -> None:
    """A derived class may hold a norm or a table of its own, and use it."""
    from flax import nnx  # here: who has such a module has imported it

    ours, all_params = (
        {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    )
    if all_params - ours:
        rule = f"The parameters of the module must be {sorted(ours)}."
        evidence = f"{type(module).__name__} that also has {sorted(all_params - ours)}"
        remedy = "`from_flax_params` takes the weights alone, with a config of your own."
        checks.fail(ValueError, rule, evidence, remedy)


def _linear(module: Any, place: str) -> dict[str, Array]:
    linear = getattr(module, place)
    if type(linear).__name__ != "LinearGeneral":
        rule = "The module must be an nnx.MultiHeadAttention with its own LinearGeneral layers."
        checks.fail(TypeError, rule, f"`{place}` is a {type(linear).__name__}")
    leaves = {"kernel": linear.kernel, "bias": linear.bias}
    return {leaf: variable[...] for leaf, variable in leaves.items() if variable is not None}
