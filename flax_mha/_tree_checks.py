"""What a user can meet with parameter trees: wrong names, wrong shapes, a wrong initializer."""

import math
from collections.abc import Mapping
from typing import Any

from flax_mha import _checks


def params_tree(params: Any, expected: Mapping[str, Mapping[str, Any]], letters: Any) -> None:
    """The tree has the expected names, and every array the expected shape."""
    if not isinstance(params, Mapping):
        remedy = "Pass what `init_params` returns, or `variables['params']` of the linen module."
        _checks.fail(TypeError, "`params` must be a mapping.", f"{type(params).__name__}", remedy)
    _same_names("params", params, expected)
    for name, leaves in expected.items():
        _same_names(f"params[{name!r}]", params[name], leaves)
        for leaf, struct in leaves.items():
            _param_shape(name, leaf, params[name][leaf], struct, letters[name][leaf])


def initial_values(values: Any, struct: Any) -> None:
    """What a caller's own initializer returned is the array that it was asked for."""
    if not _checks.is_array(values) or (values.shape, values.dtype) != (struct.shape, struct.dtype):
        rule = f"An initializer must return an array of shape {struct.shape} and {struct.dtype}."
        what = f"{type(values).__name__} {getattr(values, 'shape', '')}".strip()
        remedy = "JAX's factories are called first: `jax.nn.initializers.glorot_uniform()`."
        _checks.fail(TypeError, rule, what, remedy)


def _same_names(where: str, received: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if set(received) != set(expected):
        remedy = (
            "`use_bias`, `use_gate` of the config and the parameters must agree; a whole "
            "model's variables hold this layer's under its name."
        )
        _checks.fail(
            ValueError, f"`{where}` must hold {sorted(expected)}.", f"{sorted(received)}", remedy
        )


def _param_shape(name: str, leaf: str, array: Any, struct: Any, letters: str) -> None:
    if tuple(array.shape) != tuple(struct.shape):
        rule = f"params[{name!r}][{leaf!r}] must be [{', '.join(letters)}] = {struct.shape}"
        remedy = "" if math.prod(array.shape) != math.prod(struct.shape) else "Is it transposed?"
        rule += " for this config and these inputs."
        _checks.fail(ValueError, rule, f"shape {tuple(array.shape)}", remedy)
