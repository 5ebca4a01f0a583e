"""Low-rank adapters of a layer's kernels, in a tree of their own: W + scale a b.

    {"query": {"a": [D, r], "b": [r, N, H]}, "value": {"a": [M, r], "b": [r, K, V]}}

a reads the axes that the kernel is summed over, b writes the others, one rank for all heads. A tree
of adapters has gradients, an optimizer and a file of its own, and the layer's parameters stay.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.config.lora import Lora, names_of
from flax_mha.core import boxes, checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array, Params, ParamsLike, PRNGKey, Shape
from flax_mha.keras.initializers import HeUniform
from flax_mha.params.tree import INPUT_RANK, LETTERS, param_shapes

LEAVES = ("a", "b")


def lora_params(
    init_key: PRNGKey,
    config: MultiHeadAttentionConfig,
    query_shape: Shape,
    value_shape: Shape | None = None,
    key_shape: Shape | None = None,
    *,
    rank: int = 8,
    which: Iterable[str] = ("query", "value"),
) -> Params:
    """Adapters that change nothing yet: a He-uniform, b zeros.

    Args:
        init_key: one PRNG key; each a depends on it and on its projection's name alone.
        config: the layer.
        query_shape: as in `param_shapes`.
        value_shape: as in `param_shapes`.
        key_shape: as in `param_shapes`.
        rank: r, how many numbers stand between input and output.
        which: the projections that get one, names of the parameter tree: "query", "key", "value",
            "attention_output", "gate", and those of a latent layer.

    Returns:
        `{name: {"a": [*inputs, r], "b": [r, *outputs]}}` in the config's `param_dtype`: for "query"
        `[D, r]` and `[r, N, H]`, for "attention_output" `[N, V, r]` and `[r, *E]`.

    Raises:
        ValueError: a name that the layer lacks; a rank below 1, or above the kernel's own.
        TypeError: `init_key` is not a PRNG key.

    Memory: r (inputs + outputs) numbers a projection.

    Guide: `python -m flax_mha guide lora`.

    Reference: Hu et al., "LoRA", https://arxiv.org/abs/2106.09685.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> x = jax.random.normal(jax.random.key(0), (4, 8, 32))
        >>> params = flax_mha.init_params(jax.random.key(1), config, x.shape)
        >>> lora = flax_mha.lora_params(jax.random.key(2), config, x.shape, rank=4)
        >>> {name: lora["query"][name].shape for name in "ab"}
        {'a': (32, 4), 'b': (4, 2, 16)}
        >>> adapted = flax_mha.multi_head_attention(params, x, x, config=config, lora=lora)
        >>> bool((adapted == flax_mha.multi_head_attention(params, x, x, config=config)).all())
        True
    """
    checks.prng_key("init_key", init_key)
    shapes = param_shapes(config, query_shape, value_shape, key_shape)
    checks.x64_enabled("param_dtype", config.param_dtype)
    rank, names = checks.integer("rank", rank), _names("which", which, config.projections)
    kernels = {name: shapes[name]["kernel"] for name in names}
    for name, kernel in kernels.items():
        _check_rank(name, rank, kernel.shape)
    return {name: _pair(init_key, name, x, rank) for name, x in kernels.items()}


def merge_lora(params: ParamsLike, lora: ParamsLike, lora_scale: Any = 1.0) -> Params:
    """The layer's parameters with the adapters in them: kernel + lora_scale a b.

    Args:
        params: the layer's parameters.
        lora: the adapters, a tree as `lora_params` returns.
        lora_scale: a number; where adapters are named by alpha and rank, alpha / rank.

    Returns:
        A tree as `params`, each kernel in its own dtype; the sum is one of float32 at least.

    Raises:
        ValueError: adapters that do not fit the parameters, by name; a scale that is not finite.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> params = flax_mha.init_params(jax.random.key(0), config, (8, 32))
        >>> lora = flax_mha.lora_params(jax.random.key(1), config, (8, 32), which=["key"])
        >>> merged = flax_mha.merge_lora(params, jax.tree.map(jax.numpy.ones_like, lora), 0.5)
        >>> float(abs(merged["key"]["kernel"] - params["key"]["kernel"]).max().round())
        4.0
    """
    checks.mapping("params", params)
    boxes.refuse(params, "params")
    checks.floating_params(params)
    check_lora(lora, params)
    check_scale(lora_scale)
    pairs = {name: [_wide(adapter[leaf]) for leaf in LEAVES] for name, adapter in lora.items()}
    added = {name: lora_scale * jnp.tensordot(a, b, 1) for name, (a, b) in pairs.items()}
    return {name: _with(leaves, added.get(name)) for name, leaves in params.items()}


def split_lora(tuned: ParamsLike, params: ParamsLike, *, rank: int = 8) -> Params:
    """The adapters that come nearest to what training has changed: `merge_lora`'s way back.

    Args:
        tuned: parameters that were trained from `params`, or merged.
        params: what they were before.
        rank: r; where a kernel has changed by no more than this rank, its adapter is exact.

    Returns:
        Adapters of scale 1, for the projections whose kernel has changed: by the singular values,
        the nearest of this rank in the sum of squares. Biases and norms that have changed are not
        in it.

    Raises:
        ValueError: trees of two layers, or equal kernels throughout; a rank below 1.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> params = flax_mha.init_params(jax.random.key(0), config, (8, 32))
        >>> lora = flax_mha.lora_params(jax.random.key(1), config, (8, 32), rank=4, which=["key"])
        >>> merged = flax_mha.merge_lora(params, jax.tree.map(jax.numpy.ones_like, lora))
        >>> again = flax_mha.split_lora(merged, params, rank=4)
        >>> list(again), again["key"]["b"].shape
        (['key'], (4, 2, 16))
    """
    for name, tree in (("tuned", tuned), ("params", params)):
        checks.mapping(name, tree)
        boxes.refuse(tree, name)
        checks.floating_params(tree, name)
    sizes, others = (jax.tree.map(lambda x: tuple(x.shape), dict(x)) for x in (tuned, params))
    if sizes != others:
        rule = "`tuned` and `params` must be trees of one layer."
        checks.fail(ValueError, rule, f"shapes {sizes} and {others}")
    rank = checks.integer("rank", rank, minimum=1)
    kernels = {name: leaves["kernel"] for name, leaves in params.items() if "kernel" in leaves}
    changes = {name: _wide(tuned[name]["kernel"]) - _wide(x) for name, x in kernels.items()}
    changed = {name: x for name, x in changes.items() if bool(x.any())}
    if not changed:
        rule = "`split_lora` is of what has changed, and all kernels are equal."
        checks.fail(ValueError, rule, f"the kernels of {', '.join(kernels)}")
    return {name: _nearest(name, x, rank) for name, x in changed.items()}


def check_lora(lora: Any, params: ParamsLike) -> None:
    """Refuses adapters that do not fit the parameters, by name and letters."""
    if not isinstance(lora, Mapping):
        rule = "`lora` must be {projection: {'a': ..., 'b': ...}}."
        checks.fail(TypeError, rule, type(lora).__name__, "Make it by `lora_params`.")
    boxes.refuse(lora, "lora")
    checks.floating_params(lora, "lora")
    _names("lora", lora, [name for name, leaves in params.items() if "kernel" in leaves])
    for name, adapter in lora.items():
        _check_adapter(name, adapter, tuple(params[name]["kernel"].shape))


def check_rule(rule: Lora | None, tree: Any) -> None:
    """A module's adapters are those of its `lora`, and no others; its rank is in their scale."""
    names, rank = ((), None) if rule is None else (rule.which, rule.rank)
    if not isinstance(tree, Mapping) or set(tree) != set(names):
        said = f"A layer's adapters must be those of its `lora`, {list(names)}."
        given = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
        remedy = "Set `lora=flax_mha.Lora(...)` to them, or put them in by `merge_lora`."
        checks.fail(ValueError, said, f"{given}", remedy)
    ranks = {name: tuple(x["a"].shape[-1:]) for name, x in tree.items() if "a" in x}
    if other := {name: found for name, found in ranks.items() if found != (rank,)}:
        said = f"A layer's adapters must have the rank of its `lora`, {rank}: alpha / rank is the "
        said += "scale."
        checks.fail(ValueError, said, ", ".join(f"{n} of rank {x[-1:]}" for n, x in other.items()))


def check_scale(lora_scale: Any) -> None:
    """One number, and a finite one as far as that can be seen."""
    is_number = isinstance(lora_scale, float | int) or checks.is_array(lora_scale)
    dtype = getattr(lora_scale, "dtype", np.dtype("float32"))
    is_real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))
    if not is_number or not is_real:
        rule, evidence = "`lora_scale` must be one number.", f"type {type(lora_scale).__name__}"
        checks.fail(TypeError, rule, evidence)
    if np.shape(lora_scale):
        rule, evidence = "`lora_scale` must be one number.", f"shape {np.shape(lora_scale)}"
        remedy = "Many adapters, each with a scale, are `jax.vmap`'s."
        checks.fail(ValueError, rule, evidence, remedy)
    if isinstance(lora_scale, int) and not isinstance(lora_scale, bool):
        checks.finite("lora_scale", lora_scale)
    elif not isinstance(lora_scale, jax.core.Tracer) and not np.isfinite(lora_scale):
        checks.fail(ValueError, "`lora_scale` must be a finite number.", f"{lora_scale}")


def _check_adapter(name: str, adapter: Any, kernel: Shape) -> None:
    where, inputs = f"lora[{name!r}]", INPUT_RANK[name]
    if not isinstance(adapter, Mapping) or set(adapter) != set(LEAVES):
        received = sorted(adapter) if isinstance(adapter, Mapping) else type(adapter).__name__
        checks.fail(ValueError, f"`{where}` must hold a and b.", f"{received}")
    a, b = (tuple(adapter[leaf].shape) for leaf in LEAVES)
    rank = a[-1] if a else 0
    if (a[:-1], b) != (kernel[:inputs], (rank, *kernel[inputs:])):
        spelled = LETTERS[name]["kernel"]
        rule = f"`{where}` must be a [{', '.join(spelled[:inputs])}, r] and b [r, "
        rule += f"{', '.join(spelled[inputs:])}] of a kernel {kernel}."
        remedy = "Is it of another model, or stacked? Of many, `jax.vmap` takes one."
        checks.fail(ValueError, rule, f"a of shape {a}, b of shape {b}", remedy)
    _check_rank(name, rank, kernel)


def _check_rank(name: str, rank: int, kernel: Shape) -> None:
    most = min(_sides(name, kernel))
    if not 1 <= rank <= most:
        rule = f"The rank of an adapter of {name!r} must be in [1, {most}]: a kernel {kernel} has "
        checks.fail(ValueError, f"{rule}no more.", f"rank {rank}")


def _sides(name: str, kernel: Shape) -> tuple[int, int]:
    """How many inputs and outputs a kernel has."""
    inputs = INPUT_RANK[name]
    return math.prod(kernel[:inputs]), math.prod(kernel[inputs:])


def _names(name: str, which: Any, known: Iterable[str]) -> tuple[str, ...]:
    names, known = names_of(name, which), list(known)
    if unknown := [name for name in names if name not in known]:
        rule = f"`{name}`: adapters are of this layer's projections, {', '.join(known)}."
        checks.fail(ValueError, rule, f"{unknown}")
    return names


def _pair(init_key: PRNGKey, name: str, kernel: Any, rank: int) -> dict[str, Array]:
    inputs, dtype = INPUT_RANK[name], kernel.dtype
    key = jax.random.fold_in(init_key, list(LETTERS).index(name))
    fans = (_sides(name, kernel.shape)[0], rank)
    a = HeUniform()(key, (*kernel.shape[:inputs], rank), dtype, fans=fans)
    return {"a": a, "b": jnp.zeros((rank, *kernel.shape[inputs:]), dtype)}


def _with(leaves: Mapping[str, Array], added: Array | None) -> dict[str, Array]:
    if added is None:
        return dict(leaves)
    kernel = leaves["kernel"]
    return {**leaves, "kernel": (_wide(kernel) + added).astype(kernel.dtype)}


def _wide(x: Any) -> Array:
    return jnp.asarray(x).astype(wide_dtype(x.dtype))


def _nearest(name: str, change: Array, rank: int) -> dict[str, Array]:
    """The best product of this rank, its singular values shared by both."""
    (F, G), inputs = _sides(name, change.shape), INPUT_RANK[name]
    _check_rank(name, rank, change.shape)
    left_Fr, values_r, right_rG = jnp.linalg.svd(change.reshape(F, G), full_matrices=False)
    root_r = jnp.sqrt(values_r[:rank])
    return {
        "a": (left_Fr[:, :rank] * root_r[None]).reshape(*change.shape[:inputs], rank),
        "b": (root_r[:, None] * right_rG[:rank]).reshape(rank, *change.shape[inputs:]),
    }
