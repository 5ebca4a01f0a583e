"""Which implementation serves a call, and which one None runs: `python -m flax_mha explain`.

The call is described by shapes, and nothing is computed. Its options are the arguments of
`dot_product_attention`, by their names or shorter ones.
"""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from flax_mha import ContextAxis, Mask
from flax_mha import explain as explanation
from flax_mha.attention import DistanceBias
from flax_mha.commands.columns import section
from flax_mha.core.platform import PLATFORMS

DTYPES = ("float32", "bfloat16", "float16")
NONE_CHOOSES = ", and None chooses it: "
NAMES = 14
Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Option:
    """What an argument of `dot_product_attention` is called on the command line."""

    argument: str
    flags: tuple[str, ...]
    text: str
    read: Callable[[str], Any] | None = None  # None = a flag without a value
    metavar: str = ""


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Prints what `explain` says of the call that was described."""
    try:
        call = call_of(given)
        with _mesh(call):
            told = explanation(**call, platform=given.platform)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    platform = given.platform or jax.default_backend()
    print("\n".join(lines(call, told, platform)).lstrip())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--platform", choices=PLATFORMS, help="where it would run (default: on this machine)")
    add("--shape", type=_four("BxTxNxH"), required=True, metavar="BxTxNxH", help="of the query")
    add("--key-shape", type=_four("BxSxKxH"), metavar="BxSxKxH", help="default: the query's")
    add("--value-dim", type=_count, metavar="V", help="features of a value (default: H)")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of all three (default: %(default)s)")
    for option in OPTIONS:
        if option.read is None:
            add(*option.flags, dest=option.argument, action="store_true", help=option.text)
    for option in OPTIONS:
        if option.read is not None:
            add(
                *option.flags,
                dest=option.argument,
                type=option.read,
                metavar=option.metavar,
                help=option.text,
            )
    add("--segments", action="store_true", help="packed sequences: ids of queries and keys")
    add("--padding", action="store_true", help="of queries and of keys")
    add("--mask-function", action="store_true", help="a Mask by a function, here a prefix-LM's")


def call_of(given: argparse.Namespace) -> dict[str, Any]:
    """The call's arguments; arrays are shapes with dtypes, and what is not asked for is absent."""
    B, T, N, H = given.shape
    _, S, K, _ = key_shape = given.key_shape or given.shape
    V = H if given.value_dim is None else given.value_dim
    shapes = {"query": given.shape, "key": key_shape, "value": (B, S, K, V)}
    call = {name: _struct(shape, given.dtype) for name, shape in shapes.items()}
    static = {option.argument: getattr(given, option.argument) for option in OPTIONS}
    call |= {
        name: value for name, value in static.items() if value is not None and value is not False
    }
    call |= dict(mask=_mask(given, B, T, S)) if _masks(given) else {}
    if given.bias:
        call["bias"] = _struct(given.bias, "float32")
    if given.distance_bias:
        call["distance_bias"] = DistanceBias(_struct((N, T + S - 1), "float32"), first=1 - T)
    if given.score:
        call["score"] = _halved
    if given.sinks:
        call["sinks"] = _struct((N,), "float32")
    if given.dropout_rate:
        call["dropout_key"] = jax.eval_shape(jax.random.key, 0)
    return call


def _halved(logits: Any, b: Any, n: Any, t: Any, s: Any) -> Any:
    """A score function in the place of any."""
    return logits / 2


def _mesh(call: dict[str, Any]) -> Any:
    """A mesh of as many devices as the context axis has; none of them need be here."""
    if "context_axis" not in call:
        return contextlib.nullcontext()
    devices, axis = call["context_axis"]
    call["context_axis"] = axis
    mesh = AbstractMesh((devices,), (axis.name,), axis_types=(AxisType.Auto,))
    return jax.sharding.use_abstract_mesh(mesh)


def _masks(given: argparse.Namespace) -> bool:
    return bool(given.mask or given.segments or given.padding or given.mask_function)


def _mask(given: argparse.Namespace, B: int, T: int, S: int) -> Mask:
    """All arrays that restrict attention; the causal order and the window are options."""
    ids, real = ([_struct((B, length), dtype) for length in (T, S)] for dtype in ("int32", "bool"))
    dense = given.mask and (*[1] * (4 - len(given.mask)), *given.mask)
    prefix = Mask.function(lambda b, n, t, s: (s <= t) | (s < T // 4))
    return Mask(
        functions=prefix.functions if given.mask_function else (),
        query_padding=real[0] if given.padding else None,
        key_padding=real[1] if given.padding else None,
        segment_ids=((ids[0], ids[1]),) if given.segments else (),
        dense_masks=(_struct(dense, "bool"),) if dense else (),
    )


def lines(call: dict[str, Any], told: dict[str, str], platform: str) -> Iterator[str]:
    """What is printed: the call, each implementation with its line, what None runs, and bytes."""
    entries = {name: line.partition(NONE_CHOOSES)[0] for name, line in told.items()}
    chosen = [(name, line.partition(NONE_CHOOSES)[2]) for name, line in told.items()]
    entries["None"] = "; ".join(f"{name}: {why}" for name, why in chosen if why)
    yield from section(
        f"{described(call)}, on {platform}", entries | {"memory": memory(call)}, NAMES
    )


def described(call: dict[str, Any]) -> str:
    """The call in short: its shapes, its dtype, and the options that were given."""
    arrays = {name: list(call[name].shape) for name in ("query", "key", "value")}
    if arrays["query"] == arrays["key"] == arrays["value"]:
        text = f"query, key and value {arrays['query']}"
    else:
        text = ", ".join(f"{name} {shape}" for name, shape in arrays.items())
    rest = {name: x for name, x in call.items() if name not in (*arrays, "dropout_key")}
    options = [f"{name}={_short(x)}" for name, x in rest.items()]
    return ", ".join([text, str(call["query"].dtype), *options])


def _short(value: Any) -> str:
    """A value of an option; of arrays their sizes, of a mask the parts that it has."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return str(list(value.shape))
    if isinstance(value, DistanceBias):
        return _short(value.values)
    if isinstance(value, Mask):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        parts = [name for name, x in named.items() if name != "band" and x not in (None, ())]
        return f"Mask({', '.join(parts)})"
    return "a function" if callable(value) else repr(value)


def memory(call: dict[str, Any]) -> str:
    """Bytes that a forward pass holds in any case, and those that a `[T, S]` matrix would add."""
    (B, T, N, _), (_, S, _, V) = call["query"].shape, call["value"].shape
    held = sum(math.prod(call[name].shape) for name in ("query", "key", "value"))
    held = (held + B * T * N * V) * call["query"].dtype.itemsize
    scores = size(4 * B * N * T * S)
    return (
        f"query, key, value and context, {size(held)}; scores [B, N, T, S] in float32 would take "
        f"{scores}, and only the reference holds them"
    )


def size(number: int) -> str:
    """Bytes in the largest unit of which there is one.

    Example:
        >>> size(1536), size(1 << 30)
        ('1.5 KiB', '1 GiB')
    """
    power = min(3, max(0, number.bit_length() - 1) // 10)
    return f"{number / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _struct(shape: Sizes, dtype: str) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _four(letters: str) -> Callable[[str], Sizes]:
    """Reads a shape of exactly these four axes."""

    def read(text: str) -> Sizes:
        rule = f"a shape is four sizes, {letters} such as 8x4096x8x128."
        return _sizes(text, "x", rule, 4)

    return read


def _shape(text: str) -> Sizes:
    """Reads a shape of any rank up to four."""
    return _sizes(text, "x", "a shape is sizes with x between them, such as 1x8x512x512.", None)


def _precision(text: str) -> str:
    names = [precision.name.lower() for precision in jax.lax.Precision]
    if text not in names:
        raise argparse.ArgumentTypeError(f"a precision is one of {names}. Received: {text!r}.")
    return text


def _count(text: str) -> int:
    return _sizes(text, "x", "a number is one size, such as 128.", 1)[0]


def _pair(text: str) -> Sizes:
    return _sizes(text, ",", "blocks are two sizes, queries,keys such as 512,512.", 2)


def _along(text: str) -> tuple[int, ContextAxis]:
    """Devices, and what a `ContextAxis` takes besides its name."""
    devices, *how = text.split(",")
    try:
        return _count(devices), ContextAxis("context", *how)
    except (TypeError, ValueError) as error:
        rule = "a context axis is its devices, and a strategy and a layout if any: 4,ring,zigzag."
        raise argparse.ArgumentTypeError(f"{rule} {error}") from error


def _sizes(text: str, separator: str, rule: str, number: int | None) -> Sizes:
    parts = text.split(separator)
    fits = len(parts) == number if number else 1 <= len(parts) <= 4
    if not fits or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{rule} Received: {text!r}.")
    return tuple(map(int, parts))


def _window(text: str) -> Any:
    """An integer, or (left, right) of integers and none."""
    try:
        sides = [None if part == "none" else int(part) for part in text.split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        rule = "a window is the keys before and after the query: 255,0 or none,0, or one number."
        raise argparse.ArgumentTypeError(f"{rule} Received: {text!r}.")
    return sides[0] if len(sides) == 1 else tuple(sides)


OPTIONS = (
    Option("is_causal", ("--causal", "--is-causal"), "no key after the query"),
    Option("broadcast_dropout", ("--broadcast-dropout",), "one mask for examples and heads"),
    Option("distance_bias", ("--distance-bias",), "a bias by head and distance"),
    Option("score", ("--score",), "a function of each logit and its pair"),
    Option("sinks", ("--sinks",), "a logit for each head that attends to nothing"),
    Option("return_weights", ("--weights", "--return-weights"), "return [B, N, T, S] too"),
    Option("return_residuals", ("--residuals", "--return-residuals"), "return them too"),
    Option(
        "local_window_size",
        ("--window", "--local-window-size"),
        "keys before and after the query, 'none' = all",
        _window,
        "L,R",
    ),
    Option("dropout_rate", ("--dropout", "--dropout-rate"), "with a key", float, "RATE"),
    Option("soft_cap", ("--soft-cap",), "of the logits", float, "X"),
    Option("scale", ("--scale",), "of the logits (default: 1 / sqrt(H))", float, "X"),
    Option("bias", ("--bias",), "float32, broadcast to [B, N, T, S]", _shape, "SHAPE"),
    Option("mask", ("--mask",), "booleans, broadcast to [B, N, T, S]", _shape, "SHAPE"),
    Option("block_sizes", ("--block-sizes",), "queries and keys a block", _pair, "T,S"),
    Option("precision", ("--precision",), "of the products", _precision, "NAME"),
    Option(
        "context_axis",
        ("--context-axis",),
        "the sequence over N devices, how, and in which order",
        _along,
        "N[,STRATEGY[,LAYOUT]]",
    ),
)
