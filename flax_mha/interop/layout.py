"""A layout table says where another framework keeps each array of the layer, and how its axes lie.

    Entry(("query", "kernel"), "q_proj.weight", "(N H) D")

spells the framework's axes in the letters of `flax_mha.params.LETTERS`; a bracket is one axis that
merges several. What a framework lacks has no name: it comes in as zeros, and leaves only if it is
zero. A bias that our layer lacks (`use_bias`) comes in only if it is zero, and leaves as zeros. So
`from_table` and `to_table` are exact inverses of each other, bit for bit.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import boxes, checks
from flax_mha.core.typing import Array, Params, ParamsLike, Shape
from flax_mha.params.tree import (
    INPUT_RANK,
    LATENT_LETTERS,
    LETTERS,
    check_params,
    features_of,
    letters_of,
    places,
    sizes_of,
)

Sizes = dict[str, int]


class Entry(NamedTuple):
    """One array: its place in our tree, its name there (None = it has none), its axes there."""

    place: tuple[str, str]
    name: str | None
    axes: str = ""


def from_table(
    table: Sequence[Entry], arrays: Mapping[str, Any], config: MultiHeadAttentionConfig
) -> Params:
    """The parameter tree from another framework's arrays, every one of which must be used."""
    checks.instance("config", config, MultiHeadAttentionConfig)
    _same_names([entry.name for entry in table if entry.name is not None], arrays)
    sizes: Sizes = sizes_of(config)
    params: dict[str, dict[str, Array]] = {}
    wanted = places(config)
    for entry in sorted(table, key=lambda entry: entry.name is None):  # zeros need the sizes
        projection, leaf = entry.place
        if entry.name is None:
            # In the dtype of what was read: float32 zeros would promote a bfloat16 layer.
            dtype = params[projection]["kernel"].dtype
            array = jnp.zeros([sizes[x] for x in LETTERS[projection][leaf]], dtype)
        else:
            array = _incoming(entry, arrays[entry.name], sizes)
        if entry.place not in wanted:
            _absent_is_zero(entry, np.asarray(array))
            continue
        params.setdefault(projection, {})[leaf] = array
    check_params(params, config, *((1, size) for size in features_of(params).values()))
    return params


def to_table(
    table: Sequence[Entry], params: ParamsLike, config: MultiHeadAttentionConfig
) -> dict[str, np.ndarray]:
    """Another framework's arrays from the parameter tree: NumPy arrays under its names."""
    checks.instance("config", config, MultiHeadAttentionConfig)
    checks.mapping("params", params)
    boxes.refuse(params, "params")
    checks.floating_params(params)
    D, M, C = features_of(params).values()
    check_params(params, config, (1, D), (1, M), (1, C))
    without_score(config)
    _all_have_a_place(table, params)
    arrays = {}
    for entry in table:
        projection, leaf = entry.place
        leaves = params[projection]
        array = (
            np.asarray(leaves[leaf]) if leaf in leaves else zero_bias(projection, leaves["kernel"])
        )
        if entry.name is None:
            _is_zero(entry, array)
        else:
            arrays[entry.name] = _outgoing(entry, array)
    return arrays


# Fields that change what a layer computes, and what they are in a layer that knows none of them.
PLAIN = {
    "use_gate": False,
    "attention_axes": None,
    "sliding_window": None,
    "chunk_size": None,
    "latent": None,
    "position": None,
    "qk_norm": None,
    "value_norm": None,
    "clip_qkv": None,
    "scale": None,
    "soft_cap": None,
    "score": None,
    "use_sinks": False,
}


def only(whose: str, config: MultiHeadAttentionConfig, fixed: Mapping[str, Any]) -> None:
    """The config asks for nothing that the layer of `whose` framework does not have."""
    _, K, _, V = config.dims
    resolved = {"num_kv_heads": K, "value_dim": V}
    for name, value in fixed.items():
        asked = resolved.get(name, getattr(config, name))
        if asked != value:
            rule = f"The layer of {whose} has no `{name}`: it must be {value!r} in the config."
            checks.fail(ValueError, rule, f"{name}={asked!r}")
    if len(config.output_shape or ()) > 1:
        rule = f"The layer of {whose} has one output axis: `output_shape` must be an int."
        checks.fail(ValueError, rule, f"output_shape={config.output_shape}")


def without_score(config: MultiHeadAttentionConfig) -> None:
    """A file of another framework has no place for a function: what it says would be lost."""
    if config.score is not None:
        rule = "The layers of other frameworks have no `score`: it must be None in the config."
        checks.fail(ValueError, rule, f"score={config.score!r}", "Keep it here, and train with it.")


def _incoming(entry: Entry, array: Any, sizes: Sizes) -> Array:
    """Split what is merged, then put the axes in our order; learns the sizes not yet known."""
    values = _floating(cast(str, entry.name), np.asarray(array))
    groups = groups_of(entry.axes)
    _learn(entry, groups, values.shape, sizes)
    letters = "".join(groups)
    order = [letters.index(letter) for letter in _letters(entry)]
    # A copy: older JAX would share the memory of an aligned array that its owner may write to.
    return jnp.array(values.reshape([sizes[letter] for letter in letters]).transpose(order))


def _outgoing(entry: Entry, array: np.ndarray) -> np.ndarray:
    """The inverse: their order of axes, then merge."""
    groups, ours = groups_of(entry.axes), _letters(entry)
    sizes = dict(zip(ours, array.shape, strict=True))
    order = [ours.index(letter) for letter in "".join(groups)]
    merged = [math.prod(sizes[letter] for letter in group) for group in groups]
    return np.ascontiguousarray(array.transpose(order).reshape(merged))


def _letters(entry: Entry) -> str:
    projection, leaf = entry.place
    spelled = "".join(groups_of(entry.axes))
    table = LATENT_LETTERS if set(spelled) & set("LQUW") else LETTERS
    return letters_of(projection, leaf, len(spelled), table)


def groups_of(axes: str) -> list[str]:
    """`"(N H) D"` to `["NH", "D"]`."""
    found = re.findall(r"\([A-Z ]+\)|[A-Z]", axes)
    return [group.strip("()").replace(" ", "") for group in found]


def _learn(entry: Entry, groups: list[str], shape: Shape, sizes: Sizes) -> None:
    """Refuses a shape that does not fit the sizes known so far; notes the others."""
    expected = [_size(group, sizes) for group in groups]
    if not _fits(shape, expected):
        known = ", ".join("?" if size is None else str(size) for size in expected)
        rule = f"`{entry.name}` must be {_spelled(entry.axes)} = ({known})."
        checks.fail(ValueError, rule, f"shape {tuple(shape)}", _likely_cause(shape, expected))
    sizes.update({group: size for group, size in zip(groups, shape) if len(group) == 1})


def _size(group: str, sizes: Sizes) -> int | None:
    """The length of a (merged) axis, or None where a letter of it is not known yet."""
    known = [sizes.get(letter) for letter in group]
    return None if None in known else math.prod(cast(list[int], known))


def _fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(m in (None, n) for n, m in zip(shape, expected))


def _likely_cause(shape: Shape, expected: list[int | None]) -> str:
    if _fits(shape, [None if n is None else 3 * n for n in expected[:1]] + expected[1:]):
        return "Is it packed, with query, key and value in one array?"
    if len(shape) > 1 and _fits(shape[::-1], expected):
        return "Is it transposed?"
    return "Do num_heads, num_kv_heads, key_dim and value_dim of the config fit this layer?"


def _spelled(axes: str) -> str:
    """`"(N H) D"` to `"[N H, D]"`."""
    return "[" + ", ".join(" ".join(group) for group in groups_of(axes)) + "]"


def _floating(name: str, values: np.ndarray) -> np.ndarray:
    """Floats as they are; float64 is refused where JAX would make it float32."""
    checks.floating_array(name, values, "of a layer's weights")
    if jax.dtypes.canonicalize_dtype(values.dtype) != values.dtype:
        rule = f"`{name}` is float64, which needs JAX's 64-bit mode."
        remedy = "Cast it to float32, or call `jax.config.update('jax_enable_x64', True)` first."
        checks.fail(ValueError, rule, f"dtype {values.dtype}", remedy)
    return values


def _same_names(expected: list[str], arrays: Mapping[str, Any]) -> None:
    """Every array that the table names, and no other: none may be lost silently."""
    missing = sorted(set(expected) - set(arrays))
    unknown = sorted(set(arrays) - set(expected))
    if missing or unknown:
        rule = f"The arrays must be {sorted(expected)}."
        evidence = f"{sorted(arrays)}, missing {missing}, unknown {unknown}"
        remedy = "Do `use_bias`, `use_gate` of the config and the layer agree?"
        checks.fail(ValueError, rule, evidence, remedy)


def _all_have_a_place(table: Sequence[Entry], params: ParamsLike) -> None:
    places = {entry.place for entry in table}
    for projection, leaves in params.items():
        for leaf in leaves:
            if (projection, leaf) not in places:
                rule = f"params[{projection!r}][{leaf!r}] has no place in that layer."
                without = "`use_gate`, `latent`, norms, `position`, `use_sinks`"
                remedy = f"Its config must do without: {without}."
                checks.fail(ValueError, rule, f"names {sorted(params)}", remedy)


def zero_bias(projection: str, kernel: Any) -> np.ndarray:
    """What a layer of all biases holds where ours has none."""
    return np.zeros(kernel.shape[INPUT_RANK[projection] :], kernel.dtype)


def _absent_is_zero(entry: Entry, array: np.ndarray) -> None:
    if array.any():
        rule = f"`{entry.name}` has no place in the config's `use_bias`, so it must be zero."
        checks.fail(ValueError, rule, f"entries up to {np.abs(array).max():.3g}")


def _is_zero(entry: Entry, array: np.ndarray) -> None:
    if array.any():
        where = "".join(f"[{part!r}]" for part in entry.place)
        rule = f"params{where} has no place in that layer, so it must be zero."
        remedy = "Train with a config whose `use_bias` names the biases that the model has."
        checks.fail(ValueError, rule, f"entries up to {np.abs(array).max():.3g}", remedy)
