"""The file that write_page leaves, and what it refuses. In Chromium: test_page_in_chromium.py."""

import base64
import json
import re
import unicodedata

import jax.numpy as jnp
import numpy as np
import pytest
from demo_helpers import random_weights

from flax_mha.demo.page import AttentionMap, visible, write_page

WEIGHTS = np.full((2, 3, 4), 0.25)
QUERIES, KEYS = ["a", "b", "c"], ["d", "e", "f", "g"]


def written(path, maps, title="A title"):
    write_page(path / "page.html", title, maps)
    return (path / "page.html").read_text("utf-8")


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page)[1])


def weights_of(one_map):
    return (np.frombuffer(base64.b64decode(one_map["weights"]), np.uint8) / 255.0) ** 2


def test_a_page_names_no_other_place_and_leaves_no_place_open(tmp_path):
    page = written(tmp_path, [AttentionMap("layer 0", WEIGHTS, QUERIES, KEYS)])
    assert re.findall(r"https?:|//[a-z]|{{|@import|url\(|src=|href=", page) == []
    assert "default-src 'none'" in page[: page.index("<title>")]


def test_the_same_maps_give_the_same_bytes(tmp_path):
    maps = [AttentionMap("layer 0", WEIGHTS, QUERIES, KEYS)]
    assert written(tmp_path, maps) == written(tmp_path, maps)


@pytest.mark.parametrize("convert", [np.asarray, jnp.float32, jnp.bfloat16, np.float16])
def test_weights_are_kept_as_well_as_is_promised(tmp_path, convert):
    weights_NTS = convert(random_weights(2, 7, 5))
    page = written(tmp_path, [AttentionMap("x", weights_NTS, list("abcdefg"), list("hijkl"))])
    exact = np.asarray(weights_NTS, np.float64).ravel()
    kept = weights_of(data_of(page)[0])
    assert (abs(kept - exact) <= np.sqrt(exact) / 255 + 1 / 510**2).all()
    assert abs(kept - exact).max() > 1e-5  # or the bound is not what was tested


def test_sixteen_heads_of_128_fit_in_a_megabyte_and_a_half(tmp_path):
    labels = [chr(0x4E00 + i) for i in range(128)]
    maps = [AttentionMap("x", random_weights(4, 128, 128, i), labels, labels) for i in range(4)]
    assert 4 * 4 * 128 * 128 < len(written(tmp_path, maps).encode()) < 1.5e6


def test_an_image_goes_from_black_to_white(tmp_path):
    image = np.array([[-1.0, 1.0, 3.0], [0.0, 2.0, 3.0]])
    labels = list("abcdef")
    weights_NTS = random_weights(1, 6, 6)
    maps = [AttentionMap("x", weights_NTS, labels, labels, image=image)]
    maps += [AttentionMap("y", weights_NTS, labels, labels, image=np.ones((2, 3), np.uint8))]
    shown, flat = (one_map["image"] for one_map in data_of(written(tmp_path, maps)))
    assert (shown["rows"], shown["columns"]) == (2, 3)
    assert list(base64.b64decode(shown["pixels"])) == [0, 128, 255, 64, 191, 255]
    assert list(base64.b64decode(flat["pixels"])) == [0] * 6


def test_what_rounding_did_is_no_mistake(tmp_path):
    weights_NTS = np.array([[[1 + 2e-7, -1e-9]]])
    page = written(tmp_path, [AttentionMap("x", weights_NTS, ["a"], ["b", "c"])])
    assert weights_of(data_of(page)[0]).tolist() == [1.0, 0.0]


def test_every_label_can_be_seen():
    characters = [chr(code) for code in [*range(0x300), 0x2028, 0x200B, 0x202E, 0xD800, 0xFEFF]]
    for label in map(visible, ["", *characters]):
        assert label
        assert not any(unicodedata.category(c)[0] in "CZ" for c in label)
    assert visible("naïve <b>") == "naïve␣<b>"


def nan_at(place):
    weights_NTS = WEIGHTS.copy()
    weights_NTS[place] = np.nan
    return weights_NTS


REFUSED = [
    ({"scores_NTS": nan_at((1, 2, 0))}, ValueError, r"Received: nan at scores_NTS\[1, 2, 0\]"),
    ({"scores_NTS": WEIGHTS * 5}, ValueError, r"in \[0, 1\].*from 1.25 to 1.25.*not the logits"),
    ({"scores_NTS": -WEIGHTS}, ValueError, r"in \[0, 1\].*from -0.25 to -0.25"),
    ({"scores_NTS": WEIGHTS[None]}, ValueError, r"\(1, 2, 3, 4\)\. Pass one.*`scores_NTS\[0\]`"),
    ({"scores_NTS": WEIGHTS[0]}, ValueError, r"\[heads, queries, keys\].*shape \(3, 4\)\.$"),
    ({"scores_NTS": WEIGHTS[:, :0]}, ValueError, r"no size 0\. Received.*\(2, 0, 4\)"),
    ({"scores_NTS": WEIGHTS > 0}, TypeError, r"finite numbers.*dtype bool"),
    ({"scores_NTS": "maps"}, TypeError, r"finite numbers.*dtype <U4"),
    ({"query_labels": KEYS}, ValueError, r"each of the 3 queries. Received: 4 labels.*swapped\?"),
    ({"key_labels": QUERIES}, ValueError, r"each of the 4 keys. Received: 3 labels.*swapped\?"),
    ({"key_labels": "defg"}, TypeError, r"one string for each.*key_labels='defg'"),
    ({"query_labels": [0, 1, 2]}, TypeError, r"one string for each.*\[0, 1, 2\]"),
    ({"name": 3}, TypeError, r"`name` must be a str\. Received: int"),
    ({"image": np.zeros((2, 2))}, ValueError, r"one pixel a query.*\(2, 2\) = 4 pixels, T=3, S=4"),
    ({"image": np.zeros(4)}, ValueError, r"`image`.*\[rows, columns\].*shape \(4,\)\.$"),
    ({"image": np.full((2, 2), np.inf)}, ValueError, r"`image`.*inf at image\[0, 0\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_a_map_that_cannot_be_shown_is_refused(change, error, message):
    fields = {"name": "x", "scores_NTS": WEIGHTS, "query_labels": QUERIES, "key_labels": KEYS}
    AttentionMap(**fields)
    with pytest.raises(error, match=message):
        AttentionMap(**{**fields, **change})


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`maps` must hold at least one.*Received: maps=\[\]"):
        write_page(tmp_path / "page.html", "A title", [])
    with pytest.raises(TypeError, match=r"must be a AttentionMap\. Received: ndarray"):
        write_page(tmp_path / "page.html", "A title", [WEIGHTS])
    assert list(tmp_path.iterdir()) == []
