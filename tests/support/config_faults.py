"""Layers that say one thing less, or one thing wrong, than a loaded one: their output must move.

A fault is (what it is, the layer): an option that is set is left out, with its arrays; a number is
another one; an array is as if it were not there; the call does not pass what it should. No layer,
None, is a config that is refused.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha import MultiHeadAttentionConfig

Fault = tuple[str, Any]

# Fields that say sizes, what an array is at the beginning, or how a computer does it.
_NO_OPTIONS = (
    "num_heads key_dim value_dim num_kv_heads output_shape attention_axes dropout seed dtype "
    "param_dtype precision implementation context_axis kernel_initializer bias_initializer "
    "kernel_regularizer bias_regularizer activity_regularizer kernel_constraint bias_constraint"
)
# The parameters that an option alone has.
_ARRAYS = {
    "use_gate": ("gate",),
    "use_sinks": ("sinks",),
    "qk_norm": ("query_norm", "key_norm"),
    "value_norm": ("value_norm",),
    "position": ("relative_bias",),
}


def faults(layer: Any) -> Iterator[Fault]:
    """All of them."""
    for option, value, default in _options(layer.config):
        less = {name: x for name, x in layer.params.items() if name not in _ARRAYS.get(option, ())}
        less = _without_biases(less) if option == "use_bias" else less
        yield f"no {option}, not {value}", _with(layer._replace(params=less), option, default)
        yield from _other_fields(layer, option, value)
    yield from _planted(layer)
    yield from _without_an_array(layer)
    for name in layer.call:
        yield f"no {name}", layer._replace(call={x: layer.call[x] for x in layer.call if x != name})


def _options(config: MultiHeadAttentionConfig) -> Iterator[tuple[str, Any, Any]]:
    """The fields that are not at their defaults; False is a bias's, which is less."""
    for field in dataclasses.fields(config):
        default = False if field.name == "use_bias" else field.default
        value = getattr(config, field.name)
        if field.name not in _NO_OPTIONS.split() and value != default:
            yield field.name, value, default


def _with(layer: Any, option: str, value: Any) -> Any:
    """None where there is no such config."""
    try:
        return layer._replace(config=layer.config.replace(**{option: value}))
    except ValueError:
        return None


def _without_biases(params: Any) -> Any:
    return {
        name: {leaf: x for leaf, x in arrays.items() if leaf != "bias" or "norm" in name}
        for name, arrays in params.items()
    }


def _other_fields(layer: Any, option: str, value: Any) -> Iterator[Fault]:
    """Each field of an option's object at its default."""
    for path, default in _fields(value):
        try:
            changed = _changed(value, path, default)
        except ValueError:
            continue  # no such object
        if changed != value:  # the default is no other word for it
            yield f"{option}.{'.'.join(path)}={default} in {value}", _with(layer, option, changed)


def _fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Of an object of dataclasses: the fields that have a default and are not at it."""
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        own, place = getattr(value, field.name), (*path, field.name)
        if field.default is not dataclasses.MISSING and own != field.default:
            yield place, field.default
        yield from _fields(own, place)


def _changed(value: Any, path: tuple[str, ...], to: Any) -> Any:
    head, *rest = path
    inner = _changed(getattr(value, head), tuple(rest), to) if rest else to
    return dataclasses.replace(value, **{head: inner})


def _planted(layer: Any) -> Iterator[Fault]:
    """A rotary base of twice the size, other pairs, a window off by one, another epsilon."""
    config = layer.config
    if (window := config.sliding_window) is not None:
        for other in (window - 1, window + 1):
            yield f"window {other}, not {window}", _with(layer, "sliding_window", other)
    for name, change in (("base", lambda x: 2 * x), ("interleaved", lambda x: not x)):
        if hasattr(config.position, name):
            other = change(getattr(config.position, name))
            position = dataclasses.replace(config.position, **{name: other})
            yield f"{name}={other} in {config.position}", _with(layer, "position", position)
    for option in ("qk_norm", "value_norm"):
        norm = getattr(config, option)
        if hasattr(norm, "epsilon"):
            other = dataclasses.replace(norm, epsilon=norm.epsilon / 10)
            yield f"a tenth of the epsilon of {option}={norm}", _with(layer, option, other)


def _without_an_array(layer: Any) -> Iterator[Fault]:
    """Each array but the kernels as if it were not there: zeros, or scales of 1."""
    for path, array in jax.tree_util.tree_leaves_with_path(layer.params):
        names = tuple(key.key for key in path)
        if names[-1] != "kernel" and not (names == ("key", "bias") and _cancels(layer.config)):
            plain = jnp.full_like(array, _plain(layer.config, names))
            yield f"no array {names}", layer._replace(params=_put(layer.params, names, plain))


def _cancels(config: MultiHeadAttentionConfig) -> bool:
    """A key's bias adds the same to all logits of a query, where nothing follows but softmax."""
    turns = hasattr(config.position, "base")
    return not (turns or config.qk_norm or config.soft_cap or config.use_sinks or config.clip_qkv)


def _plain(config: MultiHeadAttentionConfig, names: tuple[str, ...]) -> float:
    if names[0] == "sinks":
        return -1e30
    return config.norms[names[0]].initial(names[1]) if names[0] in config.norms else 0.0


def _put(params: Any, names: tuple[str, ...], array: Any) -> Any:
    head, *rest = names
    return {**params, head: _put(params[head], tuple(rest), array) if rest else array}
