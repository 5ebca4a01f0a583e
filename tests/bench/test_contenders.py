"""Every contender computes the textbook's numbers, or is refused with its reason."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import SMALL, ours_but
from helpers import assert_close
from implementations import ELSEWHERE

from flax_mha.bench import peers
from flax_mha.bench.cases import Case
from flax_mha.bench.check import LIMITS, Wrong, check, relative_error
from flax_mha.bench.data import make_data
from flax_mha.bench.peers.contract import Absent, Contender, Unserved
from flax_mha.bench.textbook import Expected, expect

pytestmark = [
    pytest.mark.usefixtures("peers_promote"),
    pytest.mark.filterwarnings("ignore"),  # equinox, haiku and torch warn when imported
]


def _require(name):
    """Peers come with the extra `bench`; without one of them there is nothing to compare with."""
    try:
        peers.require(name)
    except Absent as reason:
        pytest.skip(f"{name}: {reason}")


@functools.cache
def _prepared(label):
    """(case, data, the textbook's numbers), compiled once."""
    case = Case.parse(label)
    data = make_data(case)
    return case, data, expect(case, data)


def _agree(name, label):
    """Builds a contender, and asserts that its numbers are the textbook's to 1e-5."""
    _require(name)
    case, data, expected = _prepared(label)
    assert check(peers.builder(name)(case, data), case, expected) < 1e-5


@pytest.mark.parametrize("name", ["ours", *peers.PEERS])
def test_everyone_computes_the_textbooks_gradients(name):
    _agree(name, f"{SMALL} FB causal")


@pytest.mark.parametrize("name", ["ours", *peers.PEERS])
def test_everyone_computes_the_textbooks_output(name):
    _agree(name, f"{SMALL} F")


VARIANTS = (
    "F",
    "F causal",
    "F causal window=3",
    "FB",
    "FB causal",
    "FB window=2",
    "FB dropout=0.3",
)
# Of each contender's, those that the two tests above do not ask of it.
REST = [
    (name, variant)
    for name in peers.CONTENDERS
    for variant in VARIANTS
    if variant not in ("F", "FB causal") or name not in ("ours", *peers.PEERS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), REST)
def test_every_contender_in_every_variant(name, variant):
    if name.removeprefix("ours/") in ELSEWHERE:
        case, data, _ = _prepared(f"{SMALL} {variant}")
        with pytest.raises(Unserved, match=ELSEWHERE[name.removeprefix("ours/")]):
            peers.builder(name)(case, data)
    elif name == "haiku" and "dropout" in variant:
        _require(name)
        case, data, _ = _prepared(f"{SMALL} {variant}")
        with pytest.raises(Unserved, match="has no dropout"):
            peers.builder(name)(case, data)
    else:
        _agree(name, f"{SMALL} {variant}")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["FB causal", "F", "F window=2"])
def test_textbook_is_the_equation_in_float64(variant):
    """Loops over heads and queries in NumPy, against the textbook and so against everyone."""
    case, data, expected = _prepared(f"{SMALL} {variant}")
    assert_close(expected.output_BTE, _loops(case, data), "float32")
    if case.gradient:
        x = np.asarray(data.x_BTD, np.float64)
        step = np.zeros_like(x)
        step[1, 2, 3] = 1e-6
        sums = [np.square(_loops(case, data, x + sign * step)).sum() for sign in (1, -1)]
        slope = (sums[0] - sums[1]) / 2e-6
        assert expected.x_gradient_BTD[1, 2, 3] == pytest.approx(slope, rel=1e-4)


def _loops(case, data, x=None):
    x = np.asarray(data.x_BTD, np.float64) if x is None else x
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), data.params)
    q, k, v = (
        np.tensordot(x, params[name]["kernel"], 1) + params[name]["bias"]
        for name in ("query", "key", "value")
    )
    output = np.zeros_like(x) + params["attention_output"]["bias"]
    for b, t, n in np.ndindex(case.batch, case.length, case.heads):
        seen = [s for s in range(case.length) if not case.causal or s <= t]
        seen = [s for s in seen if case.window is None or abs(s - t) < case.window]
        weights = np.exp([q[b, t, n] @ k[b, s, n] / np.sqrt(case.head_size) for s in seen])
        context = weights @ v[b, seen, n] / weights.sum()
        output[b, t] += context @ params["attention_output"]["kernel"][n]
    return output


def _without_biases(params):
    zeros = jnp.zeros_like
    return {n: {"kernel": p["kernel"], "bias": zeros(p["bias"])} for n, p in params.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"forgets_the_mask": True}, "its numbers are wrong: error"),
        ({"factor": jnp.nan}, "its numbers are wrong: error nan"),
        ({"factor": jnp.ones((1, 1, 1, 1))}, "its results have the shapes"),
        ({"convert": _without_biases}, "its numbers are wrong: error"),
    ],
)
def test_a_wrong_contender_is_not_let_through(wrong, message):
    case, data, expected = _prepared(f"{SMALL} F causal")
    with pytest.raises(Wrong, match=message):
        check(ours_but(**wrong)(case, data), case, expected)


@pytest.mark.slow
def test_the_right_dropout_rate_is_let_through():
    case, data, expected = _prepared("3x31x21x3 F dropout=0.2")
    check(ours_but()(case, data), case, expected)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.8])
def test_another_dropout_rate_is_not_let_through(rate):
    case, data, expected = _prepared("3x31x21x3 F dropout=0.2")
    with pytest.raises(Wrong, match="its dropout moves the output by"):
        check(ours_but(rate=rate)(case, data), case, expected)


@pytest.mark.parametrize(("factor", "right"), [(0, False), (0.4, False), (1.3, True), (3, False)])
def test_dropout_must_move_the_output_as_the_textbooks_does(factor, right):
    case = Case.parse(f"{SMALL} F dropout=0.2")
    output, noise = np.ones((2, 5, 21)), np.random.default_rng(0).normal(size=(2, 5, 21))
    expected = Expected(output, noise=float(np.sqrt(np.square(noise).mean())))
    stub = Contender(
        run=lambda: None,
        exact=lambda: [output],
        own_layout=lambda expected: [expected.output_BTE],
        noisy=lambda: output + factor * noise,
    )
    if right:
        assert check(stub, case, expected) == 0
    else:
        with pytest.raises(Wrong, match="its dropout moves the output by"):
            check(stub, case, expected)


def test_a_gradient_of_zero_is_measured_by_the_others():
    big, tiny = np.full(3, 100.0), np.full(3, 1e-5)
    assert relative_error([big, tiny], [big, 0 * tiny]) == pytest.approx(1e-6)
    small = np.full(3, 1e-2)  # wrong as a whole, and 1e-4 of the largest
    assert relative_error([big, 0 * small], [big, small]) > LIMITS["cpu"]
    assert relative_error([big, 2 * big], [big, big]) == pytest.approx(1.0)
    assert np.isnan(relative_error([big, tiny * np.nan], [big, tiny]))


def test_a_layer_without_dropout_says_so():
    case = Case.parse(f"{SMALL} F dropout=0.5")
    with pytest.raises(Unserved, match=r"haiku\.MultiHeadAttention has no dropout"):
        peers.builder("haiku")(case, make_data(case))


def test_an_implementation_that_cannot_gives_its_reason(monkeypatch):
    def unsupported(inputs, options, platform):
        return "it is broken today"

    monkeypatch.setattr("flax_mha.attention.blockwise.unsupported", unsupported)
    case = Case.parse("2x7x21x3 F")
    with pytest.raises(Unserved, match="'blockwise' cannot serve this call: it is broken today"):
        peers.builder("ours/blockwise")(case, make_data(case))


def test_biases_are_not_zero_so_that_one_mislaid_shows():
    _, data, _ = _prepared(f"{SMALL} F")
    assert data.x_BTD.shape == (2, 5, 21)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(data.params))
