"""jax_nn.dot_product_attention against jax.nn's own, on calls that cover every pair of options."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, booleans, normal, pairwise, relaxed
from implementations import HERE, SLOW, rows

from flax_mha import Mask
from flax_mha.interop import jax_nn

B, H, V = 2, 11, 13
OPTIONS = inspect.signature(jax.nn.dot_product_attention).parameters
HAS_RESIDUAL = "return_residual" in OPTIONS
ROWS = pairwise(
    {
        "implementation": ["blockwise", "reference"],
        "heads": [(3, 3), (6, 2), (3, 1)],
        "lengths": [(5, 7), (7, 5)],
        "bias": [None, "11TS", "NTS", "BNTS"],
        "mask": [None, "B11S", "NTS", "BNTS"],
        "local_window_size": [None, 2, (1, 3)],
        "query_seq_lengths": [None, [3, 5]],
        "key_value_seq_lengths": [None, [5, 2]],
        "is_causal": [False, True],
        "scale": [None, 0.3],
        "rank": [4, 3],
    }
)


def row_param(i):
    """Every seventh row by default: each compiles two programs and their gradients."""
    return pytest.param(ROWS[i], marks=[pytest.mark.slow] if i % 7 != 1 else [], id=str(i))


class Call:
    """One row of the table: its arrays, the arguments besides, and who may attend to whom."""

    def __init__(self, row, dtype="float32"):
        self.batch = B if row["rank"] == 4 else 1
        (N, K), (T, S) = row["heads"], row["lengths"]
        sizes = {"B": self.batch, "N": N, "T": T, "S": S, "1": 1}
        shape = lambda letters: [sizes[letter] for letter in letters]
        batch = (self.batch,) if row["rank"] == 4 else ()
        self.arrays = {
            "query": normal(0, *batch, T, N, H, dtype=dtype),
            "key": normal(1, *batch, S, K, H, dtype=dtype),
            "value": normal(2, *batch, S, K, H, dtype=dtype),
        }
        if row["bias"]:
            self.arrays["bias"] = normal(3, *shape(row["bias"]), dtype=dtype)
        names = ("scale", "is_causal", "local_window_size")
        self.call = {name: row[name] for name in names}
        if row["mask"]:
            self.call["mask"] = booleans(4, *shape(row["mask"]))
        for name in ("query_seq_lengths", "key_value_seq_lengths"):
            if row[name]:
                self.call[name] = jnp.asarray(row[name][: self.batch], "int32")
        self.open = self.allowed(N, T, S).any(-1).swapaxes(1, 2).reshape(*batch, T, N)

    def allowed(self, N, T, S):
        """Booleans `[B, N, T, S]`, said a second time in plain numpy."""
        distance = np.arange(S)[None] - np.arange(T)[:, None]
        left, right = np.broadcast_to(self.call["local_window_size"] or 99, 2)
        allowed = np.ones((self.batch, N, T, S), bool) & np.asarray(self.call.get("mask", True))
        allowed &= (distance >= -left) & (distance <= right)
        if self.call["is_causal"]:
            allowed &= distance <= 0
        for i in range(self.batch):
            allowed[i, :, self.call.get("query_seq_lengths", [T] * 9)[i] :] = False
            allowed[i, :, :, self.call.get("key_value_seq_lengths", [S] * 9)[i] :] = False
        return allowed


def theirs(query, key, value, bias=None, mask=None, **call):
    """jax.nn's, which up to jax 0.7 ignores `local_window_size` where it comes alone."""
    if mask is None and call.get("local_window_size") is not None:
        mask = jnp.ones((1, 1, query.shape[-3], key.shape[-3]), bool)
    with relaxed():
        return jax.nn.dot_product_attention(query, key, value, bias, mask, **call)


def with_gradients(attend, arrays, call, probe):
    """The context and the gradients of its product with `probe`, compiled as one."""

    def scalar(arrays):
        context = attend(**arrays, **call)
        return (context * probe).sum(), context

    (_, context), gradients = jax.jit(jax.value_and_grad(scalar, has_aux=True))(arrays)
    return context, gradients


@pytest.mark.slow
@pytest.mark.parametrize("row", [row_param(i) for i in range(len(ROWS))])
def test_equals_jax_nn_forward_and_gradient(row):
    """Where a query may attend to a key at all; the others are 0, and so are their gradients."""
    case = Call(row)
    is_open = case.open[..., None]
    probe = normal(5, *case.open.shape, H) * is_open.astype("float32")
    ours, our_gradients = with_gradients(
        functools.partial(jax_nn.dot_product_attention, implementation=row["implementation"]),
        case.arrays,
        case.call,
        probe,
    )
    context, gradients = with_gradients(theirs, case.arrays, case.call, probe)
    assert_close(ours, jnp.where(is_open, context, 0), "float32")
    assert_trees_close(our_gradients, gradients, "float32")


def test_the_table_covers_what_matters():
    assert {row["implementation"] for row in ROWS} == set(HERE) - SLOW
    assert any(not Call(row).open.all() for row in ROWS)
    assert any(Call(row).open.all() for row in ROWS)


def test_the_signature_is_jax_nn_s():
    ours = inspect.signature(jax_nn.dot_product_attention).parameters
    shared = [(p.name, p.kind, p.default) for p in ours.values() if p.name in OPTIONS]
    assert shared == [(p.name, p.kind, p.default) for p in OPTIONS.values()]
    assert set(ours) - set(OPTIONS) <= {"return_residual"}


@pytest.mark.parametrize("implementation", rows())
def test_a_window_alone_acts(implementation):
    """jax 0.7.2 ignores a window that is given alone: https://github.com/jax-ml/jax/issues/32300"""
    T = 7
    x = normal(0, T, 1, H)
    call = {"local_window_size": (1, 2), "implementation": implementation}
    result = jax.jit(lambda x: jax_nn.dot_product_attention(x, x, x, **call))(x)
    for t in range(T):
        near = np.asarray(x)[max(0, t - 1) : t + 3, 0]
        weights = np.exp(near @ np.asarray(x)[t, 0] / np.sqrt(H))
        assert_close(result[t, 0], weights @ near / weights.sum(), "float32")


@pytest.mark.parametrize(
    "implementation", ["blockwise", pytest.param("reference", marks=pytest.mark.slow)]
)
def test_a_query_without_a_key_differs_from_jax_nn(implementation):
    x = normal(0, B, 5, 3, H)
    call = {"key_value_seq_lengths": jnp.array([5, 0], "int32")}

    def run(x):
        context, residual = jax_nn.dot_product_attention(
            x, x, x, **call, implementation=implementation, return_residual=True
        )
        return context.sum(), (context, residual)

    gradient, (context, residual) = jax.jit(jax.grad(run, has_aux=True))(x)
    assert not context[1].any()
    assert not gradient[1].any()
    assert jnp.isfinite(gradient).all()
    assert (residual[1] == -jnp.inf).all()
    mean = jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)
    uniform = jax.jit(lambda x: theirs(x, x, x, **call))(x)
    assert_close(uniform[1], mean[1], "float32")


@pytest.mark.parametrize(
    ("implementation", "rank"),
    [
        ("blockwise", 3),
        pytest.param("blockwise", 4, marks=pytest.mark.slow),
        pytest.param("reference", 4, marks=pytest.mark.slow),
        pytest.param("reference", 3, marks=pytest.mark.slow),
    ],
)
def test_residual_is_the_log_of_the_sum(implementation, rank):
    """And has no gradient, while the context keeps its own."""
    shape = (B, 5, 3, H)[4 - rank :]
    x, probe = normal(0, *shape), normal(1, *shape)

    def both(x):
        return jax_nn.dot_product_attention(
            x, x, x, is_causal=True, implementation=implementation, return_residual=True
        )

    def scalar(x, of_residual):
        context, residual = both(x)
        return (context * probe).sum() + of_residual * residual.sum(), residual

    compiled = jax.jit(jax.grad(scalar, has_aux=True))
    gradient, residual = compiled(x, 0.0)
    logits = np.einsum("...tnh,...snh->...tns", *[np.asarray(x).astype("float64")] * 2) / H**0.5
    visible = np.exp(logits) * (np.arange(5)[:, None, None] >= np.arange(5))
    assert_close(residual, np.log(visible.sum(-1)), "float32")
    assert_close(compiled(x, 100.0)[0], gradient, "float32")
    alone = lambda x: (theirs(x, x, x, is_causal=True) * probe).sum()
    assert_close(gradient, jax.jit(jax.grad(alone))(x), "float32")


@pytest.mark.skipif(not HAS_RESIDUAL, reason="this jax.nn has no return_residual")
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_residual_is_jax_nn_s(dtype):
    query, key = normal(0, B, 5, 6, H, dtype=dtype), normal(1, B, 7, 2, H, dtype=dtype)
    call = {"key_value_seq_lengths": jnp.array([7, 3], "int32"), "return_residual": True}
    run = lambda attend: jax.jit(lambda q, k: attend(q, k, k, **call))(query, key)
    for mine, other in zip(run(jax_nn.dot_product_attention), run(theirs)):
        assert mine.dtype == other.dtype == dtype
        assert_close(mine, other, dtype)


def test_a_traced_scale_and_its_gradient():
    x, probe = normal(0, B, 5, 3, H), normal(1, B, 5, 3, H)

    def run(attend):
        scalar = lambda scale: (attend(x, x, x, scale=scale) * probe).sum()
        return jax.jit(jax.value_and_grad(scalar))(0.3)

    for ours, other in zip(run(jax_nn.dot_product_attention), run(theirs)):
        assert_close(ours, other, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype):
    case = Call(ROWS[0], dtype)
    bound = functools.partial(
        jax_nn.dot_product_attention, implementation=ROWS[0]["implementation"], **case.call
    )
    other = jnp.where(case.open[..., None], theirs(**case.arrays, **case.call), 0)
    arrays = case.arrays
    for ours in (
        jax.jit(lambda arrays: bound(**arrays))(arrays),
        jax.jit(lambda arrays, scale: bound(**{**arrays, "scale": scale}))(arrays, H**-0.5),
    ):
        assert ours.dtype == dtype
        assert_close(ours, other, dtype)


def test_wider_values_numpy_arrays_and_a_structured_mask():
    query, key, value = (np.asarray(normal(i, 5, 3, size)) for i, size in enumerate((H, H, V)))
    causal = functools.partial(jax_nn.dot_product_attention, mask=Mask.causal())
    result = jax.jit(causal)(query, key, value)
    assert result.shape == (5, 3, V)
    run = jax.jit(functools.partial(theirs, is_causal=True))
    for part in (slice(0, H), slice(V - H, V)):
        assert_close(result[..., part], run(query, key, value[..., part]), "float32")


def test_what_lies_beyond_a_length_goes_nowhere():
    x = normal(0, B, 5, 3, H)
    dirty = x.at[1, 3:].set(jnp.nan)
    lengths = jnp.array([5, 3], "int32")
    run = jax.jit(
        lambda key: jax_nn.dot_product_attention(x, key, key, key_value_seq_lengths=lengths)
    )
    assert_close(run(dirty), run(x), "float32")


def test_lengths_causal_and_window_never_become_an_array_of_T_by_S():
    T = 331
    x = jax.ShapeDtypeStruct((B, T, 3, H), jnp.float32)
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)

    def program(implementation):
        run = lambda x, lengths: jax_nn.dot_product_attention(
            x, x, x, is_causal=True, local_window_size=50, query_seq_lengths=lengths,
            key_value_seq_lengths=lengths, implementation=implementation,
        )  # fmt: skip
        return jax.jit(run).lower(x, lengths).as_text()

    assert f"{T}x{T}x" in program("reference")
    assert f"{T}x{T}x" not in program(None)


X = jnp.zeros((B, 5, 3, H))
NOT_HERE, VALUE, TYPE = NotImplementedError, ValueError, TypeError


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"implementation": "xla"}, NOT_HERE, r"='xla'. Pass None or one of.*'reference' is the"),
        (
            {"implementation": "cudnn"},
            NOT_HERE,
            r"'cudnn' cannot serve this call: it is for NVIDIA",
        ),
        ({"implementation": "flash"}, VALUE, r"`implementation` must be one of \['reference"),
        ({"query": X[0, 0]}, VALUE, r"`query` must be \[B, T, N, H\], or without B.*\(3, 11\)"),
        ({"value": X[None]}, VALUE, r"`value` must be \[B, S, K, V\].*\(1, 2, 5, 3, 11\)"),
        ({"query": X[:1]}, VALUE, r"batch axes must be equal.*query \(1, 5, 3, 11\)"),
        ({"query": X.astype(int)}, TYPE, r"`query` must be a floating-point"),
        ({"mask": jnp.zeros((5, 5))}, TYPE, r"must be boolean.*goes to `bias=`"),
        ({"mask": jnp.ones((5, 7), bool)}, VALUE, r"`mask` must broadcast to \[B, N, T, S\]"),
        ({"bias": jnp.ones((7, 5))}, VALUE, r"`bias` must broadcast to \[..., N, T, S\]"),
        ({"query_seq_lengths": jnp.ones(1, int)}, VALUE, r"`query_seq.*integers \[B\] = \(2,\)"),
        ({"key_value_seq_lengths": jnp.ones(B)}, VALUE, r"`key_value_seq_lengths` .*float32"),
        ({"local_window_size": (-1, 2)}, VALUE, r"`left` must be a non-negative integer.*-1"),
        ({"is_causal": 2}, VALUE, r"`is_causal` must be True or False"),
        ({"return_residual": None}, TYPE, r"must be True or False"),
    ],
)
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        jax_nn.dot_product_attention(**{"query": X, "key": X, "value": X, **arguments})


def test_a_traced_scale_of_many_numbers_is_refused():
    run = jax.jit(lambda scale: jax_nn.dot_product_attention(X, X, X, scale=scale))
    with pytest.raises(ValueError, match=r"`scale` must be one number.*\(3,\)"):
        run(jnp.ones(3))


def test_lengths_that_32_bits_would_cut_are_refused():
    x = normal(0, 2, 5, 2, 4)
    lengths = np.array([2**32, 3])
    with pytest.raises(ValueError, match=r"`key_value_seq_lengths` must fit int32"):
        jax_nn.dot_product_attention(x, x, x, key_value_seq_lengths=lengths)
