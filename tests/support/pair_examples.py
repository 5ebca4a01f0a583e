"""The one table of attention by functions; every implementation serves or refuses each row."""

import contextlib
import os

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close
from implementations import HERE, SLOW
from kernel_cases import QUICKLY
from pair_joined import JOINED
from pair_masks import MASKS
from pair_oracles import attend, probe_of, split, with_gradients
from pair_scores import SCORES

CASES = {
    **{f"mask, {name}": example for name, example in MASKS.items()},
    **{f"joined, {name}": example for name, example in JOINED.items()},
    **{f"score, {name}": example for name, example in SCORES.items()},
}

# implementation -> the scale of its rows and its blocks: several tiles, the last of them ragged.
BLOCKS = {
    "reference": [("small", None)],
    "blockwise": [("small", (8, 4)), ("small", (4, 16))],
    "pallas_interpreted": [("large", (128, 128))],
}
ROWS = [
    pytest.param(
        name,
        scale,
        blocks,
        marks=[pytest.mark.slow] if i or name in SLOW else [],
        id=f"{name}-{scale}-{blocks}",
    )
    for name in HERE
    for i, (scale, blocks) in enumerate(BLOCKS[name])
]
EVERY_ROW = "EVERY_ROW" in os.environ


def in_turns():
    """(name, *row) of each case: every second one in blocks, the others by the rest, in turns.

    With EVERY_ROW in the environment, each with every row.
    """
    turns = [("blockwise", 0), ("reference", 0), ("blockwise", 1), ("pallas_interpreted", 0)]
    chosen = []
    for i, name in enumerate(CASES):
        implementation, size = turns[i % 4]
        mine = (implementation, *BLOCKS[implementation][size])
        for row in ROWS:
            if EVERY_ROW or row.values == mine:
                param = pytest.param(name, *row.values, marks=row.marks, id=f"{name}-{row.id}")
                chosen.append(param)
    return chosen


PLAIN = pytest.mark.parametrize(
    ("implementation", "blocks"), [("reference", None), ("blockwise", (8, 4))]
)

# implementation -> {case: the regex of its reason}; a success that is not expected fails.
LOOKS_UP = r"looks? up"
REFUSED = {
    "reference": {},
    "blockwise": {},
    "pallas_interpreted": {
        # one number found by the query and the key at once
        "mask, BigBird": LOOKS_UP,
        "mask, random blocks": LOOKS_UP,
        "mask, table of pairs": LOOKS_UP,
        "mask, table of distances": LOOKS_UP,
        "joined, dense or causal": LOOKS_UP,
        "score, T5": LOOKS_UP,
        "score, T5 by formula": LOOKS_UP,
        "score, relative table": LOOKS_UP,
        "score, relative table, from its end": LOOKS_UP,
        "score, relative table, clipped": LOOKS_UP,
        "score, Swin": LOOKS_UP,
        "score, BEiT": LOOKS_UP,
        "score, table of pairs": LOOKS_UP,
        "score, Graphormer": LOOKS_UP,
        "score, DeBERTa": LOOKS_UP,
        # more than one number for a pair
        "score, features": r"vector|dot_general",
        "score, Sandwich": r"vector|reduce_sum",
    },
}


def run(example, implementation, blocks, scale="small", dtype="float32", sizes=None, **options):
    """{context, and the gradient of each array of floats}, compiled."""
    sizes = example.sizes(scale) if sizes is None else sizes
    arrays = example.all_arrays(dtype=dtype, sizes=sizes)
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    options |= {"implementation": implementation, "block_sizes": blocks}
    function = lambda arrays: attend(example, sizes, arrays, **options)
    probe = probe_of(sizes).astype(jnp.result_type(float))
    compiler = QUICKLY if implementation in SLOW else None
    whole = lambda arrays: with_gradients(function, arrays, probe)
    return jax.jit(whole, compiler_options=compiler)(arrays)


def served(name, implementation):
    """Nothing, where it is served; else what holds that it is refused, and for the reason."""
    if name in REFUSED[implementation]:
        return pytest.raises(NotImplementedError, match=REFUSED[implementation][name])
    return contextlib.nullcontext()


def assert_all_close(results, wanted, dtype, what, scale=0.0):
    assert results.keys() == wanted.keys(), what
    for name, x in wanted.items():
        assert_close(results[name], x, dtype, f"{what}: {name}", scale)


def closed(name):
    """What a case closes over, as JAX's arrays."""
    return {x: jnp.asarray(array) for x, array in split(CASES[name].all_arrays())[1].items()}
