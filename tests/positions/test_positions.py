"""Rotary embedding, ALiBi and relative bias against formulas as loops, and papers' tables."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, random_params

from flax_mha import (
    MultiHeadAttentionConfig,
    attention_scores,
    init_params,
    multi_head_attention,
    param_shapes,
)
from flax_mha.layer.placement import restarted
from flax_mha.positions import (
    Alibi,
    LinearScaling,
    Llama3Scaling,
    RelativeBias,
    Rotary,
    YarnScaling,
    alibi_slopes,
)

B, T, N, H, D = 2, 7, 3, 8, 17


def turned(x, positions, rotary, frequencies):
    """One feature pair at a time, in float64."""
    x = np.asarray(x, np.float64)
    result, dim = x.copy(), 2 * len(frequencies)
    for b, t, n in np.ndindex(x.shape[:3]):
        for i, frequency in enumerate(frequencies):
            first = 2 * i if rotary.interleaved else i
            second = 2 * i + 1 if rotary.interleaved else i + dim // 2
            angle = positions[b, t] * frequency
            one, two = x[b, t, n, first], x[b, t, n, second]
            result[b, t, n, first] = one * math.cos(angle) - two * math.sin(angle)
            result[b, t, n, second] = two * math.cos(angle) + one * math.sin(angle)
    return result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 4])
def test_rotary_turns_pairs(interleaved, dim):
    rotary = Rotary(base=100.0, dim=dim, interleaved=interleaved)
    x, positions = normal(0, B, T, N, H), np.array([range(T), range(5, 5 + T)])
    size = dim or H
    frequencies = [100.0 ** (-2 * i / size) for i in range(size // 2)]
    assert_close(rotary(x, positions), turned(x, positions, rotary, frequencies), "float32")
    half = rotary(x.astype("bfloat16"), positions)
    assert half.dtype == jnp.bfloat16


def test_products_depend_on_the_difference_of_positions_alone():
    rotary, (x, y) = Rotary(), normal(0, 2, 1, 1, 1, H)
    at = lambda p, q: float((rotary(x, jnp.array([[p]])) * rotary(y, jnp.array([[q]]))).sum())
    assert at(3, 8) == pytest.approx(at(40, 45), abs=1e-5)
    assert at(3, 8) != pytest.approx(at(3, 9), abs=1e-2)


def test_linear_scaling_divides_positions():
    x, positions = normal(0, B, T, N, H), np.arange(T)[None]
    scaled = Rotary(scaling=LinearScaling(4.0))
    assert_close(scaled(x, positions * 4), Rotary()(x, positions), "float32")


def test_llama_3_scaling_band_by_band():
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    plain = Rotary(base=500000.0).frequencies(128)
    for frequency, scaled in zip(plain, Rotary(base=500000.0, scaling=scaling).frequencies(128)):
        length = 2 * math.pi / frequency
        if length < 8192 / 4:
            expected = frequency
        elif length > 8192:
            expected = frequency / 8
        else:
            smooth = (8192 / length - 1) / 3
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        assert scaled == pytest.approx(expected, rel=1e-12)


def test_yarn_scaling_pair_by_pair():
    factor, length, base, dim = 4.0, 2048, 10000.0, 64
    scaling = YarnScaling(factor, length)
    scaled = Rotary(base=base, scaling=scaling).frequencies(dim)
    at = lambda turns: dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
    low, high = math.floor(at(32)), math.ceil(at(1))
    for i, frequency in enumerate(scaled):
        ramp = min(max((i - low) / (high - low), 0), 1)
        plain = base ** (-2 * i / dim)
        assert frequency == pytest.approx(plain / factor * ramp + plain * (1 - ramp), rel=1e-12)
    assert scaled[0] == pytest.approx(1.0)
    assert scaled[-1] == pytest.approx(base ** (-(dim - 2) / dim) / factor)
    assert scaling.magnitude() == pytest.approx(0.1 * math.log(4) + 1)
    scaled = Rotary(base=base, scaling=YarnScaling(factor, length, truncate=False)).frequencies(dim)
    for i, frequency in enumerate(scaled):  # the ramp's ends between two pairs
        ramp = min(max((i - at(32)) / (at(1) - at(32)), 0), 1)
        plain = base ** (-2 * i / dim)
        assert frequency == pytest.approx(plain / factor * ramp + plain * (1 - ramp), rel=1e-12)
    gpt_oss, rounded = (
        Rotary(150000.0, scaling=YarnScaling(32.0, 4096, truncate=truncate)).frequencies(dim)
        for truncate in (False, True)
    )
    off = np.abs(rounded / gpt_oss - 1)  # by rounding, as measured with the transformers library
    assert off.argmax() == 17
    assert off.max() == pytest.approx(0.7626824732795565, rel=1e-6)
    x, at_zero = normal(0, 1, 1, 1, dim), jnp.zeros((1, 1), int)
    stretched = Rotary(scaling=scaling)(x, at_zero)
    assert_close(stretched, x * scaling.magnitude(), "float32")
    assert YarnScaling(4.0, 2048, attention_factor=1.0).magnitude() == 1.0


@pytest.mark.models
@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 4.0}, LinearScaling(4.0)),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            Llama3Scaling(),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
            YarnScaling(4.0, 2048),
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
            YarnScaling(32.0, 4096, truncate=False),
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_rotary_is_that_of_the_transformers_library(kind, ours):
    transformers = pytest.importorskip("transformers", reason="needs transformers and torch")
    torch = pytest.importorskip("torch", reason="needs torch")
    from transformers.models.llama import modeling_llama as llama

    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, rope_theta=10000.0, max_position_embeddings=8192
    )
    config.rope_parameters = {"rope_theta": 10000.0, **kind}
    x, positions = normal(0, B, 2, T, 64), np.arange(T)[None] + 90
    embedding = llama.LlamaRotaryEmbedding(config)
    query = torch.tensor(np.asarray(x))
    cos, sin = embedding(query, torch.tensor(positions))
    expected, _ = llama.apply_rotary_pos_emb(query, query, cos, sin)
    result = Rotary(scaling=ours)(x.swapaxes(1, 2), jnp.asarray(positions))
    np.testing.assert_allclose(result.swapaxes(1, 2), expected.numpy(), atol=3e-5)


# --- biases -------------------------------------------------------------------------------------


def test_alibi_s_slopes_are_the_paper_s():
    assert alibi_slopes(8).tolist() == [1 / 2**i for i in range(1, 9)]
    sixteen = [2 ** (-(i + 1) / 2) for i in range(16)]
    np.testing.assert_allclose(alibi_slopes(16), sixteen)
    np.testing.assert_allclose(alibi_slopes(12), sixteen[1::2] + sixteen[0:8:2])
    assert Alibi()(np.array([-3, 0, 2]), 2).tolist() == [
        [-3 / 16, 0, -2 / 16],
        [-3 / 256, 0, -2 / 256],
    ]


def bucket(distance, buckets, max_distance, bidirectional):
    """The paper's rule: exact buckets, then buckets that grow with the logarithm."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        apart = abs(distance)
    else:
        apart = max(-distance, 0)
    exact = buckets // 2
    if apart < exact:
        return first + apart
    steps = math.log(apart / exact) / math.log(max_distance / exact) * (buckets - exact)
    return first + min(exact + math.floor(steps + 1e-9), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 100), (8, 16), (320, 800)])
def test_t5_s_buckets(buckets, max_distance, bidirectional):
    distances = np.arange(-300, 301)
    ours = RelativeBias(buckets, max_distance, bidirectional).buckets(distances)
    expected = [bucket(int(d), buckets, max_distance, bidirectional) for d in distances]
    # On a border float32, which T5 computes in, may round to the bucket below.
    different = np.array(expected) - ours
    assert set(different.tolist()) <= {0, 1}
    assert (different != 0).sum() <= 4


def test_t5_s_default_buckets():
    """Up to 7 one each; from 8 on the borders are 8 * 2^(k / 2): 8, 11.3, 16, 22.6, 32, ... 128."""
    apart = np.array([0, 7, 8, 11, 12, 15, 16, 22, 23, 31, 32, 64, 91, 200])
    expected = [0, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 14, 15, 15]
    assert RelativeBias(32, 128).buckets(-apart).tolist() == expected
    assert (RelativeBias(32, 128).buckets(apart)[1:] == np.array(expected)[1:] + 16).all()


@pytest.mark.models
def test_t5_s_buckets_are_those_of_the_transformers_library():
    t5 = pytest.importorskip(
        "transformers.models.t5.modeling_t5", reason="needs transformers and torch"
    )
    import torch

    distances = np.arange(-1000, 1001)
    for bidirectional in (True, False):
        for buckets, max_distance in ((32, 128), (8, 20), (64, 256)):
            expected = t5.T5Attention._relative_position_bucket(
                torch.tensor(distances), bidirectional, buckets, max_distance
            )
            ours = RelativeBias(buckets, max_distance, bidirectional).buckets(distances)
            np.testing.assert_array_equal(ours, expected.numpy())


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("position", [Alibi(), RelativeBias(8, 16)], ids=["alibi", "t5"])
def test_a_layer_with_a_distance_bias_is_the_layer_with_a_dense_one(position, implementation):
    config = MultiHeadAttentionConfig(N, H, position=position, implementation=implementation)
    x, value = normal(1, B, T, D), normal(2, B, 5, D)
    params = random_params(param_shapes(config, x.shape))
    dense = np.zeros((N, T, 5), np.float32)
    for n, t, s in np.ndindex(*dense.shape):
        if isinstance(position, Alibi):
            dense[n, t, s] = -alibi_slopes(N)[n] * abs(s - t)
        else:
            table = np.asarray(params["relative_bias"]["embedding"])
            dense[n, t, s] = table[bucket(s - t, 8, 16, True), n]
    plain = {name: leaf for name, leaf in params.items() if name != "relative_bias"}
    expected = multi_head_attention(
        plain, x, value, config=config.replace(position=None), bias=jnp.asarray(dense)[None]
    )
    assert_close(multi_head_attention(params, x, value, config=config), expected, "float32")
    rows = jnp.array([4, 1])
    scores = attention_scores(params, x, value, config=config, query_rows=rows)
    _, whole = multi_head_attention(
        params, x, value, config=config.replace(implementation=None), return_attention_scores=True
    )
    assert_close(scores, whole[:, :, rows], "float32")


def test_the_bias_s_memory_is_linear():
    """No [T, S] array: the whole matrix of one head would be 64 MiB."""
    config = MultiHeadAttentionConfig(2, 16, position="relative_bias")
    x = jax.ShapeDtypeStruct((1, 4096, D), "float32")
    params = param_shapes(config, x.shape)
    loss = lambda params, x: (multi_head_attention(params, x, x, config=config) ** 2).sum()
    compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20


# --- in the layer -------------------------------------------------------------------------------


def test_positions_begin_anew_in_each_segment():
    ids = jnp.array([[5, 5, 5, 2, 2, 2, 2], [1, 1, 0, 0, 0, 1, 1]])
    assert restarted(ids).tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 2, 3]]
    config = MultiHeadAttentionConfig(N, H, position=Rotary(dim=4))
    x = normal(3, 1, T, D)
    params = random_params(param_shapes(config, x.shape))
    packed = multi_head_attention(
        params, x, x, config=config, segment_ids=ids[:1], use_causal_mask=True
    )
    for part in (x[:, :3], x[:, 3:]):
        alone = multi_head_attention(params, part, part, config=config, use_causal_mask=True)
        start = 0 if part.shape[1] == 3 else 3
        assert_close(packed[:, start : start + part.shape[1]], alone, "float32")


@pytest.mark.slow
def test_an_id_that_comes_back_counts_on():
    """It attends to its first run, so the two are one document: as if nothing stood between."""
    ids = np.random.default_rng(0).integers(-2, 3, size=(3, 40))
    counts = [[(row[:t] == row[t]).sum() for t in range(40)] for row in ids]
    assert restarted(jnp.asarray(ids)).tolist() == counts
    config = MultiHeadAttentionConfig(N, H, position="rotary")
    x, back = normal(3, 1, T, D), np.array([[1, 1, 2, 2, 1, 2, 1]])
    params = random_params(param_shapes(config, x.shape))
    call = dict(config=config, use_causal_mask=True)
    packed = multi_head_attention(params, x, x, segment_ids=back, **call)
    for document in (1, 2):
        joined = x[:, back[0] == document]
        alone = multi_head_attention(params, joined, joined, **call)
        assert_close(packed[:, back[0] == document], alone, "float32")
    _, scores = multi_head_attention(
        params, x, x, segment_ids=back, return_attention_scores=True, **call
    )
    rows = attention_scores(
        params, x, x, segment_ids=(back, back), query_rows=jnp.array([6]), **call
    )
    assert_close(rows, scores[:, :, 6:], "float32")


@pytest.mark.parametrize("shape", [(1, 0), (2, 1), (1, 5)])
def test_counts_of_few_tokens_and_of_one_document(shape):
    counts = restarted(jnp.full(shape, 7))
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, np.broadcast_to(np.arange(shape[1]), shape))


def test_explicit_positions():
    config = MultiHeadAttentionConfig(N, H, position="rotary")
    x = normal(4, B, T, D)
    params = random_params(param_shapes(config, x.shape))
    run = lambda **call: multi_head_attention(params, x, x, config=config, **call)
    shifted = jnp.arange(T)[None] + jnp.array([[0], [100]])
    assert_close(run(positions=shifted), run(), "float32")  # only differences count
    twice = run(positions=2 * jnp.arange(T)[None] + jnp.zeros((B, 1), int))
    assert np.abs(np.asarray(twice - run())).max() > 1e-2
    pair = run(positions=(shifted, shifted))
    assert_close(pair, run(positions=shifted), "float32")


def test_new_parameters_start_neutral():
    config = MultiHeadAttentionConfig(
        N, H, qk_norm="rms", use_sinks=True, position=RelativeBias(8, 16)
    )
    params = init_params(jax.random.key(0), config, (T, D))
    assert (params["query_norm"]["scale"] == 1).all()
    assert params["relative_bias"]["embedding"].shape == (8, N)
    assert not params["relative_bias"]["embedding"].any()
    assert not params["sinks"]["logits"].any()


# --- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "position",
    [
        "rotary",
        "alibi",
        RelativeBias(8, 16, False),
        Rotary(500.0, 4, True, YarnScaling(4, 64)),
        Rotary(scaling=Llama3Scaling()),
        Rotary(150000.0, scaling=YarnScaling(32.0, 4096, truncate=False)),
    ],
    ids=str,
)
def test_configs_go_to_json_and_back(position):
    config = MultiHeadAttentionConfig(N, H, position=position, qk_norm="l2", soft_cap=30)
    back = MultiHeadAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"position": "rotory"}, ValueError, r"one of \['rotary', 'alibi', 'relative_bias'\]"),
        ({"position": 3}, TypeError, "an object of flax_mha.positions"),
        ({"position": {"class_name": "Rotary", "config": {"bas": 3}}}, ValueError, "mean 'base'"),
        ({"soft_cap": 0}, ValueError, "`soft_cap` must be a finite number > 0"),
        ({"use_sinks": 2}, ValueError, "`use_sinks` must be True or False"),
    ],
)  # fmt: skip
def test_bad_configs(fields, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttentionConfig(N, H, **fields)


def test_bad_rotary():
    with pytest.raises(ValueError, match="must be even"):
        Rotary(dim=3)
    for make in (lambda: Rotary(interleaved="no"), lambda: YarnScaling(4, 64, truncate=None)):
        with pytest.raises(TypeError, match=r"(interleaved|truncate)` must be True or False"):
            make()
    with pytest.raises(TypeError, match=r"Rotary.scaling` must be a Scaling"):
        Rotary(scaling="llama3")
    config = MultiHeadAttentionConfig(N, 7, position="rotary")
    x = normal(7, B, T, D)
    with pytest.raises(ValueError, match=r"even number of features.*key_dim=7.*Set `dim`"):
        multi_head_attention(random_params(param_shapes(config, x.shape)), x, x, config=config)


@pytest.mark.parametrize("name", ["num_buckets", "max_distance"])
def test_t5_s_bias_has_four_buckets_and_distances_at_least(name):
    assert getattr(RelativeBias(**{"num_buckets": 4} | {name: 4}), name) == 4
    for number in (3, 1):
        with pytest.raises(ValueError, match=rf"\.{name}` must be at least 4.*={number}\."):
            RelativeBias(**{name: number})


@pytest.mark.parametrize(("buckets", "bidirectional"), [(32, True), (16, False), (512, True)])
def test_t5_s_bias_has_room_for_the_buckets_that_hold_several_distances(buckets, bidirectional):
    """From 0 / 0 came a bucket of -2^63, which a table reads as its first."""
    exact = buckets // 4 if bidirectional else buckets // 2
    for distance in (4, exact):
        with pytest.raises(ValueError, match=f"above the {exact} distances.*={distance}, num_buc"):
            RelativeBias(buckets, distance, bidirectional)
    bias = RelativeBias(buckets, exact + 1, bidirectional)
    found = bias.buckets(-np.array([exact - 1, exact, exact + 1, 3 * exact]))
    assert found.tolist() == [exact - 1, exact, 2 * exact - 1, 2 * exact - 1]


@pytest.mark.parametrize("turn", ["__call__", "of_query", "of_key"])
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_heads_that_are_no_floats_are_refused(turn, dtype):
    """Of whole numbers the turned ones were cut to whole numbers."""
    heads, positions = jnp.ones((1, 2, 1, 4), dtype), jnp.arange(2)[None]
    with pytest.raises(TypeError, match=rf"`x_BTNH` must be a floating-point.* {dtype}"):
        getattr(Rotary(), turn)(heads, positions)
