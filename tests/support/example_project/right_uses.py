"""A small project that uses the library, typed throughout: no checker has anything to say of it.

`tests/trust/test_packaging.py` runs it too, where nothing but the wheel is installed.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import flax_mha
import flax_mha.nnx
from flax_mha import (
    CrossCache,
    KVCache,
    Lora,
    Mask,
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    attention_scores,
    constrain,
    dot_product_attention,
    explain,
    init_cache,
    init_cross_cache,
    init_params,
    lora_params,
    merge_lora,
    multi_head_attention,
    param_shapes,
    param_specs,
    regularization_loss,
)
from flax_mha.positions import Rotary

CONFIG = MultiHeadAttentionConfig(
    num_heads=4,
    key_dim=8,
    dropout=0.1,
    use_bias=("query", "key"),
    position=Rotary(dim=8),
    kernel_constraint="max_norm",
)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs and which of them are real."""

    x_BTD: jax.Array
    is_real_BT: jax.Array


def batches(count: int) -> Iterator[Batch]:
    """Random ones."""
    for seed in range(count):
        x_BTD = jax.random.normal(jax.random.key(seed), (2, 6, 32))
        yield Batch(x_BTD, jnp.arange(6)[None] < jnp.array([[6], [4]]))


def attend(params: Mapping[str, Any], batch: Batch, dropout_key: jax.Array) -> jax.Array:
    """The pure function."""
    output: jax.Array = multi_head_attention(
        params,
        batch.x_BTD,
        batch.x_BTD,
        config=CONFIG,
        value_mask=batch.is_real_BT,
        attention_mask=Mask.causal() & Mask.prefix(2),
        dropout_key=dropout_key,
    )
    return output


def trained() -> dict[str, Any]:
    """Two steps of training."""
    start = init_params(jax.random.key(0), CONFIG, (2, 6, 32))
    optimizer = optax.chain(optax.sgd(0.1), constrain(CONFIG))
    state = optimizer.init(start)
    params: Any = start  # `optax.apply_updates` is typed to return any tree

    def loss(params: Any, batch: Batch, dropout_key: jax.Array) -> jax.Array:
        output_BTE = attend(params, batch, dropout_key)
        return jnp.square(output_BTE).mean() + regularization_loss(params, CONFIG)

    for i, batch in enumerate(batches(2)):
        gradient = jax.grad(loss)(params, batch, jax.random.key(i))
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return {**params}


def decoded(params: Mapping[str, Any]) -> tuple[KVCache, CrossCache]:
    """A step of generation, and one that reads an encoder's output."""
    x_BTD = jax.random.normal(jax.random.key(1), (2, 6, 32))
    cache = init_cache(CONFIG, batch_shape=2, capacity=9)
    output, cache = multi_head_attention(params, x_BTD, x_BTD, config=CONFIG, cache=cache)
    cache = cache.rewind(5).reorder(jnp.array([1, 0]))
    assert cache.length.tolist() == [5, 5]
    cross = init_cross_cache(params, output, config=CONFIG)
    _, cross = multi_head_attention(params, x_BTD, None, config=CONFIG, cache=cross)
    return cache, cross


class Block(nn.Module):
    """The linen module in a model."""

    features: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, training: bool = False) -> jax.Array:
        """Pre-norm."""
        attention = MultiHeadAttention(num_heads=2, key_dim=self.features // 2, dropout=0.1)
        y_BTD = nn.LayerNorm()(x_BTD)
        attended: jax.Array = attention(y_BTD, y_BTD, training=training, use_causal_mask=True)
        return x_BTD + attended


def of_modules(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Linen's output and nnx's."""
    block = Block(features=32)
    variables = block.init(jax.random.key(0), x_BTD)
    rngs = {"dropout": jax.random.key(1)}
    of_linen = jnp.asarray(block.apply(variables, x_BTD, training=True, rngs=rngs))
    layer = flax_mha.nnx.MultiHeadAttention(
        2, 16, query_features=32, rngs=nnx.Rngs(0), lora=Lora(rank=2)
    )
    of_nnx: jax.Array = layer(x_BTD, x_BTD, training=False)
    return of_linen, of_nnx


def further(params: Mapping[str, Any]) -> str:
    """What stands beside the layer."""
    x_BTNH = jnp.ones((1, 4, 2, 8))
    context: jax.Array = dot_product_attention(x_BTNH, x_BTNH, x_BTNH, is_causal=True)
    x_BTD = jnp.ones((2, 6, 32))
    scores = attention_scores(params, x_BTD, x_BTD, config=CONFIG, query_rows=jnp.array([0]))
    lora = lora_params(jax.random.key(3), CONFIG, (2, 6, 32), rank=2)
    merged = merge_lora(params, lora, lora_scale=0.5)
    shapes = param_shapes(CONFIG, (2, 6, 32))
    specs = param_specs(CONFIG, {"heads": "model"})
    said = explain(x_BTNH, x_BTNH, x_BTNH)
    names = [sorted(tree) for tree in (merged, shapes, specs)]
    return (
        f"{context.shape} {scores.shape} {names} {said['reference']} {CONFIG.to_dict()['dropout']}"
    )


def main() -> None:
    """All of it."""
    params = trained()
    print(*(cache.length for cache in decoded(params)))
    print(*(output.shape for output in of_modules(jnp.ones((2, 6, 32)))))
    print(further(params))


if __name__ == "__main__":
    main()
