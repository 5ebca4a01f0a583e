"""The two pictures of a run. matplotlib is imported where it is used: it is an optional extra."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.demo.model import Transformer
from flax_mha.demo.settings import DemoError

_VISIBLE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}
_SNIPPET_BYTES = 40
# lzma and bz2 often lie on one another: their dashes do not.
_BASELINE_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "C2", "linestyle": (0, (4, 4))},
    {"color": "C3", "linestyle": (4, (4, 4))},
    {"color": "C4", "linestyle": ":"},
)


def require_matplotlib() -> None:
    """Says at the start, not after two minutes, what the pictures need.

    Raises:
        DemoError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        remedy = "Run `pip install 'flax_mha[demo]'` (or `pip install matplotlib`)"
        raise DemoError(f"the pictures need matplotlib. {remedy}, or pass --no-plots.")


def plot_loss(
    records: Sequence[Mapping[str, Any]],
    held_out: str,
    baselines: Mapping[str, float],
    path: Path,
) -> None:
    """Bits per byte over the steps; the compressors, on the same held-out bytes, as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for event, label, marker in (("train", "training", ""), ("held_out", held_out, "o")):
        rows = [record for record in records if record["event"] == event]
        steps = [row["step"] for row in rows]
        bits = [row["bits_per_byte"] for row in rows]
        axes.plot(steps, bits, label=label, marker=marker, markersize=4, linewidth=1)
    for (name, baseline), style in zip(baselines.items(), _BASELINE_STYLES):
        axes.axhline(baseline, linewidth=1.2, label=f"{name} on the same, {baseline:.2f}", **style)
    axes.set(xlabel="step", ylabel="bits per byte", title="Bits per byte while learning")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def plot_attention(scores_NTS: np.ndarray, text: bytes, title: str, path: Path) -> None:
    """One panel a head: the row's byte attends to the column's."""
    from matplotlib.figure import Figure

    columns = min(len(scores_NTS), 2)
    rows = -(-len(scores_NTS) // columns)
    figure = Figure(figsize=(7.5 * columns, 7.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for head, axes in enumerate(panels):
        if head < len(scores_NTS):
            image = _draw_head(axes, scores_NTS[head], byte_labels(text), f"head {head}")
        else:
            axes.set_axis_off()
    figure.colorbar(image, ax=list(panels), shrink=0.5, label="attention weight")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def byte_labels(text: bytes) -> list[str]:
    r"""A visible character for every byte.

    Example:
        >>> byte_labels(b"a b\n\xff")
        ['a', '␣', 'b', '↵', 'ff']
    """
    characters = (chr(byte) for byte in text)
    return [
        _VISIBLE.get(char, char if char.isascii() and char.isprintable() else f"{ord(char):02x}")
        for char in characters
    ]


def snippet(text: np.ndarray, limit: int) -> bytes:
    """A few bytes of code to look at: from the first method on, where there is one."""
    whole = text.tobytes()
    start = max(whole.find(b"    def "), 0)
    return whole[start : start + min(limit, _SNIPPET_BYTES)]


def attention_scores(model: Transformer, params: Any, text: bytes, layer: int) -> np.ndarray:
    """`[N, T, T]`: what the heads of one layer attend to in `text`."""
    # The picture needs the weights, which only the reference is bound to give.
    attention = model.attention.replace(implementation="reference")
    watched = model.clone(attention=attention, sow_attention_scores=True)
    tokens_BT = jnp.asarray([list(text)], jnp.int32)
    _, sown = watched.apply({"params": params}, tokens_BT, mutable=["intermediates"])
    scores = sown["intermediates"][f"block_{layer}"]["attention"]["attention_scores"]
    return np.asarray(jax.device_get(scores[0][0]), np.float32)


def _draw_head(axes: Any, weights_TS: np.ndarray, labels: Sequence[str], title: str) -> Any:
    image = axes.imshow(weights_TS, cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, family="monospace", fontsize=9, parse_math=False)
    axes.set_yticks(ticks, labels, family="monospace", fontsize=9, parse_math=False)
    axes.set(title=title, xlabel="attends to", ylabel="the byte that attends")
    return image
