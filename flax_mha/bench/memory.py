"""Temporaries of compiled programs: exact, and known without running them."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_mha import dot_product_attention, multi_head_attention, param_shapes
from flax_mha.bench.cases import Case
from flax_mha.bench.data import config_of

# name -> (T, heads, dropout, whether the projections are part of it); heads of 64 features.
PROGRAMS = {
    "layer, T=8192, 8 heads": (8192, 8, 0.0, True),
    "layer, T=16384, 8 heads": (16384, 8, 0.0, True),
    "layer, T=16384, 8 heads, dropout 0.1": (16384, 8, 0.1, True),
    "attention, T=16384, 8 heads": (16384, 8, 0.0, False),
    "attention, T=16384, 8 heads, dropout 0.1": (16384, 8, 0.1, False),
    "attention, T=131072, 1 head": (131072, 1, 0.0, False),
}


def temporaries(compiled: Any) -> int | None:
    """Bytes that a program needs besides arguments and results; None where it does not say."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def long_sequences(programs: Any = PROGRAMS) -> dict[str, int | None]:
    """Temporaries of FB, causal, of our layer and of its attention alone, at lengths to train."""
    return {name: _gradient_temporaries(*sizes) for name, sizes in programs.items()}


def _gradient_temporaries(length: int, heads: int, dropout: float, layer: bool) -> int | None:
    case = Case(1, length, 64 * heads, heads, gradient=True, causal=True, dropout=dropout)
    dropout_key = jax.eval_shape(lambda: jax.random.key(0)) if dropout else None
    program, arguments = _layer(case) if layer else _attention(case)
    gradient = jax.grad(program, argnums=tuple(range(len(arguments))))
    return temporaries(jax.jit(gradient).lower(*arguments, dropout_key).compile())


def _layer(case: Case) -> tuple[Any, tuple[Any, ...]]:
    """The sum of the layer's output, and its differentiable arguments."""
    config = config_of(case)
    x = jax.ShapeDtypeStruct((1, case.length, case.features), jnp.float32)

    def total(params: Any, x: Any, dropout_key: Any) -> Any:
        options = dict(config=config, use_causal_mask=case.causal, dropout_key=dropout_key)
        return multi_head_attention(params, x, x, **options).sum()

    return total, (param_shapes(config, x.shape), x)


def _attention(case: Case) -> tuple[Any, tuple[Any, ...]]:
    """The sum of the context, and query, key and value."""
    x = jax.ShapeDtypeStruct((1, case.length, case.heads, case.head_size), jnp.float32)

    def total(query: Any, key: Any, value: Any, dropout_key: Any) -> Any:
        rate = case.dropout
        options = dict(is_causal=case.causal, dropout_rate=rate, dropout_key=dropout_key)
        return dot_product_attention(query, key, value, **options).sum()

    return total, (x, x, x)
