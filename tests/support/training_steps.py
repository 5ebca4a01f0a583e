"""A training step of the linen module, of every kind that a kernel serves, to be compiled."""

import jax
import jax.numpy as jnp

from flax_mha.linen import MultiHeadAttention

D, N, H = 1024, 8, 128
KINDS = {
    "causal": {},
    "padding": {},
    "segments": {},
    "grouped": {"num_kv_heads": 2},
    "bias": {},
    "dropout": {"dropout": 0.1},
}


def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def training_step(kind, implementation=None):
    """(function of arrays, the arrays' types by T and B)."""
    options = dict(dtype="bfloat16", implementation=implementation, **KINDS[kind])
    layer = MultiHeadAttention(N, H, **options)
    x = jnp.zeros((1, 16, D), "bfloat16")
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, x))

    def loss(params, x, bias, arrays):
        call = dict(use_causal_mask=kind not in ("padding", "segments"))
        rngs = {}
        if kind == "padding":
            call |= dict(query_mask=arrays["mask"], value_mask=arrays["mask"])
        if kind == "segments":
            call |= dict(segment_ids=arrays["ids"])
        if kind == "bias":
            call |= dict(bias=bias)
        if kind == "dropout":
            call |= dict(training=True)
            rngs = {"dropout": jax.random.wrap_key_data(arrays["key"])}
        output = layer.apply(params, x, x, **call, rngs=rngs)
        return output.astype("float32").sum()

    def step(params, x, bias, arrays):
        return jax.grad(loss, argnums=(0, 1, 2))(params, x, bias, arrays)

    def types(T, B=1):
        arrays = {
            "mask": shape(B, T, dtype="bool"),
            "ids": shape(B, T, dtype="int32"),
            "key": shape(2, dtype="uint32"),
        }
        return params, shape(B, T, D), shape(1, N, 1, T), arrays

    return step, types
