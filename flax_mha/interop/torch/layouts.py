"""A layer's arrays in a PyTorch model's state dict: chosen, unpacked, and carried both ways."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Params, ParamsLike
from flax_mha.interop.layout import Entry, from_table, to_table
from flax_mha.interop.torch.arrays import as_numpy, writable
from flax_mha.interop.torch.models import Layout
from flax_mha.interop.torch.packing import heads_of, packed, rolled, stacked, unpacked, unstacked
from flax_mha.params.tree import check_params, features_of, places

PARTS = ("query", "key", "value")


# --- in -----------------------------------------------------------------------------------------


def from_layout(
    layout: Layout, state: Any, config: MultiHeadAttentionConfig, prefix: str
) -> Params:
    """The parameter tree; every array that belongs to the layer is used, or refused by name."""
    if not isinstance(state, Mapping):
        remedy = "Pass `module.state_dict()`, or what `load_safetensors` returns."
        checks.fail(TypeError, "`state` must be a mapping.", f"{type(state).__name__}", remedy)
    checks.mapping("state", state)
    _check(config, prefix)
    table = [
        entry
        for entry in _rows(layout, config)
        if entry.place in places(config) or prefix + _array_of(entry) in state
    ]
    read = _selected(layout, table, state, prefix, config)
    heads = {name: heads_of(name, config) for name in _their_names(table)}
    arrays = {name: stacked(name, read, each) for name, each in heads.items()}
    for name, packing in layout.packed.items():
        if name in arrays:
            arrays |= unpacked(name, arrays.pop(name), packing, layout.table, config)
    for name in layout.shared_last:
        arrays[name] = rolled(arrays[name], config, shared_first=True)
    # Under their whole names, which an error then says.
    table = [entry if entry.name is None else _named(entry, prefix) for entry in table]
    whole = {prefix + name: array for name, array in arrays.items()}
    params = from_table(table, whole, config)
    _check_sizes(layout, params, config)
    return params


def _check(config: Any, prefix: Any) -> None:
    checks.instance("config", config, MultiHeadAttentionConfig)
    if not isinstance(prefix, str):
        checks.fail(TypeError, "`prefix` must be a string.", f"prefix={prefix!r}")


def _rows(layout: Layout, config: MultiHeadAttentionConfig) -> list[Entry]:
    """The rows of the table that this config has; what has no place in it is refused."""
    projections = {entry.place[0] for entry in layout.table}
    if config.use_gate and "gate" not in projections:
        rule = "This layout has no place for a gate."
        checks.fail(ValueError, rule, "use_gate=True", "Name its layer in `from_linear_layers`.")
    if config.output_shape is not None and len(config.output_shape) > 1:
        rule = "Such a layer has one axis of output features."
        checks.fail(ValueError, rule, f"output_shape={config.output_shape}")
    there = places(config)
    if layout.whole_biases and config.biases:
        there |= {(projection, "bias") for projection in config.projections}
    return [entry for entry in layout.table if entry.place in there]


def _named(entry: Entry, prefix: str) -> Entry:
    return entry._replace(name=f"{prefix}{entry.name}")


def _array_of(entry: Entry) -> str:
    """The array's name in the state; a packed one holds several parts."""
    return (entry.name or "").partition("[")[0]


def _selected(
    layout: Layout,
    table: Sequence[Entry],
    state: Mapping[str, Any],
    prefix: str,
    config: MultiHeadAttentionConfig,
) -> dict[str, np.ndarray]:
    """The layer's own arrays by their names below the prefix; nothing else is read."""
    expected = [name for each in _their_names(table) for name in heads_of(each, config)]
    below = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    own = [n for n in below if n.startswith(layout.owns) and not _is_foreign(n, layout)]
    for name in sorted(set(own) & set(layout.refused)):
        checks.fail(
            ValueError, f"`{name}` is not supported: {layout.refused[name]}.", prefix + name
        )
    missing = [name for name in expected if name not in own]
    unknown = [name for name in own if name not in expected]
    if missing or unknown:
        rule = f"The layer's arrays under prefix={prefix!r} must be {expected}."
        evidence = f"missing {_few(missing)}, unknown {_few(unknown)}"
        hints = sorted(
            {hint for x, hint in layout.hints.items() if unknown and x in ("", *unknown)}
        )
        remedy = " ".join([_hint(expected, state, prefix), *hints])
        checks.fail(ValueError, rule, evidence, remedy)
    return {name: as_numpy(prefix + name, state[prefix + name]) for name in expected}


def _is_foreign(name: str, layout: Layout) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in layout.foreign)


def _their_names(table: Sequence[Entry]) -> list[str]:
    """The names of the table, each packed array once."""
    return list(dict.fromkeys(_array_of(entry) for entry in table if entry.name is not None))


def _few(names: Sequence[str]) -> str:
    """Some names of a list that may be a whole model's."""
    shown = ", ".join(repr(name) for name in names[:6])
    return f"[{shown}{', ...' if len(names) > 6 else ''}]"


def _hint(expected: Sequence[str], state: Mapping[str, Any], prefix: str) -> str:
    """The prefixes under which such a layer does stand."""
    first = expected[0]
    found = [name.removesuffix(first) for name in state if name.endswith(first)]
    if found and prefix not in found:
        return f"Such layers stand under {_few(found)}: pass one as `prefix`."
    return "Do the layout, and `use_bias`, `use_gate`, `qk_norm` of the config, fit this model?"


# --- out ----------------------------------------------------------------------------------------


def to_layout(
    layout: Layout, params: ParamsLike, config: MultiHeadAttentionConfig, prefix: str
) -> dict[str, np.ndarray]:
    """The inverse of `from_layout`: NumPy arrays of their own memory, under prefixed names."""
    _check(config, prefix)
    table = _rows(layout, config)
    arrays = to_table(table, params, config)
    for name in layout.shared_last:
        arrays[name] = rolled(arrays[name], config, shared_first=False)
    _check_sizes(layout, params, config)
    for name, packing in layout.packed.items():
        arrays |= packed(name, arrays, packing, layout.table, config)
    parts: dict[str, np.ndarray] = {}
    for name in _their_names(table):
        parts |= unstacked(name, arrays[name], heads_of(name, config))
    return {prefix + name: writable(array) for name, array in parts.items()}


def _check_sizes(layout: Layout, params: ParamsLike, config: MultiHeadAttentionConfig) -> None:
    """The tree fits the config, and its sizes are such as the model can have."""
    D, M, C = features_of(params).values()
    check_params(params, config, (1, D), (1, M), (1, C))
    E = params["attention_output"]["kernel"].shape[2]
    sizes = {"D": D, "C": C, "M": M, "E": E, **config.dims._asdict()}
    for equation in layout.equal:
        sides = equation.split("=")
        left, right = (math.prod(sizes[letter] for letter in side) for side in sides)
        if left != right:
            rule = f"Such a layer has {' = '.join(' '.join(side) for side in sides)}."
            checks.fail(ValueError, rule, f"{left} and {right}")
