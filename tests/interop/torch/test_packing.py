"""Arrays that hold several parts: parted and joined bit for bit, against slices written by hand."""

import numpy as np
import pytest
from helpers import random_params

from flax_mha import Latent, MultiHeadAttentionConfig, param_shapes
from flax_mha.interop.layout import Entry
from flax_mha.interop.torch.layouts import from_layout, to_layout
from flax_mha.interop.torch.models import Layout, Packing
from flax_mha.interop.torch.packing import heads_of
from flax_mha.positions import Rotary

N, K, H, V, D = 6, 2, 5, 3, 7
G = N // K
CONFIG = MultiHeadAttentionConfig(N, H, V, num_kv_heads=K, use_gate=True, output_shape=D)
OUTPUT = (
    Entry(("attention_output", "kernel"), "o.weight", "E (N V)"),
    Entry(("attention_output", "bias"), "o.bias", "E"),
)
ROWS = {
    "query": ("(N H)", "D"),
    "key": ("(K H)", "C"),
    "value": ("(K V)", "M"),
    "gate": ("(N V)", "D"),
}


def layout(groups, within, transposed=False):
    """`groups` are the names of arrays, each with its parts."""
    table, packed = list(OUTPUT), {}
    for name, parts in groups.items():
        for part in parts:
            heads, features = ROWS[part]
            axes = f"{features} {heads}" if transposed else f"{heads} {features}"
            table.append(Entry((part, "kernel"), f"{name}.weight[{part}]", axes))
            table.append(Entry((part, "bias"), f"{name}.bias[{part}]", heads))
        packed[f"{name}.weight"] = Packing(int(transposed), within[name])
        packed[f"{name}.bias"] = Packing(0, within[name])
    return Layout(tuple(table), owns=("",), packed=packed)


def flat(params, part):
    """`[heads, size, D]` of a kernel."""
    return np.moveaxis(np.asarray(params[part]["kernel"]), 0, -1)


def whole(params):
    return np.concatenate([flat(params, x).reshape(-1, D) for x in ("query", "key", "value")])


def by_key_head(params):
    rows = []
    for k in range(K):
        rows += [flat(params, "query")[k * G + g] for g in range(G)]
        rows += [flat(params, "key")[k], flat(params, "value")[k]]
    return np.concatenate(rows)


def by_query_head(params):
    heads = [(flat(params, "query")[n], flat(params, "gate")[n]) for n in range(N)]
    return np.concatenate([part for head in heads for part in head])


QKV, QG = ("query", "key", "value"), ("query", "gate")
CASES = {
    "whole": ({"qkv": QKV, "g": ("gate",)}, {"qkv": None, "g": None}, "qkv", whole),
    "by key head": ({"qkv": QKV, "g": ("gate",)}, {"qkv": "K", "g": None}, "qkv", by_key_head),
    "by query head": (
        {"q": QG, "k": ("key",), "v": ("value",)},
        {"q": "N", "k": None, "v": None},
        "q",
        by_query_head,
    ),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_parts_of_one_array(case, dtype, transposed):
    groups, within, name, by_hand = CASES[case]
    config = CONFIG.replace(param_dtype=dtype)
    params = random_params(param_shapes(config, (1, D)), dtype=dtype)
    made = layout(groups, within, transposed)
    state = to_layout(made, params, config, "")
    kernel = state[f"{name}.weight"]
    assert (kernel == (by_hand(params).T if transposed else by_hand(params))).all()
    back = from_layout(made, state, config, "")
    for part, leaves in params.items():
        for leaf, array in leaves.items():
            assert np.asarray(back[part][leaf]).tobytes() == np.asarray(array).tobytes()


@pytest.mark.parametrize(
    ("case", "pattern"),
    [
        ("whole", r"`qkv.weight` must hold query, key and value along axis 0: 30 \+ 10 \+ 6 = 46"),
        ("by key head", r"along axis 0, head by head: 2 \* \(15 \+ 5 \+ 3\) = 46"),
        ("by query head", r"`q.weight` must hold query and gate .*: 6 \* \(5 \+ 3\) = 48"),
    ],
)
def test_a_packed_array_of_another_size(case, pattern):
    groups, within, name, _ = CASES[case]
    made = layout(groups, within)
    state = to_layout(made, random_params(param_shapes(CONFIG, (1, D))), CONFIG, "")
    state[f"{name}.weight"] = state[f"{name}.weight"][1:]
    with pytest.raises(ValueError, match=pattern):
        from_layout(made, state, CONFIG, "")


def test_one_array_a_head():
    assert heads_of("norms.{K}.weight", CONFIG) == ["norms.0.weight", "norms.1.weight"]
    assert heads_of("norm.weight", CONFIG) == ["norm.weight"]


# --- latents -------------------------------------------------------------------------------------

LATENT = MultiHeadAttentionConfig(
    3, 7, 5, use_bias=False, position=Rotary(dim=4), latent=Latent(rank=6, shared_dim=4)
)


def test_heads_that_keep_last_what_all_share():
    """Row by row: a file's head is its own 3 features, then 4 shared ones; here they come first."""
    made = Layout(
        (
            Entry(("query", "kernel"), "q.weight", "(N H) D"),
            Entry(("latent", "kernel"), "down.weight[latent]", "L C"),
            Entry(("shared_key", "kernel"), "down.weight[shared_key]", "W C"),
            Entry(("latent_norm", "scale"), "norm.weight", "L"),
            Entry(("key", "kernel"), "up.weight[key]", "(K U) L"),
            Entry(("value", "kernel"), "up.weight[value]", "(K V) L"),
            Entry(("attention_output", "kernel"), "o.weight", "E (N V)"),
        ),
        owns=("",),
        packed={"down.weight": Packing(0), "up.weight": Packing(0, "K")},
        shared_last=("q.weight",),
    )
    params = random_params(param_shapes(LATENT, (1, D)))
    state = to_layout(made, params, LATENT, "")
    query = np.asarray(params["query"]["kernel"])
    for head in range(3):
        rows = state["q.weight"][7 * head : 7 * head + 7]
        assert (rows[:3] == query[:, head, 4:].T).all()
        assert (rows[3:] == query[:, head, :4].T).all()
        up = state["up.weight"][8 * head : 8 * head + 8]
        assert (up[:3] == np.asarray(params["key"]["kernel"])[:, head].T).all()
        assert (up[3:] == np.asarray(params["value"]["kernel"])[:, head].T).all()
    assert (state["down.weight"][:6] == np.asarray(params["latent"]["kernel"]).T).all()
    back = from_layout(made, state, LATENT, "")
    for part, leaves in params.items():
        for leaf, array in leaves.items():
            assert np.asarray(back[part][leaf]).tobytes() == np.asarray(array).tobytes()
    state["q.weight"] = state["q.weight"][1:]
    with pytest.raises(ValueError, match=r"`q.weight` must be \[N H, D\] = \(21"):
        from_layout(made, state, LATENT, "")
