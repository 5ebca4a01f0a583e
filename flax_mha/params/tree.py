"""One tree, read two ways: shapes and letters."""

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import boxes, checks, tree_checks
from flax_mha.core.typing import Params, Shape
from flax_mha.norms import Norm
from flax_mha.positions.bias import PositionBias
from flax_mha.positions.scores import letters_of_params, sizes_of_params

# How many leading axes of a kernel are summed over; the others are the outputs.
INPUT_RANK = {
    **{"query": 1, "key": 1, "value": 1, "gate": 1, "attention_output": 2},
    **{"query_latent": 1, "latent": 1, "shared_key": 1},
}
LETTERS = {
    "query": {"kernel": "DNH", "bias": "NH"},
    "key": {"kernel": "CKH", "bias": "KH"},
    "value": {"kernel": "MKV", "bias": "KV"},
    "gate": {"kernel": "DNV", "bias": "NV"},
    "attention_output": {"kernel": "NVE", "bias": "E"},
    # A norm's without the first letter, where all heads share it.
    "query_norm": {"scale": "NH", "bias": "NH"},
    "key_norm": {"scale": "KH", "bias": "KH"},
    "relative_bias": {"embedding": "XN"},
    "sinks": {"logits": "N"},
    "value_norm": {"scale": "KV", "bias": "KV"},
    "query_latent": {"kernel": "DQ", "bias": "Q"},
    "latent": {"kernel": "CL", "bias": "L"},
    "shared_key": {"kernel": "CW", "bias": "W"},
    "query_latent_norm": {"scale": "1Q", "bias": "1Q"},
    "latent_norm": {"scale": "1L", "bias": "1L"},
    "score": {},  # it says them itself: see `letters`
}
# What stands behind a latent.
LATENT_LETTERS = {
    **LETTERS,
    "query": {"kernel": "QNH", "bias": "NH"},
    "key": {"kernel": "LKU"},
    "value": {"kernel": "LKV"},
}


def param_shapes(
    config: MultiHeadAttentionConfig,
    query_shape: Shape,
    value_shape: Shape | None = None,
    key_shape: Shape | None = None,
) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s.

    Args:
        config: the layer.
        query_shape: the query's shape `[..., T, D]`; only D is read.
        value_shape: the value's shape `[..., S, M]`; None = self-attention, query_shape.
        key_shape: the key's shape `[..., S, C]`; None = value_shape.

    Returns:
        `{"query": {"kernel": DNH, "bias": NH}, "key": CKH, "value": MKV, ["gate": DNV,]
        "attention_output": {"kernel": NVE, "bias": E}}`; no `bias` where `use_bias` is False or
        names others. With a norm that has parameters also "query_norm" and "key_norm", or
        "value_norm": `{"scale": H}`, or `NH`; with `RelativeBias` or `GridBias` "relative_bias"
        `{"embedding": XN}`; with `use_sinks` "sinks" `{"logits": N}`; with a `score` that owns
        parameters "score", by its `param_sizes`. With `latent` also "latent"
        `CL`, "shared_key" `CW`, and with a query_rank "query_latent" `DQ`; then query is `QNH`, key
        `LKU`, value `LKV`; the norms are "latent_norm" and "query_latent_norm".

    Raises:
        TypeError: an array in the place of its shape.
        ValueError: with `latent`, keys of other features than the values'.

    Example:
        >>> from flax_mha import MultiHeadAttentionConfig, param_shapes
        >>> shapes = param_shapes(MultiHeadAttentionConfig(num_heads=2, key_dim=16), (8, 32))
        >>> shapes["query"]["kernel"].shape
        (32, 2, 16)
    """
    checks.instance("config", config, MultiHeadAttentionConfig)
    value_shape = query_shape if value_shape is None else value_shape
    key_shape = value_shape if key_shape is None else key_shape
    shapes = {"query_shape": query_shape, "value_shape": value_shape, "key_shape": key_shape}
    D, M, C = (tree_checks.features(name, shape) for name, shape in shapes.items())
    N, _, _, V = config.dims
    kernels = _kernels_of_heads(config, D, C, M)
    if config.use_gate:
        kernels["gate"] = (D, N, V)
    kernels["attention_output"] = (N, V, *(config.output_shape or (D,)))
    projections = {name: _projection(name, shape, config) for name, shape in kernels.items()}
    return {**projections, **_extras(config)}


def _kernels_of_heads(config: MultiHeadAttentionConfig, D: int, C: int, M: int) -> dict[str, Shape]:
    (N, K, H, V), latent = config.dims, config.latent
    if latent is None:
        return {"query": (D, N, H), "key": (C, K, H), "value": (M, K, V)}
    if C != M:
        rule = "A latent layer makes keys and values of one array: their features must agree."
        checks.fail(ValueError, rule, f"{C} features of the key, {M} of the value")
    L, Q, W = latent.rank, latent.query_rank, latent.shared_dim
    sources = {"latent": (C, L), "shared_key": (C, W), "key": (L, K, H - W), "value": (L, K, V)}
    if Q is None:
        return {"query": (D, N, H), **sources}
    return {"query_latent": (D, Q), "query": (Q, N, H), **sources}


def sizes_of(config: MultiHeadAttentionConfig) -> dict[str, int]:
    """The sizes that a config tells, by their letters."""
    sizes, latent = dict(config.dims._asdict()), config.latent
    if latent is None:
        return sizes
    sizes |= {"L": latent.rank, "W": latent.shared_dim, "U": sizes["H"] - latent.shared_dim}
    return sizes if latent.query_rank is None else {**sizes, "Q": latent.query_rank}


def module_sizes(D: int, M: int | None, C: int | None) -> list[tuple[int]]:
    """The features of query, value and key as shapes; those not given follow as in a call."""
    M = D if M is None else M
    features = {"query_features": D, "value_features": M, "key_features": M if C is None else C}
    return [(checks.integer(name, size, minimum=1),) for name, size in features.items()]


def features_of(params: Any) -> dict[str, int]:
    """The features of a tree; 1 for a kernel that it lacks, which `check_params` then names."""
    firsts = {"query": ("query_latent", "query"), "value": ("latent", "value")}
    firsts["key"] = ("latent", "key")
    kernels = {name: _kernel(params, firsts[name]) for name in firsts}
    return {f"{name}_features": (getattr(x, "shape", ()) or (1,))[0] for name, x in kernels.items()}


def _kernel(params: Any, names: tuple[str, ...]) -> Any:
    """The first kernel of that name; of a quantized one its values."""
    tree = params if isinstance(params, Mapping) else {}
    parts = (tree[name] for name in names if isinstance(tree.get(name), Mapping))
    kernel = boxes.content(next((leaves["kernel"] for leaves in parts if "kernel" in leaves), None))
    return kernel.get("value") if isinstance(kernel, Mapping) else kernel


def places(config: MultiHeadAttentionConfig) -> set[tuple[str, str]]:
    """(name, leaf) of every array of the tree."""
    extras = {(name, leaf) for name, leaves in _extras(config).items() for leaf in leaves}
    kernels = {(name, "kernel") for name in config.projections}
    return kernels | {(name, "bias") for name in config.biases} | extras


def letters(config: MultiHeadAttentionConfig) -> dict[str, dict[str, str]]:
    """The letters of a layer's arrays, by their names."""
    table, latent = (LETTERS if config.latent is None else LATENT_LETTERS), config.latent
    if latent is not None and latent.query_rank is None:
        table = {**table, "query": LETTERS["query"]}
    return {**table, "score": letters_of_params(config.score, config.num_heads)}


def letters_of(name: str, leaf: str, rank: int, table: Any = LETTERS) -> str:
    """The letters of an array, one an axis: an `output_shape` of several axes repeats its E."""
    letters = table[name][leaf]
    return letters[max(len(letters) - rank, 0) :] + letters[-1:] * (rank - len(letters))


def _extras(config: MultiHeadAttentionConfig) -> dict[str, Any]:
    """What only some layers have: norms, a table of distances, sinks, a score's own."""
    N, K, H, V = config.dims
    leaf = functools.partial(jax.ShapeDtypeStruct, dtype=config.param_dtype)
    sizes = {"query_norm": (N, H), "key_norm": (K, H), "value_norm": (K, V)}
    if config.latent is not None:
        sizes |= {"query_latent_norm": (1, config.latent.query_rank or 0)}
        sizes |= {"latent_norm": (1, config.latent.rank)}
    shapes = {name: _of_norm(norm, sizes[name]) for name, norm in config.norms.items()}
    extras: dict[str, Any] = {
        name: {key: leaf(shape) for key, shape in leaves.items()}
        for name, leaves in shapes.items()
        if leaves
    }
    if isinstance(config.position, PositionBias) and config.position.table_size is not None:
        extras["relative_bias"] = {"embedding": leaf((config.position.table_size, N))}
    if config.use_sinks:
        extras["sinks"] = {"logits": leaf((N,))}
    if own := sizes_of_params(config.score, N):
        extras["score"] = {name: leaf(tuple(axes.values())) for name, axes in own.items()}
    return extras


def _of_norm(norm: Norm, sizes: tuple[int, int]) -> dict[str, Shape]:
    """The shapes of a norm's parameters, whose axes must have letters."""
    shapes = norm.shapes(*sizes)
    for leaf, shape in shapes.items():
        if leaf not in ("scale", "bias") or tuple(shape) not in (sizes, sizes[1:]):
            rule = "A norm's parameters are `scale` and `bias`, [features] or [heads, features]."
            evidence = f"{leaf!r} of shape {shape} of {norm}, heads and features {sizes}"
            checks.fail(ValueError, rule, evidence)
    return shapes


def _projection(name: str, kernel: Shape, config: MultiHeadAttentionConfig) -> Any:
    shapes = {"kernel": kernel, "bias": kernel[INPUT_RANK[name] :]}
    if name not in config.biases:
        del shapes["bias"]
    return {leaf: jax.ShapeDtypeStruct(shape, config.param_dtype) for leaf, shape in shapes.items()}


def check_params(params: Any, config: MultiHeadAttentionConfig, *shapes: Shape) -> None:
    """Refuses parameters that do not fit the config and the inputs' shapes, by name and letters."""
    expected = cast(Mapping[str, Any], param_shapes(config, *shapes))
    tree_checks.params_tree(params, expected, letters(config))
