"""cuDNN's fused attention on NVIDIA GPUs, for bfloat16 and float16; by name only.

A thin layer over `jax.nn.dot_product_attention(implementation="cudnn")`, which serves the calls
that mean the same there as here. Memory O(T + S); with padding, a dense mask or a bias O(T S).
Derivatives: the first one, in reverse. Batch and heads may stand on a mesh, lengths may not. Under
`vmap` jax refuses some masks and biases of fewer examples or heads than the query has.

The tests on a CPU show what is refused, what jax is given, the numbers of the same call by jax's
own XLA path, and that jax checks it, differentiates it and lowers it for CUDA. `python -m pytest
tests/accelerators` runs the kernel where there is one; it did so on an H200, with jax 0.11.2.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flax_mha.attention.contract import NAMES, Inputs, Options, Output, shift_of
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.sizes import is_known
from flax_mha.core.typing import Array
from flax_mha.core.varying import varying_alike

# What jax adds where its mask forbids. A bias stops there: two that are larger would overflow.
FORBIDDEN = {"bfloat16": -(2.0**41), "float16": -(2.0**15)}
OLDEST = (8, 0)
WIDER = (9, 0)  # has heads of 256 features, the others of 128
# The first jax in which every bias has its gradient; in which `vmap` knows what examples share.
BIASES, SHARES = (0, 8, 1), (0, 11, 1)


def unsupported(inputs: Inputs, options: Options, platform: str | None) -> str | None:
    """The first of the reasons: place, options, sizes, masks."""
    return next(_reasons(inputs, options, platform), None)


def attend(inputs: Inputs, options: Options) -> Output:
    """context = softmax(scale query . key + bias) . value, in one kernel."""
    left, right = inputs.mask.band
    bias_bnTS, mask_bnTS, open_bnT1 = _scores(inputs)
    window = None if left is None or mask_bnTS is not None else (left, 0)
    arrays = (inputs.query_BTNH, inputs.key_BSKH, inputs.value_BSKV, bias_bnTS, mask_bnTS)
    never = _never(arrays)
    context_BTNV = jax.nn.dot_product_attention(
        *varying_alike(tuple(_unless(never, x) for x in arrays)),
        scale=options.scale,
        is_causal=right == 0,
        local_window_size=window,
        implementation="cudnn",
    )
    context_BTNV = _unless(never, context_BTNV)
    if open_bnT1 is not None:
        context_BTNV = jnp.where(open_bnT1.swapaxes(1, 2), context_BTNV, 0)
    return Output(checkpoint_name(context_BTNV, NAMES[0]))


def capability() -> tuple[int, ...] | None:
    """The compute capability of this process's NVIDIA GPU; None where it has none."""
    numbers = str(getattr(jax.devices()[0], "compute_capability", "")).split(".")
    return tuple(map(int, numbers)) if all(number.isdigit() for number in numbers) else None


# --- what is refused ----------------------------------------------------------------------------


def _reasons(inputs: Inputs, options: Options, platform: str | None) -> Iterator[str]:
    yield from _of_place(platform)
    for is_asked, reason in (*_of_options(inputs, options), *_of_arrays(inputs)):
        if is_asked:
            yield reason
    yield from _of_sizes(inputs)
    yield from _of_masks(inputs)


def _of_place(platform: str | None) -> Iterator[str]:
    here = jax.default_backend()
    if platform not in (None, "gpu"):
        yield "it is for NVIDIA GPUs"
    elif platform is None and here != "gpu":
        asks = "explain(..., platform='gpu') says what one would serve"
        yield f"it is for NVIDIA GPUs, which jax asks while it traces, not for {here}; {asks}"
    elif here == "gpu" and (found := capability() or (0, 0)) < OLDEST:
        kind = jax.devices()[0].device_kind
        yield f"it is for NVIDIA GPUs of compute capability 8.0 or later, not {kind} {found}"


def _of_options(inputs: Inputs, options: Options) -> Iterator[tuple[bool, str]]:
    yield inputs.scales is not None, "it has no keys and values of int8"
    yield options.return_weights, "it never holds the weights [T, S] that return_weights asks for"
    yield options.return_residuals, "jax rounds its residuals to 16 bits, without a gradient"
    yield inputs.sinks_N is not None, "sinks need residuals, which jax rounds to 16 bits"
    yield options.dropout_rate > 0, "its dropout draws bits of its own, not those of the key"
    yield options.soft_cap is not None, "it has no soft cap"
    yield inputs.score is not None, "it has no score functions"
    yield bool(inputs.where), "it has no masks by functions, unions or complements"
    yield inputs.distance_bias is not None, "it has no distance bias but the whole [T, S]"
    yield options.precision is not None, "its products have one precision, so precision=None"
    yield options.block_sizes is not None, "it chooses its blocks, so block_sizes must be None"


def _of_arrays(inputs: Inputs) -> Iterator[tuple[bool, str]]:
    dtype, bias = inputs.query_BTNH.dtype, inputs.bias_bnts
    yield dtype.name not in FORBIDDEN, f"it serves bfloat16 and float16, not {dtype.name}"
    is_old = jax.__version_info__ < BIASES
    old = f"jax {jax.__version__} loses gradients of a bias: 0.8.1 or later has them"
    yield bias is not None and is_old, old


def _of_sizes(inputs: Inputs) -> Iterator[str]:
    (B, T, N, H), (_, S, _, V) = inputs.query_BTNH.shape, inputs.value_BSKV.shape
    most = _most_features()
    if not is_known(B, T, N, H, S, V):
        yield f"its program needs sizes that are numbers, not T = {T}, S = {S}, B = {B}"
    elif 0 in (B, T, N, H, S, V):
        yield f"it has no program for arrays without entries, B = {B}, T = {T}, S = {S}"
    elif V != H:
        yield f"values must have as many features as keys, not V = {V} and H = {H}"
    elif H % 8:
        yield f"the features of a head must be a multiple of 8, not H = {H}"
    elif T % 2 or S % 2:
        # jax asks this of every gradient: it sees a bias where there is none.
        yield f"its gradient needs even lengths, not T = {T}, S = {S}"
    elif most < H:
        wider = "256 on a GPU of compute capability 9.0, which jax asks this process for"
        yield f"a head may have {most} features ({wider}), not H = {H}"


def _most_features() -> int:
    found = capability() or OLDEST
    wider = found >= WIDER if jax.__version_info__ >= (0, 8, 2) else found == WIDER
    return 256 if wider else 128


def _of_masks(inputs: Inputs) -> Iterator[str]:
    mask, T, S = inputs.mask, inputs.query_BTNH.shape[1], inputs.key_BSKH.shape[1]
    left, right = mask.band
    if mask.segment_ids:
        yield "it has no segment ids"
    if mask.query_offset is not None:
        yield "its causal order starts at 0, so a mask may have no query_offset"
    if right != 0 and mask.band != (None, None):
        yield f"it has windows (left, 0) in causal order alone, not ({left}, {right})"
    if _has_scores(inputs) and S % 128 == 64:
        # https://github.com/pytorch/pytorch/issues/196678
        matter = f"where S % 128 == 64, as in S = {S}, with padding, a dense mask or a bias"
        yield f"its gradient may be NaN {matter}"
    elif not _has_scores(inputs) and left is not None and T > S:
        yield f"its windows need T <= S, not T = {T}, S = {S}"


# --- what jax is given --------------------------------------------------------------------------


def _has_scores(inputs: Inputs) -> bool:
    """Whether the call needs an array [T, S]."""
    mask = inputs.mask
    paddings = (mask.query_padding, mask.key_padding, inputs.bias_bnts)
    return bool(mask.dense_masks) or any(x is not None for x in paddings)


def _scores(inputs: Inputs) -> Any:
    """(bias, mask, which queries may attend at all), each None where there is no [T, S].

    jax masks by a finite number, which a bias of the whole row could fall below: from each row the
    largest bias is taken, for the softmax does not see it. What is then rounded to 16 bits is near
    0 where weights are large. An infinite bias joins the mask. A query without a key attends to
    all, for its softmax must be finite for a gradient of 0.
    """
    if not _has_scores(inputs):
        return None, None, None
    allowed_bnTS = inputs.mask.as_array(inputs.query_BTNH.shape[1], inputs.key_BSKH.shape[1])
    bias_bnTS = inputs.bias_bnts
    if bias_bnTS is not None:
        bias_bnTS = bias_bnTS.astype(wide_dtype(bias_bnTS.dtype))
        allowed_bnTS &= ~jnp.isneginf(bias_bnTS)
        bias_bnTS = _of_row(bias_bnTS, allowed_bnTS, inputs.query_BTNH.dtype)
    open_bnT1 = allowed_bnTS.any(-1, keepdims=True)
    return bias_bnTS, allowed_bnTS | ~open_bnT1, open_bnT1


def _of_row(bias_bnTS: Array, allowed_bnTS: Array, dtype: Any) -> Array:
    """The bias less its row's largest, in the query's dtype."""
    masked_bnTS = jnp.where(allowed_bnTS, jax.lax.stop_gradient(bias_bnTS), -jnp.inf)
    below_bnTS = bias_bnTS - shift_of(masked_bnTS.max(-1, keepdims=True))
    least = FORBIDDEN[dtype.name]
    return jnp.where(allowed_bnTS, jnp.maximum(below_bnTS, least), 0).astype(dtype)


def _never(arrays: tuple[Array | None, ...]) -> Array | None:
    """False, which is mapped under `vmap` where one of the arrays is; None where jax needs it not.

    Arrays and a cotangent that are chosen by it are mapped alike: jax before 0.11.1 cannot read
    those that are shared, and sums each example's gradient of a shared bias over all of them.
    """
    if jax.__version_info__ >= SHARES:
        return None
    given = [x[(0,) * x.ndim].astype(bool) for x in arrays if x is not None]
    return jnp.stack(given).any() & False


def _unless(never: Array | None, x: Any) -> Any:
    """The array itself, of which XLA drops the choice."""
    return x if never is None or x is None else jnp.where(never, jnp.zeros((), x.dtype), x)
