"""What the attention of a trained model looks at: a picture a layer, and one page for all."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_mha.demo.page import AttentionMap, write_page


def write_maps(
    maps: Sequence[AttentionMap], title: str, directory: Path, *, pictures: bool = True
) -> list[Path]:
    """Writes attention.html and, with `pictures`, attention-NAME.png a map; returns their paths."""
    page = directory / "attention.html"
    write_page(page, title, maps)
    return [page, *(_save(one_map, directory) for one_map in maps if pictures)]


def _save(one_map: AttentionMap, directory: Path) -> Path:
    name = re.sub(r"\W+", "-", one_map.name)
    path = directory / f"attention-{name}.png"
    _figure(one_map).savefig(path, dpi=100)
    return path


def _figure(one_map: AttentionMap) -> Any:
    """All queries of a text; of an image the one with the most ink, and the image beside it."""
    from flax_mha.plots import plot_attention

    if one_map.image is None:
        labels = one_map.query_labels, one_map.key_labels
        return plot_attention(one_map.scores_NTS, *labels, title=one_map.name)
    grid = one_map.image.shape
    x, y = np.unravel_index(one_map.image.argmax(), grid)
    scores = one_map.scores_NTS.reshape(-1, *grid, *grid)
    title = f"{one_map.name}: what the marked pixel attends to"
    return plot_attention(scores, title=title, query=(int(x), int(y)), image=one_map.image)
