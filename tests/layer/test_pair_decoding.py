"""Functions of pairs with a cache: t and s are positions, whatever the slots and the steps are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, normal, random_params

from flax_mha import (
    Latent,
    Mask,
    MultiHeadAttentionConfig,
    init_cache,
    init_cross_cache,
    multi_head_attention,
    param_shapes,
)
from flax_mha.positions import Rotary, Score

B, T, D, N = 3, 11, 17, 4
LENGTHS = np.array([11, 5, 8])
# A prompt of another length for each example, a chunk, tokens one by one.
PIECES = [(5, 1, 3), (5, 3, 2), (1, 1, 1), (0, 0, 1), (0, 0, 1)]
X = normal(0, B, T, D)
IDS = jnp.asarray(np.random.default_rng(1).integers(0, 2, (B, T)))
PREFIX = jnp.array([2, 1, 4])

MASKS = {
    "documents": lambda: Mask.function(lambda b, n, t, s: (IDS[b, t] == IDS[b, s]) | (s == t)),
    "of the head": lambda: Mask.function(lambda b, n, t, s: (t - s) % (n + 1) == 0),
    "prefix": lambda: Mask.window(1, 0) | Mask.prefix(PREFIX),
    "complement and band": lambda: ~Mask.window(3, 0) | Mask.window(1, 0),
    "band": lambda: Mask.window(2, 0),
    "functions of a union": lambda: (
        Mask.function(lambda b, n, t, s: s % 2 == t % 2)
        | (Mask.causal() & ~Mask.function(lambda b, n, t, s: t < 4))
    ),
}
RATES = jnp.asarray(np.random.default_rng(2).random((B, T)), "float32")


class ByDocument(Score):
    """Farther is less within a document, by a rate of the query; and a bias of the key's place."""

    def __call__(self, logits, b, n, t, s):
        apart = (t - s).astype(logits.dtype)
        return jnp.where(IDS[b, t] == IDS[b, s], logits - RATES[b, t] * apart, logits) + RATES[b, s]


@dataclasses.dataclass(frozen=True)
class ByDistance(Score):
    """A table of each head, and a temperature."""

    reach: int = 3

    def param_sizes(self, num_heads):
        return {"table": {"X": self.reach + 1, "N": num_heads}, "temperature": {"N": num_heads}}

    def __call__(self, logits, b, n, t, s, table, temperature):
        entry = jnp.minimum(t - s, self.reach)
        return logits * (1 + temperature[n]) + table[entry, n]


SCORES = {"by document": ByDocument(), "by distance": ByDistance()}
LAYERS = {
    "line": {},
    "ring": {"sliding_window": 4},
    "wide ring": {"sliding_window": 8, "num_kv_heads": 2},
    "chunks": {"chunk_size": 4, "position": "rotary"},
    "biases": {"position": "alibi", "use_sinks": True},
    "latent": {
        "latent": Latent(rank=7, shared_dim=2),
        "position": Rotary(dim=2),
        "use_bias": False,
    },
}


@functools.cache
def layer_of(name, **fields):
    config = MultiHeadAttentionConfig(N, 6, value_dim=5, **LAYERS[name], **fields)
    return config, random_params(param_shapes(config, X.shape))


def one_pass(params, config, **call):
    return multi_head_attention(params, X, X, config=config, use_causal_mask=True, **call)


def in_pieces(params, config, pieces=PIECES, slack=0, **call):
    """The outputs of every example's real tokens, fed in ragged pieces, padding taken out."""
    cache = init_cache(config, B, T, slack=slack)
    taken, outputs = np.zeros(B, int), [[] for _ in range(B)]
    step = jax.jit(
        lambda x, real, cache: multi_head_attention(
            params, x, x, config=config, cache=cache, value_mask=real, **call
        )
    )
    for counts in pieces:
        width = max(counts)
        x = np.full((B, width, D), np.nan, np.float32)  # padding may hold anything
        for b, count in enumerate(counts):
            x[b, :count] = X[b, taken[b] : taken[b] + count]
        output, cache = step(x, np.arange(width) < np.array(counts)[:, None], cache)
        for b, count in enumerate(counts):
            outputs[b].append(np.asarray(output)[b, :count])
        taken += counts
    return [np.concatenate(parts) for parts in outputs]


def assert_same(outputs, expected):
    for b, output in enumerate(outputs):
        assert_close(output, np.asarray(expected)[b, : len(output)], "float32", f"example {b}")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", MASKS)
def test_steps_with_a_mask_are_one_pass(name, layer):
    config, params = layer_of(layer)
    expected = one_pass(params, config, attention_mask=MASKS[name]())
    assert_same(in_pieces(params, config, attention_mask=MASKS[name]()), expected)
    # The mask has something to say here.
    assert abs(np.asarray(expected - one_pass(params, config))).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", SCORES)
def test_steps_with_a_score_are_one_pass(name, layer):
    config, params = layer_of(layer, score=SCORES[name])
    mask = MASKS["documents"]()
    expected = one_pass(params, config, attention_mask=mask)
    assert_same(in_pieces(params, config, attention_mask=mask), expected)
    without = {x: leaves for x, leaves in params.items() if x != "score"}
    plain = one_pass(without, config.replace(score=None), attention_mask=mask)
    assert abs(np.asarray(expected - plain)).max() > 1e-2


@pytest.mark.slow
def test_a_ring_that_goes_round_with_room_to_go_back():
    """Slots of the ring: 4 for the window and 3 more; each piece goes round a little further."""
    config, params = layer_of("ring")
    mask = MASKS["documents"]()
    expected = one_pass(params, config, attention_mask=mask)
    further, at_once = [(3, 3, 3), (4, 2, 4), (4, 0, 1)], [(9, 5, 8), (1, 0, 0), (1, 0, 0)]
    for slack, pieces in ((3, further), (0, at_once)):
        assert_same(in_pieces(params, config, pieces, slack, attention_mask=mask), expected)


@pytest.mark.slow
def test_one_trace_of_a_step_while_the_mask_s_arrays_change():
    config, params = layer_of("line")
    traces = []

    @jax.jit
    def step(x, ids, cache):
        traces.append(x.shape)
        mask = Mask.function(lambda b, n, t, s: ids[b, t] == ids[b, s])
        return multi_head_attention(params, x, x, config=config, cache=cache, attention_mask=mask)

    for ids in (IDS, 1 - IDS, IDS * 0):
        cache, outputs = init_cache(config, B, T), []
        for t in range(4):
            output, cache = step(X[:, t : t + 1], ids, cache)
            outputs.append(output)
        mask = Mask.function(lambda b, n, t, s, ids=ids: ids[b, t] == ids[b, s])
        expected = one_pass(params, config, attention_mask=mask)
        assert_close(jnp.concatenate(outputs, 1), expected[:, :4], "float32")
    assert len(traces) == 1


@pytest.mark.slow
def test_a_prefix_that_sees_itself_and_then_causal_order():
    """What a cache of `is_causal=False` does by its first call, a mask says of every pair."""
    config, params = layer_of("line")
    mask = Mask.causal() | Mask.prefix(4)
    expected = multi_head_attention(params, X, X, config=config, attention_mask=mask)
    cache, outputs = init_cache(config, B, T, is_causal=False), []
    for piece in (X[:, :4], X[:, 4:7], X[:, 7:]):
        call = dict(config=config, cache=cache, attention_mask=mask)
        output, cache = multi_head_attention(params, piece, piece, **call)
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), expected, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("latent", [False, True])
def test_an_encoder_s_keys_stand_in_their_slots_and_queries_count_on(latent):
    S = 7
    config, _ = layer_of("latent" if latent else "line", score=ByDistance())
    encoded = normal(2, B, S, D)
    params = random_params(param_shapes(config, X.shape, encoded.shape))
    real = jnp.asarray(np.arange(S) < np.array([[7], [4], [5]]))
    mask = Mask.function(lambda b, n, t, s: (s * 2 <= t + n) | (s == IDS[b, t])) & Mask.window(9, 4)
    call = dict(config=config, attention_mask=mask)
    expected = multi_head_attention(params, X, encoded, value_mask=real, **call)
    cache, outputs = init_cross_cache(params, encoded, config=config, value_mask=real), []
    for piece in (X[:, :4], X[:, 4:5], X[:, 5:]):
        output, cache = multi_head_attention(params, piece, None, cache=cache, **call)
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), expected, "float32")


@pytest.mark.slow
def test_gradients_through_steps():
    config, params = layer_of("ring", score=ByDistance())
    mask = MASKS["documents"]()

    def stepped(params, x):
        cache, outputs = init_cache(config, B, T), []
        for piece in (x[:, :5], x[:, 5:6], x[:, 6:]):
            call = dict(config=config, cache=cache, attention_mask=mask)
            output, cache = multi_head_attention(params, piece, piece, **call)
            outputs.append(output)
        return (jnp.concatenate(outputs, 1) ** 2).sum()

    def whole(params, x):
        call = dict(config=config, use_causal_mask=True, attention_mask=mask)
        return (multi_head_attention(params, x, x, **call) ** 2).sum()

    actual, expected = (jax.jit(jax.grad(f, (0, 1)))(params, X) for f in (stepped, whole))
    assert_trees_close(actual, expected, "float32")


class ByRoot(Score):
    """Of positions alone: below 0 there is no root, and 0 times NaN would be the gradient."""

    def param_sizes(self, num_heads):
        return {"weight": {"N": num_heads}}

    def __call__(self, logits, b, n, t, s, weight):
        return logits - weight[n] * jnp.sqrt(s.astype(logits.dtype))


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 3])
def test_slots_of_a_ring_that_were_never_written_have_no_place_below_zero(first):
    config, params = layer_of("ring", score=ByRoot())

    def loss(params, cache):
        piece = X[:, :first]
        call = dict(config=config, cache=cache)
        return (multi_head_attention(params, piece, piece, **call)[0] ** 2).sum()

    gradient = jax.grad(loss)(params, init_cache(config, B, T))
    whole = lambda params: (one_pass(params, config)[:, :first] ** 2).sum()
    assert_trees_close(gradient, jax.grad(whole)(params), "float32")


@pytest.mark.slow
def test_a_scan_over_tokens_under_vmap():
    """Caches of one sequence: each has its own array, and is example 0."""
    config, params = layer_of("ring", score=ByDistance())

    def decode(x, ids):
        def step(cache, token):
            mask = Mask.function(lambda b, n, t, s: (ids[t] == ids[s]) | (s == t + b))
            call = dict(config=config, cache=cache, attention_mask=mask)
            output, cache = multi_head_attention(params, token[None], token[None], **call)
            return cache, output[0]

        return jax.lax.scan(step, init_cache(config, (), T), x)[1]

    expected = one_pass(params, config, attention_mask=MASKS["documents"]())
    assert_close(jax.jit(jax.vmap(decode))(X, IDS), expected, "float32")


@pytest.mark.slow
def test_beams_take_their_examples_rows():
    """`reorder` moves examples: the function then sees the new example's index."""
    config, params = layer_of("line")
    mask = MASKS["of the head"]()
    call = dict(config=config, attention_mask=mask)
    prompt, cache = X[:, :4], init_cache(config, B, T)
    _, cache = multi_head_attention(params, prompt, prompt, cache=cache, **call)
    rows = jnp.array([2, 2, 0])
    output, _ = multi_head_attention(
        params, X[rows, 4:5], X[rows, 4:5], cache=cache.reorder(rows), **call
    )
    assert_close(output, one_pass(params, config, attention_mask=mask)[rows, 4:5], "float32")


@pytest.mark.parametrize(
    ("mask", "parts"),
    [
        (Mask.dense(np.ones((T, T), bool)), "dense_masks"),
        (Mask.causal() | Mask.padding(key=np.ones(T, bool)), "key_padding"),
        (~Mask.segments(IDS, IDS), "segment_ids"),
        (Mask.padding(query=np.ones(T, bool)), "query_padding"),
    ],
    ids=["dense", "padding", "segments", "query"],
)
@pytest.mark.parametrize("cross", [False, True])
def test_a_mask_with_arrays_of_queries_and_keys_is_refused(mask, parts, cross):
    config, params = layer_of("line")
    cache = init_cross_cache(params, X, config=config) if cross else init_cache(config, B, T)
    value = None if cross else X[:, :2]
    with pytest.raises(NotImplementedError, match=rf"by positions.*{parts}.*`Mask.function"):
        multi_head_attention(
            params, X[:, :2], value, config=config, cache=cache, attention_mask=mask
        )


def test_an_array_with_a_cache_is_refused_as_it_was():
    config, params = layer_of("line")
    with pytest.raises(NotImplementedError, match=r"`attention_mask` cannot.*`Mask.function\(f\)`"):
        multi_head_attention(
            params,
            X[:, :2],
            X[:, :2],
            config=config,
            cache=init_cache(config, B, T),
            attention_mask=np.ones((2, 2), bool),
        )
