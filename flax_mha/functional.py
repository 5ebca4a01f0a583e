"""The layer as a pure function: `multi_head_attention(params, query, value, ...)`.

query, key, value -> projections -> attention -> (gate) -> output projection
"""

from typing import Any

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Array, ParamsLike, PRNGKey
from flax_mha.layer import Activations, CrossCache, KVCache
from flax_mha.layer.adapters import LoraCall, checked_lora
from flax_mha.layer.arguments import (
    Arrays,
    Restrictions,
    check_arrays,
    check_source,
    checked_restrictions,
)
from flax_mha.layer.cached_call import check_cached_call
from flax_mha.layer.equation import Flags, layer
from flax_mha.masks import Mask
from flax_mha.params.quantized import read_kernels


def multi_head_attention(
    params: ParamsLike,
    query: Array,
    value: Array | None,
    key: Array | None = None,
    *,
    config: MultiHeadAttentionConfig,
    query_mask: Array | None = None,
    value_mask: Array | None = None,
    key_mask: Array | None = None,
    attention_mask: Mask | Array | None = None,
    use_causal_mask: bool = False,
    return_attention_scores: bool = False,
    dropout_key: PRNGKey | None = None,
    bias: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    positions: Array | tuple[Array, Array] | None = None,
    cache: KVCache | CrossCache | None = None,
    dropout_start: Any = None,
    lora: ParamsLike | None = None,
    lora_scale: Any = 1.0,
    lora_dropout: float = 0.0,
    lora_dropout_key: PRNGKey | None = None,
) -> Any:
    """Keras's MultiHeadAttention as a pure function of explicit parameters.

        output = (softmax(q k / sqrt(H) + bias, over allowed keys) v * gate) . W_output + b_output
        q = query . W_query + b_query;  k, v likewise;  gate = sigmoid(query . W_gate + b_gate)

    Compiled by `jax.jit` at the first call with new shapes; masks, keys and parameters are data.

    Args:
        params: what `init_params` returns, or `variables["params"]` of the linen module.
        query: `[B, T, D]`; or `[T, D]`, one sequence without a batch; or any rank with
            `attention_axes`.
        value: `[B, S, M]`, of the query's rank; None with a `CrossCache`.
        key: `[B, S, C]`; None = value.
        config: the layer's static description.
        query_mask: booleans `[B, T]`, True = a real query.
        value_mask: booleans `[B, S]`, True = a real value.
        key_mask: booleans `[B, S]`, True = a real key; combined with `value_mask` by "and".
        attention_mask: booleans `[T, S]`, `[B, T, S]` or `[B, N, T, S]`, True = may attend. With
            more axes `[*batch, N, *T axes, *S axes]`; missing ones are those nearest to T. Or a
            `Mask`, whose b counts all batch axes as one, and whose t and s are places in raster
            order of the attended axes. With a cache t and s are positions in the whole sequence,
            and a Mask is made of functions and bands: t counts on from the cache's length, s is
            where a key stood, of a `CrossCache` its slot.
        use_causal_mask: no key after the query, in raster order of the attended axes.
        return_attention_scores: also return the weights, before dropout.
        dropout_key: one PRNG key; None = no dropout.
        bias: floats shaped as an `attention_mask` may be, added to the logits.
        segment_ids: integers `[B, T]`, or a pair `([B, T], [B, S])`: attention within equal ids.
            Rotary positions count the tokens of each id: an id that comes back counts on.
        positions: integers `[B, T]`, or a pair `([B, T], [B, S])`, for rotary embedding; None =
            0, 1, 2, ..., from the cache's length on where there is one. With a `CrossCache`, those
            of the queries alone. For `AxialRotary` integers or floats, `[axes, B, T]` too.
        cache: a `KVCache`, which takes in the T new tokens, each of which sees those before it;
            `value_mask` marks the real ones (right padding). Or a `CrossCache`, which counts the
            queries; `query_mask` marks the real ones.
        dropout_start: integers (b, n, t, s), traced or not: where this call stands in the whole one
            of which it is a shard; None = (0, 0, 0, 0). b counts over all batch axes, t and s over
            all attended ones; with a cache t counts the queries of the call alone, s the keys that
            it shows. Inside `jax.shard_map` or `jax.pmap` every shard draws the bits of the first
            one without it, or without a key of its own by `jax.random.fold_in`.
        lora: low-rank adapters of the projections, a tree as `lora_params` makes it; computed in
            the dtype that the call has without them.
        lora_scale: a number, traced or not, the factor of what they add: alpha / rank.
        lora_dropout: probability in [0, 1) of dropping a number that an adapter reads; acts only
            with `lora_dropout_key`.
        lora_dropout_key: one PRNG key; None = no dropout of the adapters.

    Returns:
        The output `[B, T, *E]`, then the attention_scores `[B, N, T, S]` if asked for (with a
        `KVCache`, over the keys that it shows), then the new cache if one was given.

    Raises:
        ValueError: a shape that does not fit, with the expected letters and the received shape.
        TypeError: a float mask, integer inputs, a dropout key that is none; under `jit` and `vmap`,
            which hide its values, a mask of integers with a sign: pass `mask.astype(bool)`.
        NotImplementedError: the implementation named in the config cannot serve this call.

    Memory: O(T + S) from T x S = 96 x 96 on; O(B N T S) below, and where scores are returned.

    Differs from Keras: (1) a query that may attend nowhere has context 0 on every path; (2) masks
    are expanded before they are combined, and never inverted by a cast; (3) causal and window masks
    follow the attended axes; (4) NaN at padded positions goes nowhere. The README has the table.

    Guides: `python -m flax_mha guide masks`, and so on: dropout, devices, errors, trust.

    Reference: Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> x = jax.random.normal(jax.random.key(0), (4, 8, 32))
        >>> params = flax_mha.init_params(jax.random.key(1), config, x.shape)
        >>> flax_mha.multi_head_attention(params, x, x, config=config, use_causal_mask=True).shape
        (4, 8, 32)
    """
    restrictions = Restrictions(
        query_mask,
        value_mask,
        key_mask,
        attention_mask,
        bias,
        segment_ids,
        positions,
        dropout_start,
    )
    flags = Flags(use_causal_mask, return_attention_scores, return_projections=False)
    arrays = (query, value, value if key is None else key)
    lora_call = LoraCall(lora, lora_scale, lora_dropout, lora_dropout_key)
    activations = _run(params, arrays, restrictions, dropout_key, cache, lora_call, config, flags)
    return results(activations, return_attention_scores)


def results(activations: Activations, return_attention_scores: bool) -> Any:
    """The output alone, or a tuple with what else was asked for: scores, then the cache."""
    scores = activations.attention_scores if return_attention_scores else None
    extras = [x for x in (scores, activations.cache) if x is not None]
    return (activations.output, *extras) if extras else activations.output


def forward(
    params: ParamsLike,
    query: Array,
    value: Array | None,
    key: Array | None = None,
    *,
    config: MultiHeadAttentionConfig,
    use_causal_mask: bool = False,
    return_attention_scores: bool = False,
    dropout_key: PRNGKey | None = None,
    cache: KVCache | CrossCache | None = None,
    lora: ParamsLike | None = None,
    lora_scale: Any = 1.0,
    lora_dropout: float = 0.0,
    lora_dropout_key: PRNGKey | None = None,
    **restrictions: Any,
) -> Activations:
    """`multi_head_attention` with everything it computed: what `activity_loss` needs.

    Args:
        params: as in `multi_head_attention`, and so are all others.
        query: `[B, T, D]`.
        value: `[B, S, M]`.
        key: `[B, S, C]`; None = value.
        config: the layer's static description.
        use_causal_mask: no key after the query.
        return_attention_scores: fill `attention_scores`.
        dropout_key: one PRNG key; None = no dropout.
        cache: a `KVCache` or a `CrossCache`; with one, the projections are None.
        lora: low-rank adapters of the projections.
        lora_scale: the factor of what they add.
        lora_dropout: probability of dropping a number that an adapter reads.
        lora_dropout_key: one PRNG key; None = no dropout of the adapters.
        **restrictions: query_mask, value_mask, key_mask, attention_mask, bias, segment_ids,
            positions, dropout_start.

    Returns:
        `Activations(query, key, value, gate, output, attention_scores, cache)`.

    Raises:
        As `multi_head_attention`.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> x = jax.random.normal(jax.random.key(0), (4, 8, 32))
        >>> params = flax_mha.init_params(jax.random.key(1), config, x.shape)
        >>> flax_mha.forward(params, x, x, config=config).query.shape
        (4, 8, 2, 16)
    """
    flags = Flags(use_causal_mask, return_attention_scores, return_projections=cache is None)
    arrays = (query, value, value if key is None else key)
    restricted = Restrictions(**_known_restrictions(restrictions))
    lora_call = LoraCall(lora, lora_scale, lora_dropout, lora_dropout_key)
    return _run(params, arrays, restricted, dropout_key, cache, lora_call, config, flags)


def _known_restrictions(given: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(given) - set(Restrictions._fields)):
        rule = f"Masks and positions are given as {', '.join(Restrictions._fields)}."
        checks.fail(TypeError, rule, f"the argument{'s' * (len(unknown) > 1)} {', '.join(unknown)}")
    return given


def _run(
    params: ParamsLike,
    arrays: Arrays,
    restrictions: Restrictions,
    dropout_key: PRNGKey | None,
    cache: KVCache | CrossCache | None,
    lora: LoraCall,
    config: MultiHeadAttentionConfig,
    flags: Flags,
) -> Activations:
    """What must be checked of values, before tracing hides them; then the compiled layer."""
    check_arrays(arrays[:1] if isinstance(cache, CrossCache) else arrays)
    params = read_kernels(params)
    check_source(config, arrays)
    restrictions = checked_restrictions(config, restrictions)
    if dropout_key is not None:
        checks.prng_key("dropout_key", dropout_key)
    flags = Flags(*(checks.boolean(name, flag) for name, flag in flags._asdict().items()))
    if cache is not None:
        check_cached_call(cache, arrays, restrictions)
    data = (params, arrays, restrictions, dropout_key, cache, checked_lora(lora))
    return layer(*data, config=config, flags=flags)
