"""Attention of one device's part of a sequence: `context_parallel_attention`."""

from typing import Any

from flax_mha.attention.context.axis import ContextAxis, Devices
from flax_mha.attention.dispatch import dot_product_attention
from flax_mha.core.typing import Array


def context_parallel_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    axis_name: str,
    strategy: str | None = None,
    layout: str = "contiguous",
    **call: Any,
) -> Any:
    """`dot_product_attention` of a sequence of which each device has a part.

    For use inside a `jax.shard_map` or `jax.pmap` over the axis. Outside of one,
    `dot_product_attention(..., context_axis=...)` opens it.

    Args:
        query: `[..., T / n, N, H]`, the device's queries.
        key: `[..., S / n, K, H]`, the device's keys.
        value: `[..., S / n, K, V]`, theirs.
        axis_name: the mesh axis, of n devices.
        strategy: "ring", "all_gather", "all_to_all", or None; see `ContextAxis`.
        layout: "contiguous" or "zigzag", the order that the tokens have; see `zigzag_order`.
        **call: any further argument of `dot_product_attention`. Of padding and segment ids a device
            has those of its queries and keys, of a `bias` and a dense mask the rows of its queries
            with all S keys in the order that they are stored in, device by device; so too in unions
            and complements of masks, whose arrays are gathered. A function of pairs is asked for
            positions in the whole sequence, in either layout: what it looks up by t or s is whole
            on every device, as are the blocks of `block_mask`. Offsets, and `dropout_start`, are
            those of the whole sequence.

    Returns:
        The device's part of what `dot_product_attention` returns for the whole: the context
        `[..., T / n, N, V]`; weights `[..., N, T / n, S]`, residuals `[..., N, T / n]`.

    Raises:
        ValueError: no such axis around the call; a length that zigzag order cannot halve.
        NotImplementedError: the strategy cannot serve this call.
        As `dot_product_attention` besides.

    Memory: ring O((T + S) / n) a device in either direction; all_gather O(S), all_to_all O(T) of
    N / n heads.

    Example:
        >>> import jax, flax_mha
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> n, auto = jax.device_count(), (AxisType.Auto,)
        >>> mesh = jax.make_mesh((n,), ("context",), axis_types=auto)
        >>> def attend(x):
        ...     return flax_mha.context_parallel_attention(x, x, x, axis_name="context")
        >>> x = jax.random.normal(jax.random.key(0), (2, 16, 3, 8))
        >>> cut = P(None, "context")
        >>> sharded = jax.shard_map(attend, mesh=mesh, in_specs=cut, out_specs=cut)
        >>> bool(abs(sharded(x) - flax_mha.dot_product_attention(x, x, x)).max() < 1e-5)
        True

    Reference: Liu et al., "Ring Attention with Blockwise Transformers",
    https://arxiv.org/abs/2310.01889.
    """
    axis = ContextAxis(axis_name, strategy, layout)
    Devices.on(axis)
    return dot_product_attention(query, key, value, context_axis=axis, **call)
