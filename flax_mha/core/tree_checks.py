"""What a user can meet with parameter trees: wrong names, wrong shapes, a wrong initializer."""

import math
from collections.abc import Mapping
from typing import Any

from flax_mha.core import boxes, checks


def params_tree(params: Any, expected: Mapping[str, Mapping[str, Any]], letters: Any) -> None:
    """The tree has the expected names, and every array the expected shape."""
    if not isinstance(params, Mapping):
        remedy = "Pass what `init_params` returns, or `variables['params']` of the linen module."
        checks.fail(TypeError, "`params` must be a mapping.", f"{type(params).__name__}", remedy)
    _same_names("params", params, expected)
    for name, leaves in expected.items():
        _same_names(f"params[{name!r}]", params[name], leaves)
    boxes.refuse(params, "params")
    for name, leaves in expected.items():
        for leaf, struct in leaves.items():
            shape = tuple(params[name][leaf].shape)
            if shape != tuple(struct.shape):
                spelled = ", ".join(letters[name][leaf][-len(struct.shape) :])
                rule = f"params[{name!r}][{leaf!r}] must be [{spelled}]"
                rule += f" = {struct.shape} for this config and these inputs."
                checks.fail(
                    ValueError, rule, f"shape {shape}", _remedy(name, leaf, params, expected)
                )


def features(name: str, value: Any) -> int:
    """The last size of an input's shape. An array is refused, though flax's `init` takes one."""
    rule = f"`{name}` must be a shape (..., features)."
    if checks.is_array(value):
        remedy = f"Pass `{name.removesuffix('_shape')}.shape`."
        checks.fail(TypeError, rule, f"an array of shape {tuple(value.shape)}", remedy)
    if not isinstance(value, tuple | list) or not value:
        checks.fail(TypeError, rule, repr(value))
    return checks.integer(f"{name}[-1]", value[-1], minimum=0)


def initial_values(values: Any, struct: Any) -> None:
    """What a caller's own initializer returned is the array that it was asked for."""
    if not checks.is_array(values) or (values.shape, values.dtype) != (struct.shape, struct.dtype):
        rule = f"An initializer must return an array of shape {struct.shape} and {struct.dtype}."
        what = f"{type(values).__name__} {getattr(values, 'shape', '')}".strip()
        remedy = "JAX's factories are called first: `jax.nn.initializers.glorot_uniform()`."
        checks.fail(TypeError, rule, what, remedy)


def _same_names(where: str, received: Any, expected: Mapping[str, Any]) -> None:
    if not isinstance(received, Mapping):
        rule = f"`{where}` must be a mapping with {sorted(expected)}."
        checks.fail(TypeError, rule, f"{type(received).__name__}")
    if set(received) != set(expected):
        remedy = (
            "`use_bias`, `use_gate`, `latent` of the config and the parameters must agree; a whole "
            "model's variables hold this layer's under its name."
        )
        if "params" in received:
            remedy = "Pass `variables['params']`."
        rule = f"`{where}` must hold {sorted(expected)}."
        checks.fail(ValueError, rule, f"{sorted(map(str, received))}", remedy)


def _remedy(name: str, leaf: str, params: Any, expected: Any) -> str:
    """What is likely to have happened to an array that does not fit."""
    sizes, right = (tuple(tree[name][leaf].shape) for tree in (params, expected))
    if math.prod(sizes) == math.prod(right):
        return "Is it transposed?"
    if name == "attention_output" or leaf != "kernel":
        return ""
    if _sources(params) == _sources(expected)[::-1] != _sources(expected):
        return "Did you swap value and key? The order of arguments is query, value, key."
    if sizes[1:] == right[1:]:
        return f"The parameters were made for inputs of {sizes[0]} features, these have {right[0]}."
    if sizes[:-1] == right[:-1] and right[-1] == sizes[1] * sizes[-1]:
        return f"`key_dim` is the size of one head, not of all {sizes[1]} together."
    return ""


def _sources(tree: Any) -> list[Any]:
    return [tree[name]["kernel"].shape[:1] for name in ("value", "key")]
