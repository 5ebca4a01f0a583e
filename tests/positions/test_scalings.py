"""Scalings of rotary frequencies and slopes of ALiBi: formulas pair by pair, and the library's."""

import json
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import MultiHeadAttentionConfig
from flax_mha.positions import (
    Alibi,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rotary,
    YarnScaling,
    alibi_slopes,
)

HEAD = 16
LONG = [1.0, 1.02, 1.1, 2.0, 3.5, 9.0, 21.0, 64.0]
SHORT = [1.0, 1.0, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4]


def test_longrope_divides_each_pair():
    scaling = LongRopeScaling(LONG, factor=32.0, original_length=4096)
    for i, frequency in enumerate(Rotary(scaling=scaling).frequencies(HEAD)):
        assert frequency == pytest.approx(10000.0 ** (-2 * i / HEAD) / LONG[i], rel=1e-14)
    # Phi-3: sqrt(1 + ln 32 / ln 4096) = sqrt(1 + 5 / 12)
    assert scaling.magnitude() == pytest.approx(math.sqrt(17 / 12), rel=1e-14)
    assert LongRopeScaling(LONG).magnitude() == 1.0
    assert LongRopeScaling(LONG, factor=0.5, original_length=64).magnitude() == 1.0
    assert LongRopeScaling(LONG, factor=4.0, attention_factor=1.3).magnitude() == 1.3


def test_dynamic_scaling_is_a_larger_base():
    for length, grown in ((1000, 1.0), (2048, 1.0), (4096, 3 * 2 - 2), (20480, 3 * 10 - 2)):
        scaling = DynamicScaling(factor=3.0, original_length=2048, length=length)
        base = 10000.0 * grown ** (HEAD / (HEAD - 2))
        expected = [base ** (-2 * i / HEAD) for i in range(HEAD // 2)]
        np.testing.assert_allclose(Rotary(scaling=scaling).frequencies(HEAD), expected, rtol=1e-13)
    assert Rotary(scaling=scaling).frequencies(2).tolist() == [1.0]


def test_proportional_scaling_lets_the_slow_pairs_stay():
    frequencies = Rotary(scaling=ProportionalScaling(0.25, 2.0)).frequencies(HEAD)
    assert frequencies[:2].tolist() == [0.5, pytest.approx(0.5 * 10000.0 ** (-2 / HEAD))]
    assert not frequencies[2:].any()
    x = jnp.ones((1, 2, 1, HEAD))
    turned = Rotary(scaling=ProportionalScaling(0.25))(x, jnp.array([[0, 10**6]]))
    still = np.asarray(turned)[0, 1, 0].reshape(2, -1)[:, 2:]
    assert (still == 1).all()  # exactly


def test_yarn_s_two_magnitudes():
    """DeepSeek: one grown by mscale over one grown by mscale_all_dim."""
    grown = lambda m: 0.1 * m * math.log(40) + 1
    yarn = lambda **fields: YarnScaling(40.0, 4096, **fields).magnitude()
    assert yarn(mscale=0.707, mscale_all_dim=1.2) == pytest.approx(grown(0.707) / grown(1.2))
    assert yarn(mscale=1.0, mscale_all_dim=1.0) == 1.0
    for alone in ({"mscale": 0.7}, {"mscale_all_dim": 0.7}, {"mscale": 0.7, "mscale_all_dim": 0}):
        assert yarn(**alone) == pytest.approx(grown(1))
    assert yarn(mscale=0.7, mscale_all_dim=1.2, attention_factor=1.5) == 1.5
    assert YarnScaling(0.5, 64, mscale=0.7, mscale_all_dim=1.2).magnitude() == 1.0


SCALED = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, LinearScaling(3.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0}, DynamicScaling(3.0, 128, 500)),
    "dynamic-short": ({"rope_type": "dynamic", "factor": 3.0}, DynamicScaling(3.0, 128, 100)),
    "proportional": (
        {"rope_type": "proportional", "partial_rotary_factor": 0.4, "factor": 2.0},
        ProportionalScaling(0.4, 2.0),
    ),
    "proportional-all": ({"rope_type": "proportional"}, ProportionalScaling(1.0)),
    "llama3": (
        {"rope_type": "llama3", "factor": 7.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0},
        Llama3Scaling(7.0, 1.5, 3.0, 100),
    ),
    "longrope-long": (
        {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT},
        LongRopeScaling(LONG, 1.28, 100),
    ),
    "longrope-short": (
        {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT, "factor": 9.0},
        LongRopeScaling(SHORT, 9.0, 100),
    ),
    "longrope-attention": (
        {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT, "factor": 9.0,
         "attention_factor": 1.7},
        LongRopeScaling(LONG, 9.0, 100, attention_factor=1.7),
    ),
    **{
        "yarn-" + "-".join(fields): (
            {"rope_type": "yarn", "factor": 6.0, **fields}, YarnScaling(6.0, 100, **fields)
        )
        for fields in (
            {"beta_fast": 8.0},
            {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
            {"mscale": 0.7, "mscale_all_dim": 1.4},
            {"mscale": 0.7},
            {"mscale_all_dim": 0.7, "attention_factor": 0.9},
        )
    },
}  # fmt: skip


def theirs(kind, original=100, partial=None, length=None):
    """(frequencies, magnitude) of the transformers library."""
    utils = pytest.importorskip(
        "transformers.modeling_rope_utils", reason="needs transformers and torch"
    )
    rope = {"rope_theta": 5e5, "original_max_position_embeddings": original, **kind}
    config = types.SimpleNamespace(
        rope_parameters=rope, head_dim=HEAD, hidden_size=2 * HEAD, num_attention_heads=2,
        max_position_embeddings=128, standardize_rope_params=lambda: None,
    )  # fmt: skip
    if partial is not None:
        rope["partial_rotary_factor"] = partial
    values, factor = utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, seq_len=length)
    return values.double().numpy(), factor


@pytest.mark.models
@pytest.mark.parametrize("name", SCALED)
def test_scalings_are_those_of_the_transformers_library(name):
    kind, ours = SCALED[name]
    length = {"dynamic": 500, "longrope-short": 90}.get(name, 500 if "long" in name else None)
    expected, factor = theirs(kind, length=length)
    rotary = Rotary(base=5e5, scaling=ours)
    np.testing.assert_allclose(rotary.frequencies(HEAD), expected, rtol=5e-7, atol=1e-12)
    assert ours.magnitude() == pytest.approx(factor, rel=1e-7)


@pytest.mark.models
def test_a_part_of_the_head():
    """`Rotary(dim=)` is partial_rotary_factor, except where frequencies are proportional."""
    for name in ("linear", "yarn-beta_fast", "llama3", "dynamic"):
        kind, ours = SCALED[name]
        expected, _ = theirs(kind, partial=0.5, length=500)
        found = Rotary(base=5e5, dim=HEAD // 2, scaling=ours).frequencies(HEAD)
        np.testing.assert_allclose(found, expected, rtol=5e-7, atol=1e-12)


@pytest.mark.models
@pytest.mark.parametrize("original", [3, 5, 2**20])
def test_yarn_s_ramp_outside_of_the_head(original):
    """Lengths whose ramp begins or ends before the first pair, or behind the last."""
    for truncate in (True, False):
        expected, _ = theirs({"rope_type": "yarn", "factor": 6.0, "truncate": truncate}, original)
        ours = Rotary(base=5e5, scaling=YarnScaling(6.0, original, truncate=truncate))
        np.testing.assert_allclose(ours.frequencies(HEAD), expected, rtol=5e-7, atol=1e-12)


# --- configs and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SCALED, "alibi"])
def test_scalings_go_to_json_and_back(name):
    position = Alibi(0.3, 5.0) if name == "alibi" else Rotary(scaling=SCALED[name][1])
    config = MultiHeadAttentionConfig(2, HEAD, position=position)
    back = MultiHeadAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LongRopeScaling(3.0), TypeError, "numbers > 0, one for each pair"),
        (lambda: LongRopeScaling([1.0, -1.0]), ValueError, "finite number > 0"),
        (lambda: LongRopeScaling(LONG, factor=4.0), ValueError, "Pass it, or `attention_factor`"),
        (lambda: LongRopeScaling(LONG, factor=4.0, original_length=1), ValueError, "Pass it"),
        (
            lambda: Rotary(scaling=LongRopeScaling(LONG)).frequencies(8),
            ValueError,
            "8 factors, 4 pairs",
        ),
        (lambda: DynamicScaling(2.0, 0, 5), ValueError, "positive integer"),
        (lambda: ProportionalScaling(1.5), ValueError, r"in \(0, 1\]"),
        (lambda: ProportionalScaling(0), ValueError, "finite number > 0"),
        (lambda: Llama3Scaling(8.0, 4.0, 4.0), ValueError, "below `high_freq_factor`"),
        (lambda: YarnScaling(4.0, 64, mscale=-1), ValueError, "finite number >= 0"),
        (lambda: Alibi(factor=0), ValueError, "finite number > 0"),
        (lambda: Alibi(max_bias=-8), ValueError, "finite number > 0"),
    ],
)
def test_bad_scalings(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- ALiBi --------------------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.parametrize("num_heads", [1, 2, 6, 8, 12])
@pytest.mark.parametrize("max_bias", [8.0, 4.0])
def test_slopes_of_mpt(num_heads, max_bias):
    """MPT's own rule: those of the power above, every second one first."""
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2 ** (-max_bias * n / power) for n in range(1, power + 1)]
    expected = slopes if power == num_heads else (slopes[1::2] + slopes[::2])[:num_heads]
    np.testing.assert_allclose(alibi_slopes(num_heads, max_bias), expected, rtol=1e-14)
    bias = Alibi(factor=0.25, max_bias=max_bias)(np.array([-3, 0, 2]), num_heads)
    np.testing.assert_allclose(bias, 0.25 * np.outer(expected, [-3, 0, -2]), rtol=1e-6)
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt", reason="needs transformers")
    theirs = mpt.build_mpt_alibi_tensor(num_heads, 5, max_bias).numpy()[:, 0]
    ours = Alibi(max_bias=max_bias)(np.arange(-4, 1), num_heads)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_longrope_of_other_heads_says_what_does_not_fit():
    said = r"each pair of features that turn\. Received: 8 factors, 4 pairs\. Set `Rotary\(dim="
    with pytest.raises(ValueError, match=said):
        Rotary(scaling=LongRopeScaling(LONG)).frequencies(8)
