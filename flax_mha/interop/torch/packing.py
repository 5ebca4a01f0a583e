"""Arrays that hold several parts of a layer, and parts that many arrays hold: in and out."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.interop.layout import Entry, groups_of
from flax_mha.interop.torch.models import Packing
from flax_mha.params.tree import sizes_of

Arrays = dict[str, np.ndarray]


# --- several parts in one array -----------------------------------------------------------------


def unpacked(
    name: str,
    array: np.ndarray,
    packing: Packing,
    table: Sequence[Entry],
    config: MultiHeadAttentionConfig,
) -> Arrays:
    """`name[query]`, `name[key]` and so on, of the packed array `name`."""
    axis, heads, widths = _places(name, packing, table, config)
    total = heads * sum(widths.values())
    if array.ndim <= axis or array.shape[axis] != total:
        checks.fail(
            ValueError,
            _rule(name, packing, heads, widths),
            f"shape {array.shape}",
            _cause(array, axis, total),
        )
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    by_head = array.reshape(*before, heads, total // heads, *after)
    parts = np.split(by_head, np.cumsum(list(widths.values()))[:-1], axis + 1)
    return {part: x.reshape(*before, -1, *after) for part, x in zip(widths, parts)}


def packed(
    name: str,
    arrays: Arrays,
    packing: Packing,
    table: Sequence[Entry],
    config: MultiHeadAttentionConfig,
) -> Arrays:
    """The inverse of `unpacked`, where the layer has such parts; takes them out of `arrays`."""
    axis, heads, widths = _places(name, packing, table, config)
    if not any(part in arrays for part in widths):
        return {}
    parts = [arrays.pop(part) for part in widths]
    if len({array.dtype for array in parts}) > 1:
        rule = f"`{name}` holds parts of the layer, which must have one dtype."
        checks.fail(TypeError, rule, ", ".join(str(array.dtype) for array in parts))
    before, after = parts[0].shape[:axis], parts[0].shape[axis + 1 :]
    by_head = [x.reshape(*before, heads, -1, *after) for x in parts]
    return {name: np.concatenate(by_head, axis + 1).reshape(*before, -1, *after)}


def _places(
    name: str, packing: Packing, table: Sequence[Entry], config: MultiHeadAttentionConfig
) -> tuple[int, int, dict[str, int]]:
    """(axis, number of heads, how long each part is in one of them)."""
    sizes = sizes_of(config)
    heads = 1 if packing.within is None else sizes[packing.within]
    parts = {
        entry.name: groups_of(entry.axes)[packing.axis]
        for entry in table
        if entry.name is not None and entry.name.partition("[")[0] == name
    }
    lengths = {part: math.prod(sizes[x] for x in group) for part, group in parts.items()}
    return packing.axis, heads, {part: length // heads for part, length in lengths.items()}


def _rule(name: str, packing: Packing, heads: int, widths: Mapping[str, int]) -> str:
    parts = [part.partition("[")[2].rstrip("]") for part in widths]
    listed = " + ".join(map(str, widths.values()))
    held = f"`{name}` must hold {', '.join(parts[:-1])} and {parts[-1]} along axis {packing.axis}"
    if packing.within is None:
        return f"{held}: {listed} = {sum(widths.values())}."
    return f"{held}, head by head: {heads} * ({listed}) = {heads * sum(widths.values())}."


def _cause(array: np.ndarray, axis: int, total: int) -> str:
    if array.ndim == 2 and array.shape[1 - axis] == total:
        return "Is it transposed? A Linear keeps [out, in], a Conv1D [in, out]."
    return "Do num_heads, num_kv_heads, key_dim and value_dim of the config fit this layer?"


# --- the order of features in a head --------------------------------------------------------------


def rolled(array: np.ndarray, config: MultiHeadAttentionConfig, shared_first: bool) -> np.ndarray:
    """The heads along the first axis, with their shared features first; or, again, last."""
    sizes = sizes_of(config)
    H, W = sizes["H"], sizes["W"]
    if array.shape[0] % H:
        return array  # the table's check says what is wrong
    by_head = array.reshape(-1, H, *array.shape[1:])
    return np.roll(by_head, W if shared_first else -W, 1).reshape(array.shape)


# --- one array a head ---------------------------------------------------------------------------


def heads_of(name: str, config: MultiHeadAttentionConfig) -> list[str]:
    """`norms.{N}.weight` is `norms.0.weight` and so on; another name is itself."""
    letter = re.search(r"{(\w)}", name)
    if letter is None:
        return [name]
    count = config.dims._asdict()[letter[1]]
    return [name.replace(letter[0], str(head)) for head in range(count)]


def stacked(name: str, arrays: Mapping[str, np.ndarray], heads: Sequence[str]) -> np.ndarray:
    """The array of a table's name, out of those of `heads_of`."""
    if "{" not in name:
        return arrays[name]
    parts = [arrays[head] for head in heads]
    if len({(x.shape, x.dtype) for x in parts}) > 1:
        rule = f"The arrays `{name}` must have one shape and one dtype."
        checks.fail(ValueError, rule, ", ".join(f"{x.dtype}{list(x.shape)}" for x in parts))
    return np.stack(parts)


def unstacked(name: str, array: np.ndarray, heads: Sequence[str]) -> Arrays:
    """The inverse of `stacked`."""
    return dict(zip(heads, array)) if "{" in name else {name: array}
