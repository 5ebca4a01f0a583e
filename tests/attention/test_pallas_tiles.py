"""The TPU kernel's tiles: which are visited, and what is refused; by arithmetic and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from kernel_cases import distances

from flax_mha import Mask, dot_product_attention, explain
from flax_mha.attention.pallas_tpu.plan import Plan
from flax_mha.attention.pallas_tpu.prepare import _ids, _offset
from flax_mha.attention.pallas_tpu.spans import NUMBERS, key_spans, query_spans, tiles

# The tiles of a kernel are of 128 at least; what is visited is told for any size.
T, S, B = 23, 29, 3
TILES = [(4, 8), (8, 4)]
BANDS = [(None, None), (None, 0), (0, None), (3, 3), (0, 0), (7, 0), (None, 5), (1, None), (2, 11)]


def plan_of(t, s, band, first=0, T=T, S=S):
    sizes = dict(B=B, K=1, G=1, H=8, V=8, t=t, s=s, T=-(-(T + first) // t) * t, S=-(-S // s) * s)
    fixed = dict(scale=1.0, soft_cap=None, rate=0.0, precision=None, interpret=True)
    return Plan(band=band, **sizes, **fixed)


def masks(band, rng):
    """Random offsets, padding and ids, sorted or not; each alone and all together."""
    booleans = lambda n: jnp.asarray(np.arange(n) < rng.integers(0, n + 1, (B, 1)))
    ids = lambda n: rng.integers(0, 4, (B, n))
    alone = Mask(band=band, query_offset=jnp.asarray(rng.integers(-30, 30, B)))
    yield alone
    padding = Mask.padding(booleans(T), booleans(S))
    ordered = Mask.segments(jnp.asarray(np.sort(ids(T), 1)), jnp.asarray(np.sort(ids(S), 1)))
    yield padding
    yield ordered
    yield Mask.segments(jnp.asarray(ids(T)), jnp.asarray(ids(S))) & alone
    yield padding & ordered & alone


def check_spans(spans, some, whole, most):
    """What one block visits of the other side: all that is needed, in at most `most` steps."""
    for number, needed, full in zip(spans, some, whole, strict=True):
        start, whole_start, whole_stop, stop = number
        visited = set(range(start, stop))
        assert set(np.flatnonzero(needed)) <= visited
        assert len(visited) <= most
        unmasked = visited & set(range(whole_start, whole_stop))
        assert unmasked <= set(np.flatnonzero(full))


def brute(mask, plan, first):
    """Booleans [B, Q, J]: tiles in which a pair may attend, and those whose own rows all may."""
    shape = (B, plan.query_blocks, plan.t, plan.key_blocks, plan.s)
    pairs, nobody = np.zeros((B, plan.T, plan.S), bool), np.ones((plan.T, 1), bool)
    pairs[:, first : first + T, :S] = np.asarray(mask.as_array(T, S))[:, 0]
    nobody[first : first + T] = False
    return pairs.reshape(shape).any((2, 4)), (pairs | nobody).reshape(shape).all((2, 4))


def seen_of(mask, plan, first):
    at = jnp.int32(first) if first else 0
    ids = _ids(plan, mask, at, T, S)
    return tiles(plan, _offset(mask.query_offset) - first, ids, dense=bool(mask.dense_masks))


@pytest.mark.slow
@pytest.mark.parametrize("first", [5, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_a_tile_with_a_pair_is_visited_and_a_whole_one_has_them_all(band, first):
    """`first` = the row at which the queries begin; the rows around them are nobody's."""
    rng = np.random.default_rng(BANDS.index(band))
    for (t, s), mask in zip(TILES * 5, [*masks(band, rng)] * 2):
        plan = plan_of(t, s, mask.band, first)
        some, whole = brute(mask, plan, first)
        seen = seen_of(mask, plan, first)
        assert (np.asarray(seen.some_bQJ) | ~some).all(), mask
        assert (whole | ~np.asarray(seen.all_bQJ)).all(), mask
        for spans, *sides, most in (
            (key_spans(seen), some, whole, plan.key_steps),
            (query_spans(seen), some.swapaxes(1, 2), whole.swapaxes(1, 2), plan.query_steps),
        ):
            numbers = np.asarray(spans).reshape(len(spans), -1, NUMBERS)
            for one in zip(np.broadcast_to(numbers, (B, *numbers.shape[1:])), *sides):
                check_spans(*one, most)


@pytest.mark.parametrize("band", BANDS, ids=str)
def test_a_band_visits_no_tile_too_many(band):
    """And looks at the mask only where it takes a part: of a tile of nobody's rows, too."""
    for (t, s), offset in zip(TILES * 4, (0, -9, 4, 40, -40, 11, 1, -1)):
        plan = plan_of(t, s, band)
        mask = Mask(band=band, query_offset=jnp.full(B, offset))
        pairs = np.asarray(mask.as_array(plan.T, plan.S))[:1, 0]
        pairs = pairs.reshape(1, plan.query_blocks, t, plan.key_blocks, s)
        seen = tiles(plan, _offset(mask.query_offset)[:1], [], dense=False)
        some, whole = pairs.any((2, 4)), pairs.all((2, 4))
        np.testing.assert_array_equal(np.broadcast_to(seen.some_bQJ, some.shape), some)
        np.testing.assert_array_equal(np.broadcast_to(seen.all_bQJ, some.shape), whole)


def test_causal_and_segments_visit_the_tiles_of_their_own():
    plan = plan_of(4, 4, (None, 0), T=32, S=32)
    numbers = key_spans(tiles(plan, jnp.zeros(1, "int32"), [], dense=False)).reshape(8, NUMBERS)
    assert numbers.tolist() == [[0, 0 if i else 8, i if i else 8, i + 1] for i in range(8)]
    ids = jnp.repeat(jnp.arange(4), 8)[None]
    plan = plan_of(4, 4, (None, None), T=32, S=32)
    numbers = key_spans(tiles(plan, jnp.zeros(1, "int32"), [(ids, ids)], dense=False))
    expected = [[i // 2 * 2, i // 2 * 2, i // 2 * 2 + 2, i // 2 * 2 + 2] for i in range(8)]
    assert numbers.reshape(8, NUMBERS).tolist() == expected


def shaped(T=300, S=None, B=2, N=4, H=16, dtype="float32"):
    return [jax.ShapeDtypeStruct((B, x, N, H), dtype) for x in (T, S or T, S or T)]


REFUSED = {
    "float16": (dict(), dict(dtype="float16"), r"computes in float32 and bfloat16.*are float16"),
    "weights": (dict(return_weights=True), {}, r"never holds the weights \[T, S\]"),
    "blocks of 96": (dict(block_sizes=(96, 128)), {}, r"multiples of 128, and are \(96, 128\)"),
    "blocks of a distance bias": (
        dict(block_sizes=(128, 256), distance_bias=distances(0, 4, 9, -4)),
        {},
        r"with a distance bias both block_sizes must be the same, and are \(128, 256\)",
    ),
    "blocks that are too large": (
        dict(block_sizes=(2048, 4096)),
        dict(T=8192, H=128),
        r"block_sizes \(2048, 4096\) need about 1\d\d MiB of VMEM.*may take 40.*"
        r"None takes \(1024, 1024\)",
    ),
}


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_interpreted"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, implementation):
    given, sizes, text = REFUSED[name]
    one = lambda *arrays: dot_product_attention(*arrays, implementation=implementation, **given)
    with pytest.raises(NotImplementedError, match=f"(?s){implementation}.*cannot serve.*{text}"):
        jax.eval_shape(one, *shaped(**sizes))
    reasons = explain(*shaped(**sizes), platform="tpu", **given)
    assert reasons[implementation] != "ok"
    others = [x for x, reason in reasons.items() if reason.startswith("ok")]
    assert any("None chooses it" in reasons[x] for x in others)


def test_on_another_platform_it_says_what_runs_there():
    arrays = [normal(i, 1, 130, 2, 8) for i in range(3)]
    text = r"(?s)'pallas_tpu' is a kernel for TPU\..*a program for cpu.*runs blockwise here"
    with pytest.raises(NotImplementedError, match=text):
        dot_product_attention(*arrays, implementation="pallas_tpu")
    assert "is for cpu" in explain(*arrays, platform="cpu")["pallas_tpu"]


@pytest.mark.parametrize(("kind", "refused"), [("TPU v4", True), ("TPU v5 lite", False)])
def test_a_chip_with_little_vmem_is_refused_and_none_runs_blocks(kind, refused, monkeypatch):
    chip = type("Chip", (), {"device_kind": kind})
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [chip])
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), "bfloat16")
    found = explain(x, x, x)
    assert ("64 MiB, and this is a TPU v4" in found["pallas_tpu"]) == refused
    assert ("None chooses it" in found["blockwise"]) == refused
