"""Queries that grow with their position: against loops and the transformers library."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, random_params

from flax_mha import (
    MultiHeadAttentionConfig,
    attention_scores,
    init_cache,
    init_cross_cache,
    multi_head_attention,
    param_shapes,
)
from flax_mha.positions import AxialRotary, PositionFunction, QueryGrowth, Rotary

B, T, N, H, D = 2, 13, 3, 8, 17
GROWTHS = {
    "llama4": QueryGrowth(0.7, 4),
    "ministral3": QueryGrowth(0.7, 5, offset=0, rotary=Rotary(base=100.0)),
    "partial": QueryGrowth(0.3, 2, rotary=Rotary(dim=4, interleaved=True)),
}
each = pytest.mark.parametrize("name", GROWTHS)


def turned(x_H, p, rotary):
    """One head at position p, pair by pair, in float64."""
    y, dim = np.array(x_H), rotary.dim or len(x_H)
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + dim // 2)
        angle = p * rotary.base ** (-2 * i / dim)
        y[a] = x_H[a] * math.cos(angle) - x_H[b] * math.sin(angle)
        y[b] = x_H[b] * math.cos(angle) + x_H[a] * math.sin(angle)
    return y


def placed(x_TNH, growth, first, is_query):
    y = np.array(x_TNH)
    for t, n in np.ndindex(*y.shape[:2]):
        p = first + t
        if growth.rotary is not None:
            y[t, n] = turned(y[t, n], p, growth.rotary)
        if is_query:
            y[t, n] *= 1 + growth.factor * math.log(
                1 + math.floor((p + growth.offset) / growth.interval)
            )
    return y


def expected(params, x, growth, first=0):
    """Causal self-attention of one example whose first token stands at `first`, by loops."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x_TD = np.asarray(x, np.float64)
    heads = {
        name: np.einsum("td,dnh->tnh", x_TD, params[name]["kernel"]) + params[name]["bias"]
        for name in ("query", "key", "value")
    }
    query = placed(heads["query"], growth, first, True)
    key = placed(heads["key"], growth, first, False)
    context = np.zeros_like(query)
    for t, n in np.ndindex(len(x_TD), N):
        logits = [query[t, n] @ key[s, n] / math.sqrt(H) for s in range(t + 1)]
        powers = np.exp(np.array(logits) - max(logits))
        context[t, n] = powers @ heads["value"][: t + 1, n] / powers.sum()
    output = params["attention_output"]
    return np.einsum("tnv,nve->te", context, output["kernel"]) + output["bias"]


def layer(growth, **fields):
    config = MultiHeadAttentionConfig(N, H, position=growth, **fields)
    x = normal(3, B, T, D)
    return config, random_params(param_shapes(config, x.shape)), x


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@each
def test_queries_grow(name, implementation):
    config, params, x = layer(GROWTHS[name], implementation=implementation)
    output = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
    assert_close(output, np.stack([expected(params, one, GROWTHS[name]) for one in x]), "float32")
    plain = config.replace(position=GROWTHS[name].rotary)
    without = multi_head_attention(params, x, x, config=plain, use_causal_mask=True)
    assert np.abs(output - without).max() > 1e-2


@pytest.mark.slow
@each
def test_positions_count_from_a_cache_or_are_given(name):
    config, params, x = layer(GROWTHS[name])
    whole = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
    cache, outputs = init_cache(config, B, T), []
    for size in (7, *[1] * (T - 7)):
        first = sum(out.shape[1] for out in outputs)
        new = x[:, first : first + size]
        output, cache = multi_head_attention(params, new, new, config=config, cache=cache)
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), whole, "float32")
    moved = jnp.arange(T)[None] + jnp.array([[11], [0]])
    output = multi_head_attention(
        params, x, x, config=config, positions=moved, use_causal_mask=True
    )
    assert_close(output[0], expected(params, x[0], GROWTHS[name], first=11), "float32")
    assert_close(output[1], whole[1], "float32")
    rows = jnp.array([T - 1, 4])
    call = {"config": config, "use_causal_mask": True}
    _, scores = multi_head_attention(params, x, x, **call, return_attention_scores=True)
    some = attention_scores(params, x, x, **call, query_rows=rows)
    assert_close(some, scores[:, :, rows], "float32")


def test_queries_of_a_cross_cache_go_on_growing():
    config, params, x = layer(GROWTHS["llama4"])
    encoded = normal(4, B, 6, D)
    whole = multi_head_attention(params, x, encoded, config=config)
    cache, outputs = init_cross_cache(params, encoded, config=config), []
    for one in (x[:, :7], x[:, 7:]):
        output, cache = multi_head_attention(params, one, None, config=config, cache=cache)
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), whole, "float32")


def test_a_growth_is_a_value():
    for growth in GROWTHS.values():
        config = MultiHeadAttentionConfig(N, H, position=growth)
        again = MultiHeadAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert (again, hash(again)) == (config, hash(config))
        assert isinstance(again.position, PositionFunction)


def test_positions_of_any_type_and_sign():
    """A position below 0, as some give to padding, grows as 0 does; uint8 does not wrap."""
    growth = QueryGrowth(1.0, 64)
    at = growth(jnp.array([[-100, -1, 0, 63]], "int32"))
    assert at.tolist() == [[1.0, 1.0, 1.0, pytest.approx(1 + math.log(2))]]
    assert float(growth(jnp.array([[255]], "uint8"))[0, 0]) == pytest.approx(1 + math.log(5))
    largest = np.iinfo(np.int32).max
    assert float(growth(jnp.array([[largest]]))[0, 0]) == pytest.approx(
        1 + math.log(1 + (largest + 1) // 64)
    )


def test_refusals():
    with pytest.raises(ValueError, match=r"one number.*AxialRotary"):
        QueryGrowth(0.1, 8, rotary=AxialRotary(sections=(2, 2)))
    with pytest.raises(TypeError, match=r"rotary.*Rotary"):
        QueryGrowth(0.1, 8, rotary="rotary")
    with pytest.raises(ValueError, match="interval"):
        QueryGrowth(0.1, 0)
    with pytest.raises(ValueError, match="offset"):
        QueryGrowth(0.1, 8, offset=-1)
    config, params, x = layer(GROWTHS["llama4"])
    with pytest.raises(TypeError, match=r"positions.*integers"):
        multi_head_attention(params, x, x, config=config, positions=jnp.zeros((B, T)))


@pytest.mark.models
def test_the_transformers_library_agrees():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from transformers.models.llama4 import modeling_llama4
    from transformers.models.ministral3 import modeling_ministral3

    assert transformers
    at = np.array([0, 1, 6, 7, 8, 100, 8190, 8191, 8192, 99999])
    theirs = modeling_ministral3.get_llama_4_attn_scale(torch.tensor(at)[None], 0.1, 8)
    ours = QueryGrowth(0.1, 8, offset=0)(jnp.asarray(at, "int32")[None])
    assert_close(ours[0], theirs.numpy().ravel(), "float32")
    fields = {
        "head_dim": H, "num_attention_heads": N, "num_key_value_heads": N, "hidden_size": D,
        "attn_scale": 0.7, "floor_scale": 4, "attn_temperature_tuning": True,
        "attention_dropout": 0.0, "no_rope_layers": [0], "attention_bias": True,
        "use_qk_norm": False, "_attn_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(0)
    module = modeling_llama4.Llama4TextAttention(types.SimpleNamespace(**fields), 0)
    config, _, x = layer(GROWTHS["llama4"])
    named = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "attention_output": "o_proj"}
    params = {ours: weights(getattr(module, theirs), ours) for ours, theirs in named.items()}
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        theirs = module(torch.tensor(np.asarray(x)), None, mask)[0]
    output = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
    assert_close(output, theirs.numpy(), "float32")


def weights(linear, name):
    kernel, bias = linear.weight.detach().numpy().T, linear.bias.detach().numpy()
    if name == "attention_output":
        return {"kernel": kernel.reshape(N, H, D), "bias": bias}
    return {"kernel": kernel.reshape(D, N, H), "bias": bias.reshape(N, H)}
