"""Functions of pairs that are none: each message names the rule, what was received, the remedy.

A case is one entry. A mask function is refused when the mask is made or when it is used; the
tests do both.
"""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

import flax_mha
from flax_mha import Mask, dot_product_attention, explain

B, T, S, N = 2, 6, 7, 3
QUERY, KEY = normal(0, B, T, N, 4), normal(1, B, S, N, 4)
IDS = np.array([[0, 0, 0, 1, 1, 2]] * B)
OFFSET = jnp.array([1, 2, 3])
DATA = {"not": "an array"}


class Counter:
    """A function with a state: each call is another program."""

    def __init__(self):
        self.calls = 0

    def mask(self, b, n, t, s):
        self.calls += 1
        return s <= t + self.calls

    def score(self, x, b, n, t, s):
        self.calls += 1
        return x * self.calls


def with_an_if(b, n, t, s):
    return s <= t if t > 2 else s == 0


def with_an_and(b, n, t, s):
    return s <= t and t - s < 3


def with_a_range(b, n, t, s):
    return s in range(3)


def with_a_loop(b, n, t, s):
    return jnp.array([i for i in range(t)]).any()


def score_with_an_if(x, b, n, t, s):
    return x if s <= t else -x


NO_PYTHON = r"jnp\.where.*`&`|`&`.*jnp\.where"
FLOATS = r"float32.*`?(score|bias)"
SCALAR = (IndexError, TypeError, ValueError)
ONE_LOGIT = r"one (pair|logit)|dimension 0|0-dimensional|0 dimensions"

# name -> (function, the error, the regex of its message)
BAD_MASKS = {
    "floats": (lambda b, n, t, s: (s - t).astype("float32"), TypeError, FLOATS),
    "a float": (lambda b, n, t, s: 1.0, TypeError, r"float.*(score|bias)"),
    "additive": (lambda b, n, t, s: jnp.where(s <= t, 0.0, -1e9), TypeError, FLOATS),
    "integers": (lambda b, n, t, s: s - t, TypeError, r"bool.*int32"),
    "an integer": (lambda b, n, t, s: 1, TypeError, r"bool.*int"),
    "None": (lambda b, n, t, s: None, TypeError, r"bool.*None"),
    "no return": (lambda b, n, t, s: print(end=""), TypeError, r"bool.*None"),
    "a string": (lambda b, n, t, s: "causal", TypeError, r"bool.*str"),
    "a pair": (lambda b, n, t, s: (s <= t, s > 0), TypeError, r"bool.*tuple"),
    "a list": (lambda b, n, t, s: [s <= t], TypeError, r"bool.*list"),
    "a mask": (lambda b, n, t, s: Mask.causal(), TypeError, r"bool.*Mask"),
    "of every key": (lambda b, n, t, s: jnp.arange(S) <= t, ValueError, r"one pair.*\(7,\)"),
    "of one key": (lambda b, n, t, s: (s <= t)[None], ValueError, r"one pair.*\(1,\)"),
    "of each offset": (lambda b, n, t, s: s <= t + OFFSET, ValueError, r"one pair.*\(3,\)"),
    "two arguments": (lambda t, s: s <= t, TypeError, r"f\(b, n, t, s\).*2"),
    "five arguments": (lambda x, b, n, t, s: s <= t, TypeError, r"f\(b, n, t, s\).*5"),
    "no argument": (lambda: True, TypeError, r"f\(b, n, t, s\).*0"),
    "arguments by name": (lambda *, b, n, t, s: s <= t, TypeError, r"f\(b, n, t, s\)"),
    "an if": (with_an_if, TypeError, NO_PYTHON),
    "an and": (with_an_and, TypeError, NO_PYTHON),
    "a chained comparison": (lambda b, n, t, s: 0 <= s <= t, TypeError, NO_PYTHON),
    "a not": (lambda b, n, t, s: not s > t, TypeError, r"jnp\.where|`~`"),
    "an in": (with_a_range, TypeError, r"jnp\.where|jnp\."),
    "a loop": (with_a_loop, TypeError, r"jnp\."),
    "an int() of an index": (lambda b, n, t, s: int(s) <= 3, TypeError, r"jnp\."),
    "a numpy function": (lambda b, n, t, s: np.abs(t - s) < 3, TypeError, r"jnp\."),
    "a numpy array": (lambda b, n, t, s: IDS[b, t] == 1, TypeError, r"jnp\.asarray"),
    "a list by index": (lambda b, n, t, s: [True, False][s], TypeError, r"jnp\.asarray"),
    "an attribute that is none": (lambda b, n, t, s: DATA["not"][t] == "a", TypeError, r"jnp\."),
    "a counter": (lambda: Counter().mask, ValueError, r"(twice|another program).*"),
    "random numbers": (
        lambda b, n, t, s: s <= t + random.randint(0, 10**9),
        ValueError,
        r"twice|another program",
    ),
    "not callable": (IDS, TypeError, r"function.*ndarray.*Mask\.dense"),
    "a mask for a function": (Mask.causal(), TypeError, r"function.*Mask"),
    "a string for a function": ("causal", TypeError, r"function.*str"),
    "nothing for a function": (None, TypeError, r"function.*None"),
}

BAD_SCORES = {
    "an integer": (lambda x, b, n, t, s: s - t, TypeError, r"float.*int32"),
    "a Python integer": (lambda x, b, n, t, s: 1, TypeError, r"float.*int"),
    "a boolean": (lambda x, b, n, t, s: s <= t, TypeError, r"float.*bool.*mask"),
    "complex": (lambda x, b, n, t, s: jax.lax.complex(x, x), TypeError, r"float.*complex64"),
    "None": (lambda x, b, n, t, s: None, TypeError, r"float.*None"),
    "a pair": (lambda x, b, n, t, s: (x, x), TypeError, r"float.*tuple"),
    "of every key": (lambda x, b, n, t, s: x - jnp.arange(7.0), ValueError, r"one pair.*\(7,\)"),
    "of one key": (lambda x, b, n, t, s: x[None], ValueError, r"one pair.*\(1,\)"),
    # A logit has no axis to sum over: JAX says so, or the package does.
    "over keys": (lambda x, b, n, t, s: x - x.sum(-1), SCALAR, ONE_LOGIT),
    "a softmax": (lambda x, b, n, t, s: jax.nn.softmax(x), SCALAR, ONE_LOGIT),
    "a cumulative sum": (lambda x, b, n, t, s: jnp.cumsum(x, axis=-1), SCALAR, ONE_LOGIT),
    "by index": (lambda x, b, n, t, s: x[b, n, t, s], SCALAR, ONE_LOGIT),
    "a mask function": (
        lambda b, n, t, s: s <= t,
        TypeError,
        r"score\(logits, b, n, t, s\).*4",
    ),
    "no argument": (lambda: 1.0, TypeError, r"score\(logits, b, n, t, s\).*0"),
    "an if": (score_with_an_if, TypeError, r"jnp\.where"),
    "an if on the logit": (lambda x, b, n, t, s: x if x > 0 else 0 * x, TypeError, r"jnp\.where"),
    "a maximum": (lambda x, b, n, t, s: max(x, 0.0), TypeError, r"jnp\.where"),
    "a float() of the logit": (lambda x, b, n, t, s: float(x), TypeError, r"jnp\."),
    "a numpy array": (lambda x, b, n, t, s: x + IDS[b, t], TypeError, r"jnp\.asarray"),
    "a counter": (lambda: Counter().score, ValueError, r"twice|another program"),
    "random numbers": (
        lambda x, b, n, t, s: x * random.random(),
        ValueError,
        r"twice|another program",
    ),
    "not callable": (normal(2, N, T, S), TypeError, r"function.*bias"),
    "a string": ("alibi", TypeError, r"function.*str"),
    "a mask": (Mask.causal(), TypeError, r"function.*Mask"),
}  # fmt: skip


def made(name, function):
    """What has a state is made anew for each test."""
    return function() if name == "a counter" else function


def attend(**call):
    return dot_product_attention(QUERY, KEY, KEY, **call)


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_mask(name):
    function, error, message = BAD_MASKS[name]
    with pytest.raises(error, match=rf"(?s){message}"):
        attend(mask=Mask.function(made(name, function)))


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("name", BAD_SCORES)
def test_bad_score(name, implementation):
    function, error, message = BAD_SCORES[name]
    with pytest.raises(error, match=rf"(?s){message}"):
        attend(score=made(name, function), implementation=implementation)


@pytest.mark.parametrize("name", ["an if", "floats", "a counter", "of every key"])
def test_bad_mask_within_jit(name):
    function, error, message = BAD_MASKS[name]
    run = jax.jit(lambda x: attend(mask=Mask.function(made(name, function))) + x)
    with pytest.raises(error, match=rf"(?s){message}"):
        run(1.0)


def test_what_the_user_s_own_code_raises_arrives_as_it_is():
    """Its error is not one of ours, and no message of ours may hide it."""

    def broken(b, n, t, s):
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        attend(mask=Mask.function(broken))
    with pytest.raises(ZeroDivisionError):
        attend(score=lambda x, b, n, t, s: x + 1 / 0)
    with pytest.raises(AttributeError, match="ids"):
        attend(mask=Mask.function(lambda b, n, t, s: DATA.ids[t] == s))


@pytest.mark.parametrize("axes", ["[T]", "[B, T, S]"])
def test_a_shape_that_the_user_s_own_lookup_refuses(axes):
    """Too many indices are JAX's own error, which names them."""
    array = jnp.zeros({"[T]": (T,), "[B, T, S]": (B, T, S)}[axes], bool)
    with pytest.raises(IndexError, match=r"[Tt]oo many indices"):
        attend(mask=Mask.function(lambda b, n, t, s: array[b, n, t, s]))


# --- what looks bad and is not ------------------------------------------------------------------


def same_as(allowed, **call):
    wanted = attend(mask=np.broadcast_to(allowed, (B, N, T, S)), implementation="reference")
    np.testing.assert_allclose(attend(**call), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_numpy_s_arrays_through_jnp(implementation):
    """float64 and int64 of numpy, x64 off: numbers of 32 bits, as everywhere in JAX."""
    widths, slopes = np.array([1, 2, 4]), np.array([0.5, 0.25, 1.0])
    distance = abs(np.arange(S) - np.arange(T)[:, None])
    mask = Mask.function(lambda b, n, t, s: abs(t - s) <= jnp.asarray(widths)[n])
    same_as(distance <= widths[:, None, None], mask=mask, implementation=implementation)
    score = lambda x, b, n, t, s: x - jnp.asarray(slopes)[n] * abs(t - s).astype(x.dtype)
    bias = jnp.asarray(-slopes[:, None, None] * distance, "float32")
    wanted = attend(bias=bias, implementation="reference")
    result = attend(score=score, implementation=implementation)
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [2, np.int32(2), jnp.int32(2), jnp.array(2)], ids=repr)
def test_numbers_of_any_kind(number):
    distance = abs(np.arange(S) - np.arange(T)[:, None])
    same_as(distance <= 2, mask=Mask.function(lambda b, n, t, s: abs(t - s) <= number))


@pytest.mark.parametrize("number", [0.5, np.float32(0.5), np.array(0.5, "float32")], ids=repr)
def test_floats_of_any_kind(number):
    result = attend(score=lambda x, b, n, t, s: x * number)
    np.testing.assert_allclose(result, attend(scale=0.25), rtol=1e-5, atol=1e-5)


class Window:
    """A callable object, with a method, and a state that no call changes."""

    def __init__(self, width):
        self.width = width

    def __call__(self, b, n, t, s):
        return abs(t - s) <= self.width


def window(width, b, n, t, s):
    return abs(t - s) <= width


@pytest.mark.parametrize(
    "function",
    [
        Window(2),
        Window(2).__call__,
        lambda *index: abs(index[2] - index[3]) <= 2,
        lambda b, n, t, s, width=2: abs(t - s) <= width,
        lambda batch, head, q_idx, kv_idx: abs(q_idx - kv_idx) <= 2,
        jax.jit(lambda b, n, t, s: abs(t - s) <= 2),
        jax.tree_util.Partial(window, 2),
    ],
    ids=["object", "method", "star", "default", "FlexAttention's names", "jit", "Partial"],
)
def test_callables_of_any_kind(function):
    distance = abs(np.arange(S) - np.arange(T)[:, None])
    same_as(distance <= 2, mask=Mask.function(function))


# --- the algebra --------------------------------------------------------------------------------

NO_MASKS = {
    "booleans": np.ones((T, S), bool),
    "jax booleans": jnp.ones((T, S), bool),
    "no booleans": np.ones((0, S), bool),
    "None": None,
    "True": True,
    "zero": 0,
    "a function": window,
    "a string": "causal",
}
OPERATIONS = {
    "or": lambda a, b: a | b,
    "and": lambda a, b: a & b,
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", NO_MASKS)
def test_a_mask_joins_masks_alone(name, operation, side):
    """NumPy would go over the mask entry by entry, and over no entries without a word."""
    pair = (Mask.causal(), NO_MASKS[name])
    with pytest.raises(TypeError, match="Mask"):
        OPERATIONS[operation](*(pair if side == "left" else pair[::-1]))


@pytest.mark.parametrize("operator", ["and", "or", "not"])
def test_python_s_own_words_are_refused(operator):
    """`mask_a and mask_b` would be mask_b, without a word."""
    one, other = Mask.causal(), Mask.window(1, 1)
    words = {
        "and": lambda: one and other,
        "or": lambda: one or other,
        "not": lambda: not one,
    }
    with pytest.raises(TypeError, match=r"`&`.*`\|`.*`~`"):
        words[operator]()


BAD_PREFIXES = {
    "a float": (2.0, TypeError, "integer"),
    "floats": (jnp.array([2.0, 3.0]), TypeError, "integer"),
    "booleans": (jnp.array([True, False]), TypeError, "integer"),
    "True": (True, TypeError, "integer"),
    "None": (None, TypeError, "integer"),
    "negative": (-1, ValueError, "negative"),
    "a matrix": (jnp.ones((B, T), int), ValueError, r"\[B\]"),
    "of other examples": (jnp.array([1, 2, 3]), ValueError, r"\[B\].*\(3,\)"),
}


@pytest.mark.parametrize("name", BAD_PREFIXES)
def test_bad_prefix(name):
    lengths, error, message = BAD_PREFIXES[name]
    with pytest.raises(error, match=rf"(?s){message}"):
        attend(mask=Mask.causal() | Mask.prefix(lengths))


@pytest.mark.parametrize(
    "mask",
    [
        lambda: ~Mask.padding(key=jnp.ones((B, T), bool)),
        lambda: Mask.causal() | Mask.segments(jnp.ones((B, T), int), jnp.ones((B, T), int)),
        lambda: ~(Mask.causal() & ~Mask.dense(jnp.ones((T, S + 1), bool))),
    ],
    ids=["padding", "segments", "dense"],
)
def test_shapes_within_a_union_are_checked(mask):
    with pytest.raises(ValueError, match=r"\[B, (N, T, )?S\].*shape"):
        attend(mask=mask())


# --- who cannot ---------------------------------------------------------------------------------

X = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)


def twice(x, b, n, t, s):
    return 2 * x


def causal(b, n, t, s):
    return s <= t


def test_cudnn_refuses_scores():
    assert "score" in explain(X, X, X, platform="gpu", score=twice)["cudnn"]
    with pytest.raises(NotImplementedError, match="cudnn"):
        attend(score=twice, implementation="cudnn")


def test_cudnn_says_of_functions_as_masks():
    """It serves what becomes an array, or names the function; it is never silent."""
    reason = explain(X, X, X, platform="gpu", mask=Mask.function(causal))["cudnn"]
    assert reason.startswith("ok") or "function" in reason


def test_the_weights_are_still_the_reference_s_alone():
    with pytest.raises(NotImplementedError, match="never holds the weights"):
        attend(score=twice, implementation="blockwise", return_weights=True)


# --- blocks kept --------------------------------------------------------------------------------

BAD_BLOCKS = {
    "no function": (lambda: flax_mha.block_mask(None, T, S), TypeError, "function"),
    "a float": (lambda: flax_mha.block_mask(causal, 6.0, S), TypeError, "integer"),
    "a negative length": (lambda: flax_mha.block_mask(causal, T, -1), ValueError, "`S`"),
    "blocks of 0": (
        lambda: flax_mha.block_mask(causal, T, S, block_size=0),
        ValueError,
        "block_size",
    ),
    "floats": (
        lambda: flax_mha.block_mask(lambda b, n, t, s: s.astype("float32"), T, S),
        TypeError,
        FLOATS,
    ),
    "booleans for blocks": (
        lambda: Mask.function(causal, blocks=np.ones((1, 1), bool)),
        TypeError,
        "BlockMask.*block_mask",
    ),
    "of other lengths": (
        lambda: attend(mask=Mask.function(causal, blocks=flax_mha.block_mask(causal, T, S + 1))),
        ValueError,
        r"\b8\b",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_bad_blocks(name):
    make, error, message = BAD_BLOCKS[name]
    with pytest.raises(error, match=rf"(?s){message}"):
        make()


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_blocks_kept_give_the_same_answer(implementation):
    """Blocks are computed once of ids, and kept with the function."""
    ids, keys = jnp.asarray(IDS), jnp.arange(S) // 3
    function = lambda b, n, t, s: ids[b, t] == keys[s]
    blocks = flax_mha.block_mask(function, T, S, block_size=4)
    mask = Mask.function(function, blocks=blocks)
    same_as(IDS[:, None, :, None] == np.arange(S) // 3, mask=mask, implementation=implementation)
