"""Attention maps as one HTML page that needs no network: page.html, its style, scripts, weights.

The page's Content-Security-Policy allows its own scripts and its own style, by their hashes,
and no request at all.
"""

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_mha.core.checks import fail, instance

_LEVELS = 255
_ROUNDING = 1e-6  # a softmax in float32 may end this far above 1
_SOURCES = {"STYLE": "page.css", "DRAW": "page_draw.js", "SCRIPT": "page.js"}
_VISIBLE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMap:
    """The attention weights of one layer for one input, and what its rows and columns are.

    Attributes:
        name: what the page calls it, such as "layer 2 self-attention".
        scores_NTS: `[N, T, S]`, heads, queries, keys: weights in [0, 1].
        query_labels: T strings.
        key_labels: S strings.
        image: `[rows, columns]` numbers, where queries and keys are the pixels of one image, row by
            row: T = S = rows x columns.

    Raises:
        TypeError: scores or image are not numbers, labels or name not strings.
        ValueError: sizes that disagree or are 0, NaN, weights outside [0, 1].
    """

    name: str
    scores_NTS: np.ndarray
    query_labels: list[str]
    key_labels: list[str]
    image: np.ndarray | None = None

    def __post_init__(self) -> None:
        instance("name", self.name, str)
        scores_NTS = _numbers("scores_NTS", self.scores_NTS, "[heads, queries, keys]", rank=3)
        _check_weights(scores_NTS)
        _, T, S = scores_NTS.shape
        _check_labels("query_labels", self.query_labels, T, "queries")
        _check_labels("key_labels", self.key_labels, S, "keys")
        if self.image is not None:
            _check_image(self.image, scores_NTS)


def write_page(path: Path, title: str, maps: Sequence[AttentionMap]) -> None:
    """One HTML file that shows the maps, and opens from disk without a network.

    A weight w is stored in one byte, as round(255 sqrt(w)), so that small weights keep their
    digits: what the page shows is off by at most sqrt(w) / 255, 0.004 at 1 and 0.0004 at 0.01.

    Args:
        path: the file to write.
        title: its heading.
        maps: in the order in which the page offers them.

    Raises:
        TypeError: `maps` holds something else.
        ValueError: `maps` is empty.
    """
    if not maps:
        fail(ValueError, "`maps` must hold at least one AttentionMap.", f"maps={maps!r}")
    for one_map in maps:
        instance("maps[...]", one_map, AttentionMap)
    page = _fill(title, [_encode(one_map) for one_map in maps])
    # A title may hold half a surrogate pair, which UTF-8 has no bytes for.
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def visible(label: str) -> str:
    r"""The label with whitespace and control characters as signs that can be seen.

    Example:
        >>> [visible(label) for label in ["a b", "\n", "\t", "\x00", ""]]
        ['a␣b', '↵', '⇥', '\\x00', '∅']
    """
    signs = (_VISIBLE.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in label)
    return "".join(signs) or "\u2205"


def _fill(title: str, maps: list[dict[str, Any]]) -> str:
    """In one pass, so that a title or a label that looks like a place of page.html is text."""
    # `<` would let a label end the script element, or open a comment in it.
    parts = {"TITLE": html.escape(title), "DATA": json.dumps(maps).replace("<", "\\u003c")}
    for place, name in _SOURCES.items():
        parts[place] = _read(name)
        parts[f"{place}_HASH"] = _hash(parts[place])
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read("page.html"))


def _read(name: str) -> str:
    return importlib.resources.files("flax_mha.demo").joinpath(name).read_text("utf-8")


def _hash(source: str) -> str:
    """By which the page's policy knows an element's text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _encode(one_map: AttentionMap) -> dict[str, Any]:
    weights_NTS = np.clip(np.asarray(one_map.scores_NTS, np.float64), 0, 1)
    return {
        "name": one_map.name,
        "heads": len(weights_NTS),
        "queries": [visible(label) for label in one_map.query_labels],
        "keys": [visible(label) for label in one_map.key_labels],
        "weights": _base64(np.sqrt(weights_NTS)),
        "image": None if one_map.image is None else _encode_image(one_map.image),
    }


def _encode_image(image: np.ndarray) -> dict[str, Any]:
    """From its least value, black, to its greatest, white."""
    values = np.asarray(image, np.float64)
    span = np.ptp(values) or 1.0
    rows, columns = values.shape
    return {"rows": rows, "columns": columns, "pixels": _base64((values - values.min()) / span)}


def _base64(fractions: np.ndarray) -> str:
    return base64.b64encode(np.rint(fractions * _LEVELS).astype(np.uint8).tobytes()).decode()


# --- what a map may not be ------------------------------------------------------------------------


def _numbers(name: str, value: Any, letters: str, *, rank: int) -> np.ndarray:
    """`value` as finite real numbers of the rank, with no size 0."""
    array = np.asarray(value)
    rule = f"`{name}` must be finite numbers {letters}, no size 0."
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        fail(TypeError, rule, f"{name} of dtype {array.dtype}")
    if array.ndim != rank or 0 in array.shape:
        remedy = f"Pass one example: `{name}[0]`." if array.ndim == rank + 1 else ""
        fail(ValueError, rule, f"{name} of shape {array.shape}", remedy)
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        fail(ValueError, rule, f"{array[place]} at {name}{list(place)}")
    return array


def _check_weights(scores_NTS: np.ndarray) -> None:
    low, high = scores_NTS.min(), scores_NTS.max()
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        rule = "`scores_NTS` must be attention weights in [0, 1]."
        remedy = "Pass the weights after the softmax, not the logits."
        fail(ValueError, rule, f"values from {low:.6g} to {high:.6g}", remedy)


def _check_labels(name: str, labels: Sequence[str], count: int, what: str) -> None:
    rule = f"`{name}` must be one string for each of the {count} {what}."
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        fail(TypeError, rule, f"{name}={labels!r:.80}")
    if len(labels) != count:
        fail(ValueError, rule, f"{len(labels)} labels", "Are query and key labels swapped?")


def _check_image(image: np.ndarray, scores_NTS: np.ndarray) -> None:
    size = _numbers("image", image, "[rows, columns]", rank=2).size
    _, T, S = scores_NTS.shape
    if not size == T == S:
        rule = "`image` must have one pixel a query and one a key: rows x columns = T = S."
        evidence = f"image of shape {np.shape(image)} = {size} pixels, T={T}, S={S}"
        fail(ValueError, rule, evidence, "Average the image over the patches that attend.")
