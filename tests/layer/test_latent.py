"""Multi-head latent attention: against loops, in every form of cache, and as parameters."""

import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from helpers import TOLERANCES, assert_close, assert_trees_close, normal, random_params, x64
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_mha
from flax_mha import (
    Latent,
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    attention_scores,
    init_cache,
    init_cross_cache,
    init_params,
    multi_head_attention,
    param_axes,
    param_shapes,
    param_specs,
)
from flax_mha import nnx as mha_nnx
from flax_mha.layer.latent import AbsorbedHeads
from flax_mha.norms import LayerNorm, RMSNorm
from flax_mha.positions import QueryGrowth, Rotary

B, T, N, D, E = 2, 11, 3, 17, 29
L, Q, W, U, V = 7, 5, 4, 6, 13
H = W + U
BIASES = ("query_latent", "query", "latent", "shared_key", "attention_output")
LATENTS = {
    "deepseek-v3": {"latent": Latent(L, W, Q, RMSNorm(0.03))},
    "lite": {"latent": Latent(L, W, norm=RMSNorm(0.03))},
    "interleaved": {"position": Rotary(100.0, dim=W, interleaved=True)},
    "part-turned": {"position": Rotary(dim=2)},
    "unturned": {"position": None},
    "grown": {"position": QueryGrowth(0.7, 3, offset=0, rotary=Rotary(dim=W))},
    "alibi": {"position": "alibi"},
    "biased": {"latent": Latent(L, W, Q, LayerNorm(0.03, use_bias=True)), "use_bias": BIASES},
    "no-norm": {"latent": Latent(L, W, Q, None)},
    "scaled": {"scale": 0.9},
    "capped": {"soft_cap": 0.8, "use_sinks": True},
    "gated": {"use_gate": True, "use_bias": True},
    "window": {"sliding_window": 4},
    "chunks": {"chunk_size": 4},
}
each = pytest.mark.parametrize("name", LATENTS)


def layer(name="deepseek-v3", dtype="float32", **fields):
    fields = {
        "num_heads": N, "key_dim": H, "value_dim": V, "use_bias": False, "output_shape": E,
        "position": Rotary(dim=W), "latent": Latent(L, W, Q, RMSNorm(0.03)),
        **LATENTS[name], **fields,
    }  # fmt: skip
    config = MultiHeadAttentionConfig(**fields)
    x = normal(5, B, T, D, dtype=dtype)
    return config, random_params(param_shapes(config, x.shape), dtype=dtype), x


def linear(x, projection):
    """x . kernel + bias of one token, where the kernel has one axis or two behind the first."""
    kernel = projection["kernel"]
    flat = kernel.reshape(len(x), -1)
    y = np.array([sum(x[i] * flat[i, j] for i in range(len(x))) for j in range(flat.shape[1])])
    return y.reshape(kernel.shape[1:]) + projection.get("bias", 0.0)


def normed(x, norm, params):
    if norm is None:
        return x
    centred = x - x.mean() if isinstance(norm, LayerNorm) else x
    y = centred / math.sqrt((centred**2).mean() + norm.epsilon)
    return y * params["scale"] + params.get("bias", 0.0)


def turned(x, p, rotary):
    y = np.array(x)
    for i in range(rotary.dim // 2):
        a, b = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + rotary.dim // 2)
        angle = p * rotary.base ** (-2 * i / rotary.dim)
        y[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        y[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return y


def placed(x, p, position, is_query):
    growth = position if isinstance(position, QueryGrowth) else None
    rotary = growth.rotary if growth else position
    y = turned(x, p, rotary) if isinstance(rotary, Rotary) else x
    if growth and is_query:
        y = y * (1 + growth.factor * math.log(1 + (p + growth.offset) // growth.interval))
    return y


def logit_of(config, q, k, n, t, s):
    scale = 1 / math.sqrt(H) if config.scale is None else config.scale
    logit = scale * (q @ k)
    if config.position is not None and "Alibi" in str(config.position):
        logit -= flax_mha.positions.alibi_slopes(N)[n] * abs(t - s)
    return (
        logit if config.soft_cap is None else config.soft_cap * math.tanh(logit / config.soft_cap)
    )


def expected(params, x, config):
    """Causal self-attention, one token and one head at a time, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return np.stack([of_example(params, one, config) for one in np.asarray(x, np.float64)])


def of_example(params, x_TD, config):
    latent, queries, latents, shared = config.latent, [], [], []
    for p, x in enumerate(x_TD):
        q = x
        if latent.query_rank is not None:
            q = linear(x, params["query_latent"])
            q = normed(q, latent.norm, params.get("query_latent_norm"))
        q = linear(q, params["query"])
        queries.append([placed(head, p, config.position, True) for head in q])
        c = linear(x, params["latent"])
        latents.append(normed(c, latent.norm, params.get("latent_norm")))
        shared.append(placed(linear(x, params["shared_key"]), p, config.position, False))
    outputs = []
    for t, x in enumerate(x_TD):
        context = np.zeros((N, V))
        for n in range(N):
            seen = [s for s in range(t + 1) if is_seen(config, t, s)]
            keys = [np.concatenate([shared[s], linear(latents[s], params["key"])[n]]) for s in seen]
            logits = [logit_of(config, queries[t][n], k, n, t, s) for s, k in zip(seen, keys)]
            total = sum(math.exp(logit) for logit in logits)
            if config.use_sinks:
                total += math.exp(params["sinks"]["logits"][n])
            for s, logit in zip(seen, logits):
                weight = math.exp(logit) / total
                context[n] += weight * linear(latents[s], params["value"])[n]
        if config.use_gate:
            context /= 1 + np.exp(-linear(x, params["gate"]))
        output = np.einsum("nv,nve->e", context, params["attention_output"]["kernel"])
        outputs.append(output + params["attention_output"].get("bias", 0.0))
    return np.stack(outputs)


def is_seen(config, t, s):
    if config.sliding_window is not None and t - s >= config.sliding_window:
        return False
    return config.chunk_size is None or t // config.chunk_size == s // config.chunk_size


def in_pieces(params, x, config, pieces, cache=None, **call):
    cache = init_cache(config, B, T, x.dtype.name) if cache is None else cache
    outputs, first = [], 0
    for size in pieces:
        new = x[:, first : first + size]
        output, cache = multi_head_attention(params, new, new, config=config, cache=cache, **call)
        outputs.append(output)
        first += size
    return jnp.concatenate(outputs, 1), cache


# --- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@each
def test_a_call_without_a_cache_is_its_formula(name, implementation):
    config, params, x = layer(name, implementation=implementation)
    output = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
    assert_close(output, expected(params, x, config), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@each
def test_a_cache_of_latents_gives_the_same(name, implementation):
    config, params, x = layer(name, implementation=implementation)
    formula = expected(params, x, config)
    for pieces in ((1,) * T, (7, 1, 1, 2)):
        assert_close(in_pieces(params, x, config, pieces)[0], formula, "float32", str(pieces))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes(dtype):
    with x64():
        config, params, x = layer(dtype=dtype)
        output = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
        formula = expected(params, x, config)
        assert_close(output, formula, dtype)
        output, _ = in_pieces(params, x, config, (7, 1, 3))
        assert output.dtype == dtype
        assert_close(output, formula, dtype)


@pytest.mark.slow
def test_gradients_of_every_parameter():
    """Of a call with a cache as of one without, whose slope is that of differences."""
    with x64():
        config, params, x = layer("biased", dtype="float64")

        def whole(params):
            y = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
            return (y**2).mean()

        def cached(params):
            return (in_pieces(params, x, config, (7, 4))[0] ** 2).mean()

        gradient = jax.grad(whole)(params)
        assert_trees_close(jax.grad(cached)(params), gradient, "float64")
        assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradient))
        step = jax.tree.map(lambda leaf: normal(7, *leaf.shape, dtype="float64"), params)
        moved = lambda d: jax.tree.map(lambda leaf, way: leaf + d * way, params, step)
        slope = (whole(moved(1e-6)) - whole(moved(-1e-6))) / 2e-6
        mine = sum((g * way).sum() for g, way in zip(*map(jax.tree.leaves, (gradient, step))))
        assert_close(mine, slope, "slope")


# --- caches -------------------------------------------------------------------------------------


def test_memory_is_the_latents_alone():
    config, _, _ = layer(value_dim=128)
    cache = init_cache(config, B, 50, "float32")
    arrays = sum(x.nbytes for x in jax.tree.leaves((cache.key, cache.value)))
    assert arrays == B * 50 * (L + W) * 4
    ring = init_cache(config.replace(sliding_window=8), B, 50)
    assert ring.key.shape == (B, 1, 8, L + W)


@pytest.mark.slow
def test_a_step_copies_no_values(monkeypatch):
    """The keys are their own values: to cut the latents out of them would take a copy."""
    fields = {"position": Rotary(dim=16), "latent": Latent(112, 16), "key_dim": 48}
    config, params, x = layer(**fields, implementation="reference")
    one, cache = x[:1, :1], init_cache(config, 1, 4096, "float32")

    def temporary(seed):  # a config of its own, so that no trace is taken over
        call = {"config": config.replace(seed=seed)}
        step = lambda x, cache: multi_head_attention(params, x, x, **call, cache=cache)
        compiled = jax.jit(step, donate_argnums=1).lower(one, cache).compile()
        return compiled.memory_analysis().temp_size_in_bytes / cache.key.nbytes

    whole = temporary(1)
    cut = lambda self, view: view._replace(value_BSKV=view.key_BSKH[..., :112])
    monkeypatch.setattr(AbsorbedHeads, "read", cut)
    assert temporary(2) > whole + 0.7


@pytest.mark.slow
def test_ragged_prompts_jit_and_vmap():
    config, params, x = layer()
    lengths = np.array([6, 3])
    real = jnp.asarray(np.arange(7)[None] < lengths[:, None])
    broken = jnp.where(real[..., None], x[:, :7], jnp.nan)

    @jax.jit
    def step(x, real, cache):
        return multi_head_attention(params, x, x, config=config, cache=cache, value_mask=real)

    output, cache = step(broken, real, init_cache(config, B, T))
    formula = expected(params, x, config)
    for b, length in enumerate(lengths):
        assert_close(output[b, :length], formula[b, :length], "float32")
    new = jnp.stack([x[b, length] for b, length in enumerate(lengths)])[:, None]
    output, _ = step(new, jnp.ones((B, 1), bool), cache)
    for b, length in enumerate(lengths):
        assert_close(output[b, 0], formula[b, length], "float32")
    run = jax.vmap(lambda x, cache: multi_head_attention(params, x, x, config=config, cache=cache))
    empty = jax.tree.map(lambda leaf: jnp.stack([leaf] * B), init_cache(config, (), T))
    output, cache = run(x[:, :7], empty)
    output, _ = run(x[:, 7:], cache)
    assert_close(output, formula[:, 7:], "float32")


@pytest.mark.slow
def test_dropout_falls_on_the_same_weights():
    config, params, x = layer(dropout=0.4)
    call = {"config": config, "use_causal_mask": True, "dropout_key": jax.random.key(3)}
    whole = multi_head_attention(params, x, x, **call)
    cached, _ = multi_head_attention(params, x, x, **call, cache=init_cache(config, B, T))
    assert_close(cached, whole, "float32")
    dry = multi_head_attention(params, x, x, **{**call, "dropout_key": None})
    assert np.abs(whole - dry).max() > 0.1


@pytest.mark.slow
def test_rewind_reorder_and_state():
    config, params, x = layer()
    formula = expected(params, x, config)
    _, cache = in_pieces(params, x, config, (7,))
    _, drafted = in_pieces(params, x[:, ::-1], config, (3,), cache)
    again = drafted.rewind(7).reorder(jnp.array([1, 0]))
    state = serialization.to_bytes(again)
    again = serialization.from_bytes(init_cache(config, B, T), state)
    output, _ = in_pieces(params, x[::-1, 7:], config, (1, 3), again)
    assert_close(output, formula[::-1, 7:], "float32")


@pytest.mark.slow
def test_a_cross_cache_holds_latents():
    config, params, x = layer(position=Rotary(dim=W))
    encoded = normal(6, B, 8, D)
    whole = multi_head_attention(params, x, encoded, config=config)
    cache = init_cross_cache(params, encoded, config=config)
    assert cache.key.shape == (B, 1, 8, L + W)
    assert cache.value.size == 0
    output, cache = multi_head_attention(params, x[:, :4], None, config=config, cache=cache)
    more, _ = multi_head_attention(params, x[:, 4:], None, config=config, cache=cache)
    assert_close(jnp.concatenate([output, more], 1), whole, "float32")


@pytest.mark.slow
def test_removed_positions_reach_no_gradient():
    """NaN in padded queries and keys, with latents and without a cache."""
    config, params, x = layer("biased")
    encoded = normal(6, B, 8, D)
    real = jnp.asarray(np.arange(8) < 5)[None].repeat(B, 0)
    asked = jnp.asarray(np.arange(T) < 9)[None].repeat(B, 0)
    broken, lost = (
        jnp.where(real[..., None], encoded, jnp.nan),
        jnp.where(asked[..., None], x, jnp.inf),
    )

    def loss(params, x, encoded, cached):
        call = {"config": config, "query_mask": asked}
        if cached:
            cache = init_cross_cache(params, encoded, config=config, value_mask=real)
            y, _ = multi_head_attention(params, x, None, cache=cache, **call)
        else:
            y = multi_head_attention(params, x, encoded, value_mask=real, **call)
        return (jnp.where(asked[..., None], y, 0) ** 2).sum()

    clean = jax.grad(loss)(params, x, encoded, False)
    for cached in (False, True):
        assert_trees_close(jax.grad(loss)(params, lost, broken, cached), clean, "float32")


# --- the rest of the layer ----------------------------------------------------------------------


@pytest.mark.slow
def test_scores_and_rows():
    config, params, x = layer()
    call = {"config": config, "use_causal_mask": True}
    _, scores = multi_head_attention(params, x, x, **call, return_attention_scores=True)
    some = attention_scores(params, x, x, **call, query_rows=jnp.array([3, 10]))
    assert_close(some, scores[:, :, jnp.array([3, 10])], "float32")
    _, cached, _ = multi_head_attention(
        params, x, x, **call, return_attention_scores=True, cache=init_cache(config, B, T)
    )
    assert_close(cached, scores, "float32")
    found = flax_mha.forward(params, x, x, config=config)
    assert found.key.shape == (B, T, N, H)
    assert found.value.shape == (B, T, N, V)


@pytest.mark.slow
def test_shapes_and_initial_values():
    config, _, x = layer("biased")
    shapes = jax.tree.map(lambda leaf: leaf.shape, param_shapes(config, x.shape))
    assert shapes == {
        "query_latent": {"kernel": (D, Q), "bias": (Q,)},
        "query_latent_norm": {"scale": (Q,), "bias": (Q,)},
        "query": {"kernel": (Q, N, H), "bias": (N, H)},
        "latent": {"kernel": (D, L), "bias": (L,)},
        "latent_norm": {"scale": (L,), "bias": (L,)},
        "shared_key": {"kernel": (D, W), "bias": (W,)},
        "key": {"kernel": (L, N, U)},
        "value": {"kernel": (L, N, V)},
        "attention_output": {"kernel": (N, V, E), "bias": (E,)},
    }
    big = MultiHeadAttentionConfig(8, 32, latent=Latent(64, 8, 48))
    params = init_params(jax.random.key(0), big, (1, 100))
    for name, fans in {
        "query_latent": 100 + 48, "query": 48 + 256, "latent": 100 + 64, "shared_key": 100 + 8,
        "key": 64 + 8 * 24, "value": 64 + 256,
    }.items():  # fmt: skip
        limit = math.sqrt(6 / fans)
        largest = float(jnp.abs(params[name]["kernel"]).max())
        assert 0.9 * limit < largest <= limit, name
    assert "bias" not in params["key"]
    assert "bias" in params["latent"]
    assert (params["latent_norm"]["scale"] == 1).all()
    kernels = [leaves["kernel"].ravel()[:100] for leaves in params.values() if "kernel" in leaves]
    assert all(
        not np.array_equal(a[: len(b)], b[: len(a)]) for a in kernels for b in kernels if a is not b
    )


def test_names_of_axes_and_specs():
    config, _, _ = layer()
    axes = jax.tree.map(tuple, param_axes(config), is_leaf=lambda leaf: not isinstance(leaf, dict))
    assert axes["query_latent"]["kernel"] == ("embed", "q_lora")
    assert axes["query"]["kernel"] == ("q_lora", "heads", "head_dim")
    assert axes["latent"]["kernel"] == ("embed", "kv_lora")
    assert axes["latent_norm"]["scale"] == ("kv_lora",)
    assert axes["key"]["kernel"] == ("kv_lora", "kv_heads", "head_dim")
    assert param_axes(layer("lite")[0])["query"]["kernel"][0] == "embed"
    specs = param_specs(config, {"L": "fsdp", "heads": "model"})
    assert tuple(specs["value"]["kernel"]) == ("fsdp", "model", None)
    assert tuple(specs["latent"]["kernel"]) == (None, "fsdp")


@pytest.mark.slow
def test_modules_hold_the_same_tree():
    config, params, x = layer("biased")
    output = multi_head_attention(params, x, x, config=config)
    module = MultiHeadAttention.from_config(config)
    made = module.init(jax.random.key(0), x, x)["params"]
    chex.assert_trees_all_equal_shapes(made, params)
    assert_close(module.apply({"params": params}, x, x), output, "float32")
    layer_nnx = mha_nnx.MultiHeadAttention.from_params(params, config)
    assert_close(layer_nnx(x, x), output, "float32")
    chex.assert_trees_all_equal(layer_nnx.params, params)
    fields = {name: getattr(config, name) for name in ("latent", "num_heads", "key_dim")}
    fresh = mha_nnx.MultiHeadAttention(**fields, query_features=D, rngs=nnx.Rngs(0))
    assert fresh.latent.kernel.shape == (D, L)
    cache = init_cache(config, B, T)
    step, _ = module.apply({"params": params}, x, x, cache=cache)
    stepped, _ = layer_nnx(x, x, cache=cache)
    assert_close(step, stepped, "float32")


def test_regularizers_see_every_kernel():
    config, params, _ = layer(kernel_regularizer="l2")
    loss = flax_mha.regularization_loss(params, config)
    total = sum(
        (np.asarray(leaves["kernel"]) ** 2).sum()
        for leaves in params.values()
        if "kernel" in leaves
    )
    assert_close(loss, 0.01 * total, "float32")


def test_a_latent_is_a_value():
    for name in LATENTS:
        config, _, _ = layer(name)
        again = MultiHeadAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert (again, hash(again)) == (config, hash(config))


def test_refusals():
    config, params, x = layer()
    for change in ({"qk_norm": "rms"}, {"value_norm": "rms"}, {"clip_qkv": 1.0}):
        with pytest.raises(NotImplementedError, match=f"no `{next(iter(change))}`"):
            config.replace(**change)
    with pytest.raises(ValueError, match=r"num_kv_heads.*must be None"):
        config.replace(num_kv_heads=1)
    with pytest.raises(ValueError, match=r"must be larger.*key_dim=4"):
        config.replace(key_dim=W, position=None)
    for position in ("rotary", Rotary(dim=W + 2), QueryGrowth(0.1, 4, rotary=Rotary())):
        with pytest.raises(ValueError, match=r"shared features alone.*Set `dim=4`"):
            config.replace(position=position)
    with pytest.raises(ValueError, match=r"use_bias.*'key'"):
        config.replace(use_bias=("key",))
    with pytest.raises(ValueError, match=r"keys and values of one array.*Pass `value` alone"):
        multi_head_attention(params, x, x, x + 1, config=config)
    with pytest.raises(ValueError, match=r"keys and values of one array.*Pass `value` alone"):
        init_cross_cache(params, x, x + 1, config=config)
    with pytest.raises(ValueError, match=r"19 features of the key, 17 of the value"):
        param_shapes(config, (1, D), (1, D), (1, 19))
    with pytest.raises(ValueError, match=r"'key'.*'kernel'.*\[L, K, U\]"):
        multi_head_attention(
            {**params, "key": {"kernel": jnp.ones((L, N, U + 1))}}, x, x, config=config
        )
    with pytest.raises(ValueError, match="rank"):
        Latent(0, 4)
    with pytest.raises(TypeError, match=r"Latent.shared_dim"):
        Latent(4, None)
    with pytest.raises(ValueError, match=r"A field of Latent.*rank"):
        MultiHeadAttentionConfig(2, 8, latent={"ranks": 4})
    assert multi_head_attention(params, x, x, x, config=config).shape == (B, T, E)
    assert TOLERANCES["float32"] < 2e-5


@pytest.mark.slow
def test_on_a_mesh_with_explicit_axes():
    """Heads along one axis, examples along another; latents belong to all heads, and stay whole."""
    config, params, x = layer(num_heads=4)
    params = random_params(param_shapes(config, x.shape))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = param_specs(config, {"heads": "model"}, mesh=mesh)
    put = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    cut_params, cut_x = jax.tree.map(put, params, specs), put(x, P("data"))
    call = {"config": config, "use_causal_mask": True}
    whole = multi_head_attention(params, x, x, **call)
    assert_close(multi_head_attention(cut_params, cut_x, cut_x, **call), whole, "float32")
    cache = jax.tree.map(lambda leaf: put(leaf, P("data")), init_cache(config, B, T))
    output, cache = multi_head_attention(cut_params, cut_x, cut_x, **call, cache=cache)
    assert_close(output, whole, "float32")
    assert cache.key.sharding.spec == P("data", None, None, None)
    cross = init_cross_cache(cut_params, cut_x, config=config)
    output, _ = multi_head_attention(cut_params, cut_x, None, config=config, cache=cross)
    assert_close(output, multi_head_attention(params, x, x, config=config), "float32")
