"""implementation="cudnn" without a GPU: refusals, what jax is given, its numbers, its program.

jax's own XLA path computes what its cuDNN path would: the same call of the same function. Its own
checks, derivatives and lowering for CUDA run here too; the kernel itself does not.
"""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, booleans, normal
from jax.sharding import PartitionSpec as P

from flax_mha import Mask, dot_product_attention, explain
from flax_mha.attention import DistanceBias, cudnn

B, T, S, N, K, H = 2, 6, 10, 4, 2, 8
SIZES = (B, T, S, N, K, H, H)
HAS_BIAS = jax.__version_info__ >= cudnn.BIASES
# There a bias is refused: test_a_bias_needs_a_jax_that_has_every_gradient_of_it asserts it.
needs_bias = pytest.mark.skipif(not HAS_BIAS, reason="jax before 0.8.1 loses a bias's gradients")


def shapes(b, t, s, n, k, h, v, dtype="bfloat16"):
    return [jax.ShapeDtypeStruct(x, dtype) for x in ((b, t, n, h), (b, s, k, h), (b, s, k, v))]


def arrays(b, t, s, n, k, h, v, dtype="float16"):
    full = ((b, t, n, h), (b, s, k, h), (b, s, k, v))
    return [normal(i, *x, dtype=dtype) for i, x in enumerate(full)]


def padding(b=B, s=S):
    return Mask.padding(key=np.arange(s)[None] < np.array([[s], [s // 2]])[:b])


# --- what is refused ----------------------------------------------------------------------------

KEY = jax.random.key(0)
BIAS = jnp.zeros((T, S))
REFUSED = {
    "float32": ({}, dict(dtype="float32"), r"serves bfloat16 and float16, not float32"),
    "features of values": ({}, dict(v=16), r"as many features as keys, not V = 16 and H = 8"),
    "odd features": ({}, dict(h=12, v=12), r"multiple of 8, not H = 12"),
    "many features": ({}, dict(h=136, v=136), r"128 features \(256 on a GPU of .* 9\.0.*H = 136"),
    "no keys": ({}, dict(s=0), r"arrays without entries, .* S = 0"),
    "no batch": ({}, dict(b=0), r"arrays without entries, B = 0"),
    "odd queries": ({}, dict(t=7), r"gradient needs even lengths, not T = 7, S = 10"),
    "odd keys": ({}, dict(s=9), r"gradient needs even lengths, not T = 6, S = 9"),
    "64 keys": ({"mask": padding(s=192)}, dict(s=192), r"NaN where S % 128 == 64, .* S = 192, w"),
    "weights": ({"return_weights": True}, {}, r"never holds the weights"),
    "residuals": ({"return_residuals": True}, {}, r"rounds its residuals to 16 bits"),
    "sinks": ({"sinks": jnp.zeros(N)}, {}, r"sinks need residuals"),
    "dropout": ({"dropout_rate": 0.1, "dropout_key": KEY}, {}, r"draws bits of its own"),
    "soft cap": ({"soft_cap": 5.0}, {}, r"no soft cap"),
    "distances": (
        {"distance_bias": DistanceBias(jnp.zeros((N, 15)), first=-5)}, {}, r"no distance bias",
    ),
    "precision": ({"precision": "highest"}, {}, r"one precision, so precision=None"),
    "blocks": ({"block_sizes": (8, 8)}, {}, r"chooses its blocks, so block_sizes must be None"),
    "segments": (
        {"mask": Mask.segments(np.zeros((B, T), int), np.zeros((B, S), int))}, {}, r"no segment ids"
    ),
    "offset": ({"mask": Mask.causal(jnp.array([1, 0]))}, {}, r"may have no query_offset"),
    "window": ({"local_window_size": 3}, {}, r"windows \(left, 0\).* not \(3, 3\)"),
    "right window": ({"mask": Mask.window(None, 2)}, {}, r"windows \(left, 0\).* not \(None, 2\)"),
    "left window": ({"mask": Mask.window(2, None)}, {}, r"windows \(left, 0\).* not \(2, None\)"),
    "window, T > S": ({"mask": Mask.window(2, 0)}, dict(t=12), r"windows need T <= S, not T = 12"),
}  # fmt: skip
SERVED = {
    "plain": {},
    "causal, T > S": (dict(t=12), {"is_causal": True}),
    "64 keys": (dict(s=64), {"is_causal": True}),
    "causal": {"is_causal": True},
    "causal window": {"local_window_size": (2, 0), "scale": 0.3},
    "no keys before": {"local_window_size": (0, 0)},
    "padding": {"mask": padding()},
    "padded window": {"mask": padding() & Mask.window(2, 0)},
    "padded queries": {"mask": Mask.padding(query=np.arange(T)[None] < np.array([[6], [2]]))},
    "dense TS": {"mask": np.asarray(booleans(5, T, S))},
    "dense BNTS": {"mask": np.asarray(booleans(5, B, N, T, S, share=0.4)), "is_causal": True},
    "nobody": {"mask": np.zeros((B, 1, T, S), bool)},
    "dropout without a key": {"dropout_rate": 0.5},
}
BIASED = {
    "bias": {"bias": (B, N, T, S)},
    "bias of heads": {"bias": (N, 1, S), "is_causal": True},
    "bias of all": {"bias": (T, S), "mask": padding() & Mask.causal()},
    "bias of examples": {"bias": (B, 1, 1, S), "local_window_size": (3, 0)},
}


def with_bias(call):
    return {**call, "bias": normal(8, *call["bias"])} if "bias" in call else call


def sized(**sizes):
    return {**dict(zip("btsnkhv", SIZES)), **sizes}


def served(name):
    """(sizes, call) of a row of SERVED."""
    row = {**SERVED, **BIASED}[name]
    sizes, call = row if isinstance(row, tuple) else ({}, row)
    return sized(**sizes), with_bias(call)


@pytest.mark.parametrize("name", REFUSED)
def test_explain_tells_the_truth_of_a_gpu(name):
    call, sizes, reason = REFUSED[name]
    found = explain(*shapes(**sized(**sizes)), platform="gpu", **call)["cudnn"]
    assert re.search(reason, found), found


@pytest.mark.parametrize("name", [*SERVED, *(BIASED if HAS_BIAS else ())])
def test_what_is_served_is_ok_and_never_what_none_chooses(name):
    sizes, call = served(name)
    found = explain(*shapes(**sizes), platform="gpu", **call)
    assert found["cudnn"] == "ok"
    assert sum("None chooses it" in text for text in found.values()) == 1


def test_a_bias_needs_a_jax_that_has_every_gradient_of_it():
    found = explain(*shapes(*SIZES), platform="gpu", bias=BIAS)["cudnn"]
    expected = "ok" if HAS_BIAS else r"jax 0\.\d.* loses gradients of a bias: 0\.8\.1 or later"
    assert re.search(expected, found)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_platforms(platform):
    assert explain(*shapes(*SIZES), platform=platform)["cudnn"] == "it is for NVIDIA GPUs"


def test_named_where_there_is_no_gpu():
    refusal = (
        r"'cudnn' cannot serve this call: it is for NVIDIA GPUs, which jax asks while it traces, "
        r"not for cpu; explain\(\.\.\., platform='gpu'\) says what one would serve\. Received: "
        r"query \[2, 6, 4, 8\], key \[2, 10, 2, 8\]\. Those that can: \['reference', 'blockwise'"
    )
    with pytest.raises(NotImplementedError, match=refusal):
        jax.eval_shape(
            functools.partial(dot_product_attention, implementation="cudnn"), *shapes(*SIZES)
        )


def test_lengths_that_jax_export_leaves_open():
    (t,) = jax.export.symbolic_shape("t", constraints=["t >= 96"])
    found = explain(*shapes(B, t, t, N, K, H, H), platform="gpu", mask=Mask.causal())["cudnn"]
    assert re.search(r"sizes that are numbers, not T = t, S = t", found)


def pretend(monkeypatch, found, kind="NVIDIA L4"):
    """As if this process ran on a GPU."""
    device = type("Device", (), {"device_kind": kind})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    if found is not None:
        monkeypatch.setattr(device, "compute_capability", found, raising=False)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("7.5", r"compute capability 8\.0 or later, not NVIDIA L4 \(7, 5\)"),
        ("gfx942", r"it is for NVIDIA GPUs .* not NVIDIA L4 \(0, 0\)"),
        (None, r"it is for NVIDIA GPUs .* \(0, 0\)"),
        ("8.0", r"ok"),
        ("12.0", r"ok"),
    ],
)
def test_which_gpus(monkeypatch, found, reason):
    pretend(monkeypatch, found)
    assert re.search(reason, explain(*shapes(*SIZES))["cudnn"])


@pytest.mark.parametrize(("found", "most"), [("8.9", 128), ("9.0", 256), ("10.0", 256)])
def test_features_by_gpu(monkeypatch, found, most):
    if found == "10.0" and jax.__version_info__ < (0, 8, 2):
        most = 128  # until then jax asked for 9.0 alone
    pretend(monkeypatch, found)
    answers = {h: explain(*shapes(**sized(h=h, v=h)))["cudnn"] for h in (128, 136, 256, 264)}
    assert [h for h, answer in answers.items() if answer != "ok"] == [
        h for h in answers if h > most
    ]


# --- its numbers, by jax's XLA path -------------------------------------------------------------

JAX_S = jax.nn.dot_product_attention
FUSED = "jax._src.cudnn.fused_attention_stablehlo"


@pytest.fixture
def by_xla(monkeypatch):
    """As if on a GPU, where jax computes the call by its XLA path; the calls that it got."""
    calls = []

    def instead(query, key, value, bias, mask, *, implementation, **options):
        calls.append(((query, key, value, bias, mask), options))
        assert implementation == "cudnn"
        # As jax does before its kernel: the mask becomes a 16-bit bias.
        bias = importlib.import_module(FUSED).combine_bias_and_mask(bias, mask, query.dtype)
        wide = [x if x is None else x.astype("float32") for x in (query, key, value, bias)]
        context = JAX_S(*wide, implementation="xla", **options)
        return context.astype(query.dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "capability", lambda: cudnn.WIDER)
    return calls


def graded(implementation, call, values, wide=False):
    """(context, gradients of query, key, value and of a bias)."""
    extra = {"bias": call["bias"]} if "bias" in call else {}
    fixed = {name: x for name, x in call.items() if name != "bias"}
    named = {**dict(zip(("query", "key", "value"), values)), **extra}
    if wide:
        named = {name: x.astype("float32") for name, x in named.items()}

    def loss(named):
        context = dot_product_attention(**named, **fixed, implementation=implementation)
        probe = normal(9, *context.shape).astype("float32")
        return (context.astype("float32") * probe).sum(), context

    (_, context), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(named)
    return context, gradients


def check(call, values):
    context, gradients = graded("cudnn", call, values)
    expected, slopes = graded("reference", call, values, wide=True)
    dtype = values[0].dtype
    assert context.dtype == dtype
    assert_close(context, expected, dtype, "context")
    for name, gradient in gradients.items():
        assert_close(gradient, slopes[name], dtype, name)
    return context, gradients


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [*SERVED, *(BIASED if HAS_BIAS else ())])
def test_numbers_and_gradients_are_the_reference_s(name, dtype, by_xla):
    sizes, call = served(name)
    check(call, arrays(**sizes, dtype=dtype))
    (given, options) = by_xla[0]
    right = call.get("mask", Mask()).band[1] if isinstance(call.get("mask"), Mask) else None
    window = call.get("local_window_size")
    assert options["is_causal"] == (
        call.get("is_causal", False) or right == 0 or window is not None
    )
    has_scores = any(x is not None for x in given[3:])
    assert options["local_window_size"] == (None if has_scores else window)
    assert options["scale"] == pytest.approx(call.get("scale", H**-0.5))
    for x in given[3:]:
        assert x is None or x.shape[2:] == (T, S)
    assert given[3] is None or given[3].dtype == dtype


@pytest.mark.slow
def test_a_query_without_a_key_is_0_and_so_are_its_gradients(by_xla):
    values = arrays(*SIZES)
    mask = np.asarray(booleans(3, B, 1, T, S)) & (np.arange(T) % 3 != 1)[:, None]
    context, gradients = check({"mask": mask}, values)
    assert (context[:, 1::3] == 0).all()
    assert (gradients["query"][:, 1::3] == 0).all()
    dot_product_attention(*values, mask=mask, implementation="cudnn")
    given = by_xla[-1][0][4]
    assert given.shape == (B, 1, T, S)
    assert given.any(-1).all()  # no softmax of nothing reaches the kernel
    _, none = check({"mask": np.zeros((T, S), bool)}, values)
    assert all((x == 0).all() for x in none.values())


def test_garbage_in_padding_reaches_nothing(by_xla):
    values = arrays(*SIZES)
    broken = [values[0], *(x.at[1, S // 2 :].set(jnp.nan) for x in values[1:])]
    context, gradients = graded("cudnn", {"mask": padding()}, broken)
    expected, slopes = graded("cudnn", {"mask": padding()}, values)
    np.testing.assert_array_equal(context, expected)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, slopes[name])


@needs_bias
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shift", [0.0, 1e4, -6e4, -1e9, 1e30, float(np.finfo("float32").min)])
def test_a_mask_holds_beside_a_bias_of_any_size(shift, dtype, by_xla):
    """jax masks by -2^41 or -2^15: a padded key would win over keys whose bias is below that."""
    bias = jnp.full((B, N, T, S), shift)
    values = arrays(*SIZES, dtype=dtype)
    context, gradients = graded("cudnn", {"bias": bias, "mask": padding()}, values)
    plain, slopes = graded("reference", {"mask": padding()}, values, wide=True)
    assert_close(context, plain, dtype, "context")
    for name, slope in slopes.items():
        assert_close(gradients[name], slope, dtype, name)


@pytest.mark.slow
@needs_bias
@pytest.mark.parametrize("least", [-np.inf, -1e9, float(np.finfo("float32").min)])
def test_an_additive_mask_of_any_kind(least, by_xla):
    """Padded keys, and a query that sees nothing: 0, or of a finite number all keys as they are."""
    values = arrays(*SIZES)
    bias = jnp.where(np.arange(S) < 6, normal(4, B, 1, T, S), least)
    check({"bias": bias}, values)
    context, gradients = graded("cudnn", {"bias": bias.at[0, 0, 2].set(least)}, values)
    plain = dot_product_attention(*values, implementation="reference")
    assert_close(context[0, 2], 0 * plain[0, 2] if np.isinf(least) else plain[0, 2], "float16")
    assert all(np.isfinite(x).all() for x in gradients.values())


@pytest.mark.slow
@needs_bias
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_a_padded_key_adds_moves_nothing(dtype, by_xla):
    """A row's largest bias is that of the keys it may attend to; all stay finite in 16 bits."""
    bias = normal(4, B, N, T, S).at[..., S // 2 :].set(1e9).at[..., 0].set(-1e9)
    call = {"bias": bias, "mask": np.arange(S) < S // 2}
    values = arrays(*SIZES, dtype=dtype)
    check(call, values)
    dot_product_attention(*values, **call, implementation="cudnn")
    given = by_xla[-1][0][3].astype("float32")
    assert cudnn.FORBIDDEN[dtype] <= given.min() < given.max() == 0


@pytest.mark.slow
@needs_bias
def test_a_bias_is_rounded_near_0_where_weights_are_large(by_xla):
    """ALiBi over 4096 keys: in bfloat16 -2000.6 is -2000, and -4 to -0 would all be some -2048."""
    values = arrays(1, 2, 4096, 1, 1, 8, 8, dtype="bfloat16")
    bias = -0.7 * jnp.abs(jnp.arange(4096.0)[None] - jnp.array([[4095.0], [1.0]]))
    check({"bias": bias - 2000.6}, values)


# --- its program, as jax lowers it for CUDA -----------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch):
    """As if on an H100 with cuDNN 9.10, for jax too: its own checks and rules run."""
    monkeypatch.setattr(f"{FUSED}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "capability", lambda: cudnn.WIDER)


def gradient_of(call, mapped=None):
    """The gradients of everything that has one; with axes, of one example each."""

    def gradients(query, key, value, bias):
        def loss(*named):
            given = {**call, **({} if bias is None else {"bias": named[3]})}
            context = dot_product_attention(*named[:3], **given, implementation="cudnn")
            return context.astype("float32").sum()

        count = 3 if bias is None else 4
        return jax.grad(loss, tuple(range(count)))(query, key, value, bias)

    return gradients if mapped is None else jax.vmap(gradients, in_axes=mapped)


def lowered(function, *values):
    return jax.jit(function).trace(*values).lower(lowering_platforms=("cuda",)).as_text()


def calls_in(text):
    """(kernel, kind of mask, window) of each call of cuDNN."""
    lines = [line for line in text.splitlines() if "__cudnn$" in line]
    patterns = (
        r"__cudnn\$(\w+)",
        r"mask_type\\22: \\22(\w+)\\22",
        r"sliding_window_length\\22: (\d+)",
    )
    return [tuple(re.search(pattern, line)[1] for pattern in patterns) for line in lines]


@pytest.mark.parametrize("name", [*SERVED, *(BIASED if HAS_BIAS else ())])
def test_jax_takes_what_is_served_and_lowers_it_for_cuda(name, a_gpu):
    sizes, call = served(name)
    bias = call.pop("bias", None)
    text = lowered(gradient_of(call), *shapes(**sizes), bias)
    kernel = "fmhaScaleBiasSoftmax" if cudnn_scores(call, bias) else "fmhaSoftmax"
    causal = call.get("is_causal") or call.get("local_window_size")
    causal = causal or (isinstance(call.get("mask"), Mask) and call["mask"].band[1] == 0)
    left = call.get("local_window_size", (None, 0))[0]
    window = 0 if left is None or cudnn_scores(call, bias) else left + 1
    kind = "CAUSAL" if causal else "NO_MASK"
    expected = [(kernel, kind, str(window)), (f"{kernel}Backward", kind, str(window))]
    assert calls_in(text) == expected


def cudnn_scores(call, bias):
    return bias is not None or "mask" in call


@pytest.mark.parametrize(
    "name", ["float32", "features of values", "odd features", "odd queries", "odd keys"]
)
def test_what_is_refused_would_be_refused_by_jax(name, a_gpu, monkeypatch):
    """The gates are jax's own: without ours, its errors."""
    monkeypatch.setattr(cudnn, "unsupported", lambda *_: None)
    call, sizes, _ = REFUSED[name]
    with pytest.raises((ValueError, NotImplementedError)):
        lowered(gradient_of(call), *shapes(**sized(**sizes)), None)


def test_under_vmap_with_what_all_examples_share(a_gpu):
    """jax before 0.11.1 would reshape a shared key, or cotangent, as if it had the axis."""
    query, key, value = shapes(*SIZES)
    many = jax.ShapeDtypeStruct((3, *query.shape), query.dtype)
    text = lowered(gradient_of({"is_causal": True}, (0, None, None, None)), many, key, value, None)
    assert len(calls_in(text)) == 2
    assert f"tensor<{3 * B}x{S}x{K}x{H}xbf16>" in text


@needs_bias
def test_under_vmap_each_example_has_its_own_gradient_of_a_shared_bias(a_gpu):
    """jax before 0.11.1 would give each of them the sum over all: now it refuses."""
    query, key, value = shapes(*SIZES)
    many = jax.ShapeDtypeStruct((3, *query.shape), query.dtype)
    function = gradient_of({}, (0, None, None, None))
    bias = jax.ShapeDtypeStruct((N, T, S), "float32")
    if jax.__version_info__ < (0, 11, 1):
        with pytest.raises(TypeError, match="cannot reshape array of shape"):
            lowered(function, many, key, value, bias)
        return
    text = lowered(function, many, key, value, bias)
    backward = next(x for x in text.splitlines() if "SoftmaxBackward" in x)
    assert f"tensor<{3}x{N}x{T}x{S}xbf16>" in backward or f"<{3 * B}x{N}x{T}x{S}x" in backward
    (_, _, _, gradient) = jax.eval_shape(function, many, key, value, bias)
    assert gradient.shape == (3, N, T, S)


def test_under_shard_map_of_batch_and_heads(a_gpu):
    mesh = jax.make_mesh((2, 2), ("b", "n"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = P("b", None, "n")
    sharded = jax.shard_map(
        lambda q, k, v: gradient_of({"mask": padding(1)})(q, k, v, None),
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=(spec,) * 3,
    )
    text = jax.jit(sharded).trace(*shapes(*SIZES)).lower(lowering_platforms=("cuda",)).as_text()
    assert f"tensor<{B // 2}x{N // 2}x{T}x{H}xbf16>" in text


def test_the_tie_between_arrays_is_gone_from_the_program(monkeypatch):
    """It is there for the `vmap` of an old jax alone: XLA drops it."""
    monkeypatch.setattr(cudnn, "SHARES", (99,))
    tied = lambda *arrays: [cudnn._unless(cudnn._never(arrays), x) for x in arrays]
    assert "select_n" in str(jax.make_jaxpr(tied)(*arrays(*SIZES)))
    compiled = jax.jit(tied).lower(*arrays(*SIZES)).compile().as_text()
    assert not re.search(r"\b(select|or|and|convert)\(", compiled)
