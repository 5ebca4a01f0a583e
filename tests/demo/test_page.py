"""The page of attention maps."""

import json
import re

import numpy as np
import pytest

from flax_mha.demo.page import AttentionMap, write_page


def test_a_page_is_one_file_that_names_no_other_place(tmp_path):
    scores_NTS = np.full((2, 3, 4), 0.25)
    one_map = AttentionMap("layer 0", scores_NTS, ["a", "b", "c"], ["d", "e", "f", "g"])
    write_page(tmp_path / "page.html", "A title", [one_map])
    page = (tmp_path / "page.html").read_text("utf-8")
    assert re.findall(r"https?:|{{", page) == []
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data[0]["keys"] == ["d", "e", "f", "g"]


def test_no_maps_make_no_page(tmp_path):
    with pytest.raises(ValueError, match=r"`maps` must hold at least one AttentionMap\. Received"):
        write_page(tmp_path / "page.html", "A title", [])
