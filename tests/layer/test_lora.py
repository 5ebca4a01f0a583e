"""Low-rank adapters: beside the kernels as in them, in every call that reads a kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_mha
from flax_mha import MultiHeadAttentionConfig, init_params, lora_params, merge_lora
from flax_mha.params.tree import INPUT_RANK
from flax_mha.positions import Rotary

LATENT = dict(
    num_heads=4,
    key_dim=12,
    value_dim=8,
    position=Rotary(dim=4),
    use_bias=False,
    latent=flax_mha.Latent(rank=8, shared_dim=4, query_rank=6),
)
CONFIGS = {
    "plain": dict(num_heads=2, key_dim=8),
    "grouped, gate, no bias": dict(
        num_heads=4, key_dim=8, num_kv_heads=2, value_dim=4, use_gate=True, use_bias=False
    ),
    "several output axes": dict(num_heads=2, key_dim=8, output_shape=(3, 5)),
    "norms and positions": dict(num_heads=2, key_dim=8, qk_norm="rms", position="rotary"),
    "latent": LATENT,
}
B, T, D = 2, 7, 16
X = normal(0, B, T, D)
SCALE = 0.7


def layer_of(name, **more):
    config = MultiHeadAttentionConfig(**CONFIGS[name] | more)
    return config, init_params(jax.random.key(1), config, X.shape)


def adapters(config, seed=2, rank=3, which=None):
    """Of every projection, with a b that is not zero."""
    which = config.projections if which is None else which
    lora = lora_params(jax.random.key(seed), config, X.shape, rank=rank, which=which)
    leaves, tree = jax.tree.flatten(lora)
    return jax.tree.unflatten(tree, [x + 0.3 * normal(i, *x.shape) for i, x in enumerate(leaves)])


def call(params, config, x=X, **how):
    return flax_mha.multi_head_attention(params, x, x, config=config, use_causal_mask=True, **how)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_new_adapters_change_nothing(name, dtype):
    config, params = layer_of(name, dtype=dtype)
    lora = lora_params(jax.random.key(2), config, X.shape, rank=2, which=config.projections)
    assert all(np.asarray(leaves["a"]).any() for leaves in lora.values())
    adapted = call(params, config, lora=lora, lora_scale=SCALE)
    base = call(params, config)
    assert adapted.dtype == base.dtype
    np.testing.assert_array_equal(adapted, base)


@pytest.mark.parametrize("name", CONFIGS)
def test_beside_a_kernel_as_in_it(name):
    """Outputs and gradients are those of kernels that were merged by NumPy."""
    config, params = layer_of(name)
    lora = adapters(config)

    def merged(lora):
        kernels = {
            n: params[n]["kernel"] + SCALE * jnp.tensordot(x["a"], x["b"], 1)
            for n, x in lora.items()
        }
        return params | {n: params[n] | {"kernel": x} for n, x in kernels.items()}

    def loss(lora, is_merged):
        if is_merged:
            output = call(merged(lora), config)
        else:
            output = call(params, config, lora=lora, lora_scale=SCALE)
        return (output**2).sum(), output

    (_, wanted), d_wanted = jax.value_and_grad(loss, has_aux=True)(lora, True)
    (_, output), d_lora = jax.value_and_grad(loss, has_aux=True)(lora, False)
    assert float(abs(wanted - call(params, config)).max()) > 0.1
    assert_close(output, wanted, "float32")
    assert_trees_close(d_lora, d_wanted, "float32", name)
    assert_trees_close(merge_lora(params, lora, SCALE), merged(lora), "float32", name)


@pytest.mark.slow
def test_one_projection_at_a_time():
    """Each is another function, and none reads another one's adapter."""
    config, params = layer_of("grouped, gate, no bias")
    lora = adapters(config)
    for name in lora:
        one = {name: lora[name]}
        assert_close(
            call(params, config, lora=one), call(merge_lora(params, one), config), "float32", name
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped, gate, no bias", "latent"])
def test_decoding(name):
    """Prompt and steps through a cache are the whole call."""
    config, params = layer_of(name)
    how = {"lora": adapters(config), "lora_scale": SCALE}
    whole = call(params, config, **how)
    cache = flax_mha.init_cache(config, B, T)
    outputs = []
    for part in (X[:, :4], X[:, 4:5], X[:, 5:]):
        output, cache = flax_mha.multi_head_attention(
            params, part, part, config=config, cache=cache, **how
        )
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), whole, "float32")


@pytest.mark.slow
def test_an_encoder_s_output_and_scores_of_rows():
    config, params = layer_of("plain")
    how = {"lora": adapters(config), "lora_scale": SCALE}
    source = normal(5, B, 9, D)
    wanted, scores = flax_mha.multi_head_attention(
        params, X, source, config=config, return_attention_scores=True, **how
    )
    cache = flax_mha.init_cross_cache(params, source, config=config, **how)
    output, _ = flax_mha.multi_head_attention(params, X, None, config=config, cache=cache, **how)
    assert_close(output, wanted, "float32")
    rows = jnp.array([5, 2])
    chosen = flax_mha.attention_scores(params, X, source, config=config, query_rows=rows, **how)
    assert_close(chosen, scores[:, :, rows], "float32")


def test_many_adapters_of_one_base():
    """A user each: vmap over adapters, inputs and scales is one call each."""
    config, params = layer_of("plain")
    users = [adapters(config, seed) for seed in (3, 4, 5)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *users)
    inputs, scales = normal(6, 3, B, T, D), jnp.array([0.5, 1.0, 2.0])

    def one(lora, x, scale):
        return call(params, config, x, lora=lora, lora_scale=scale)

    together = jax.jit(jax.vmap(one))(stacked, inputs, scales)
    for i, lora in enumerate(users):
        assert_close(together[i], one(lora, inputs[i], float(scales[i])), "float32", f"user {i}")


@pytest.mark.slow
def test_dropout_of_what_an_adapter_reads():
    """By hand, of one projection: y += (keep x / (1 - rate)) a b scale."""
    config, params = layer_of("plain")
    lora, key, rate = adapters(config, which=["query"]), jax.random.key(8), 0.4
    how = dict(lora=lora, lora_scale=SCALE, lora_dropout=rate)
    forward = functools.partial(flax_mha.forward, params, X, X, config=config)
    base, dropped = forward().query, forward(**how, lora_dropout_key=key).query
    own = jax.random.fold_in(key, 0)  # query is the first of the tree
    kept = np.asarray(jax.random.bernoulli(own, 1 - rate, X.shape))
    assert 0.5 < kept.mean() < 0.7
    product = np.einsum("dr,rnh->dnh", lora["query"]["a"], lora["query"]["b"])
    wanted = base + SCALE * np.einsum("btd,dnh->btnh", np.where(kept, X / (1 - rate), 0), product)
    assert_close(dropped, wanted, "float32")
    np.testing.assert_array_equal(forward(**how).query, forward(lora=lora, lora_scale=SCALE).query)
    idle = forward(lora=lora, lora_scale=SCALE, lora_dropout_key=key).query
    np.testing.assert_array_equal(idle, forward(lora=lora, lora_scale=SCALE).query)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Explicit", "Auto", "context"])
def test_on_a_mesh_the_adapters_are_whole(kind):
    """Numbers, gradients and dropout of one device."""
    config, params = layer_of("plain")
    lora, x = adapters(config), normal(7, 4, 8, D)

    def loss(lora, params, x, config=config):
        how = dict(lora_scale=SCALE, lora_dropout=0.3, lora_dropout_key=jax.random.key(5))
        return (call(params, config, x, lora=lora, **how) ** 2).mean()

    wanted = jax.value_and_grad(loss)(lora, params, x)
    axis_type = AxisType.Auto if kind == "Auto" else AxisType.Explicit
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(axis_type,) * 2)
    cut = P("data", "context") if kind == "context" else P("data")
    placed = [jax.device_put(y, NamedSharding(mesh, P())) for y in (lora, params)]
    on_mesh = config.replace(context_axis="context" if kind == "context" else None)
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(functools.partial(loss, config=on_mesh)))
        found = run(*placed, jax.device_put(x, NamedSharding(mesh, cut)))
    assert_trees_close(found[1], wanted[1], "float32", kind)
    assert_close(found[0], wanted[0], "float32")


@pytest.mark.slow
def test_nan_of_padding_goes_nowhere():
    config, params = layer_of("plain")
    lora, real = adapters(config), jnp.arange(T)[None] < jnp.array([[T], [4]])
    dirty = jnp.where(real[..., None], X, jnp.nan)

    def loss(lora, x):
        output = call(params, config, x, lora=lora, value_mask=real, query_mask=real)
        return (jnp.where(real[..., None], output, 0) ** 2).sum()

    assert_trees_close(jax.grad(loss)(lora, dirty), jax.grad(loss)(lora, X), "float32", "d_lora")


@pytest.mark.slow
def test_bfloat16_parameters_and_float32_adapters():
    """The call's dtype is that without them, and its numbers those of the merged kernels."""
    config, params = layer_of("plain")
    half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    lora, x = adapters(config), X.astype("bfloat16")
    output = call(half, config, x, lora=lora, lora_scale=SCALE)
    assert output.dtype == jnp.bfloat16
    assert_close(output, call(merge_lora(half, lora, SCALE), config, x), "bfloat16")
    assert merge_lora(half, lora)["query"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["plain", "several output axes", "latent"])
def test_split_is_merge_s_way_back(name):
    config, params = layer_of(name)
    lora = adapters(config, which=["query", "attention_output"])
    merged = merge_lora(params, lora, SCALE)
    again = flax_mha.split_lora(merged, params, rank=3)
    assert sorted(again) == sorted(lora)
    assert_trees_close(merge_lora(params, again), merged, "float32", name)
    fewer = flax_mha.split_lora(merged, params, rank=1)
    for key, leaves in fewer.items():
        change = np.asarray(merged[key]["kernel"] - params[key]["kernel"])
        matrix = change.reshape(np.prod(change.shape[: INPUT_RANK[key]]), -1)
        left = matrix - np.asarray(leaves["a"]).reshape(-1, 1) @ np.asarray(leaves["b"]).reshape(
            1, -1
        )
        values = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(np.linalg.norm(left), np.linalg.norm(values[1:]), rtol=1e-4)


PLAIN, PARAMS = layer_of("plain")
LORA = adapters(PLAIN)
MADE = functools.partial(lora_params, jax.random.key(0), PLAIN, X.shape)
BAD = {
    "rank 0": (lambda: MADE(rank=0), r"rank of an adapter of 'query' must be in \[1, 16\].*rank 0"),
    "rank above the sizes": (lambda: MADE(rank=17), r"a kernel \(16, 2, 8\) has no more.*rank 17"),
    "a float rank": (lambda: MADE(rank=2.0), "`rank` must be an int"),
    "no such projection": (lambda: MADE(which=["gate"]), r"this layer's projections.*\['gate'\]"),
    "a name for names": (lambda: MADE(which="query"), r"names of projections.*\('query',\)"),
    "none": (lambda: MADE(which=[]), "`which` must be names of projections"),
    "another model's": (
        lambda: call(PARAMS, PLAIN, lora=lora_params(jax.random.key(0), PLAIN, (8, 24))),
        r"lora\['query'\].* a \[D, r\] and b \[r, N, H\] of a kernel \(16, 2, 8\).*\(24, 8\)",
    ),
    "stacked": (
        lambda: call(PARAMS, PLAIN, lora=jax.tree.map(lambda x: x[None], LORA)),
        "Is it of another model, or stacked",
    ),
    "a gate's": (lambda: call(PARAMS, PLAIN, lora={"gate": LORA["query"]}), r"\['gate'\]"),
    "an array": (lambda: call(PARAMS, PLAIN, lora=X), "`lora` must be {projection"),
    "half of one": (
        lambda: call(PARAMS, PLAIN, lora={"query": {"a": LORA["query"]["a"]}}),
        r"`lora\['query'\]` must hold a and b. Received: \['a'\]",
    ),
    "integers": (
        lambda: call(PARAMS, PLAIN, lora=jax.tree.map(lambda x: x.astype("int32"), LORA)),
        r"lora\['attention_output'\]\['a'\] must be floating",
    ),
    "a scale that is not finite": (
        lambda: call(PARAMS, PLAIN, lora=LORA, lora_scale=float("nan")),
        "`lora_scale` must be a finite number. Received: nan",
    ),
    "an infinite scale, merged": (
        lambda: merge_lora(PARAMS, LORA, float("inf")),
        "`lora_scale` must be a finite number. Received: inf",
    ),
    "a traced scale alone": (
        lambda: jax.jit(lambda scale: call(PARAMS, PLAIN, lora_scale=scale))(1.0),
        "nothing to scale or to drop. Received: lora_scale",
    ),
    "scales": (
        lambda: call(PARAMS, PLAIN, lora=LORA, lora_scale=jnp.ones(2)),
        "`lora_scale` must be one number.*jax.vmap",
    ),
    "a scale alone": (lambda: call(PARAMS, PLAIN, lora_scale=2.0), "nothing to scale or to drop"),
    "dropout alone": (lambda: call(PARAMS, PLAIN, lora_dropout=0.1), "lora_dropout"),
    "a rate of 2": (lambda: call(PARAMS, PLAIN, lora=LORA, lora_dropout=2.0), "`lora_dropout`"),
    "a key that is none": (
        lambda: call(PARAMS, PLAIN, lora=LORA, lora_dropout=0.1, lora_dropout_key=3),
        "`lora_dropout_key`",
    ),
    "nothing has changed": (lambda: flax_mha.split_lora(PARAMS, PARAMS), "all kernels are equal"),
    "trees of two layers": (
        lambda: flax_mha.split_lora(PARAMS, layer_of("latent")[1]),
        "must be trees of one layer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    attempt, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        attempt()


@pytest.mark.slow
def test_a_latent_cache_refuses_dropout():
    config, params = layer_of("latent")
    how = dict(lora=adapters(config), lora_dropout=0.1, lora_dropout_key=jax.random.key(0))
    cache = flax_mha.init_cache(config, B, T)
    with pytest.raises(NotImplementedError, match=r"a cache of latents.*Train without a cache"):
        flax_mha.multi_head_attention(params, X, X, config=config, cache=cache, **how)
