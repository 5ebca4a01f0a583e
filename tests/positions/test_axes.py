"""Rotary embedding by positions of several axes, against loops and the transformers library."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, random_params, x64

import flax_mha
from flax_mha import (
    MultiHeadAttentionConfig,
    attention_scores,
    init_cache,
    init_cross_cache,
    multi_head_attention,
    param_shapes,
)
from flax_mha.positions import AxialRotary, LinearScaling, Rotary

B, T, S, N, H, D = 2, 7, 5, 3, 16, 17
LAYOUTS = {
    "whole": AxialRotary(sections=(2, 3, 3), base=1e6),
    "whole-interleaved": AxialRotary(sections=(2, 3, 3), interleaved=True),
    "whole-partial": AxialRotary(sections=(1, 2), dim=6, base=100.0),
    "in_turns": AxialRotary(sections=(3, 3, 2), layout="in_turns", base=5e6),
    "in_turns-rest": AxialRotary(sections=(5, 2, 1), layout="in_turns"),
    "restarted": AxialRotary(sections=(4, 4), layout="restarted", base=100.0, unit=2 * math.pi),
    "restarted-uneven": AxialRotary(sections=(2, 6), layout="restarted", interleaved=True),
    "dealt": AxialRotary(sections=(4, 4), layout="dealt"),
    "dealt-scaled": AxialRotary(sections=(3, 3, 2), layout="dealt", scaling=LinearScaling(3.0)),
    "one-axis": AxialRotary(sections=(8,)),
}


def pairs_of(rotary):
    """(axis, frequency) of each pair, spelled out layout by layout."""
    sections, total, base = rotary.sections, sum(rotary.sections), rotary.base
    one_by_one = [axis for axis, n in enumerate(sections) for _ in range(n)]
    falls = [base ** (-i / total) for i in range(total)]
    if rotary.layout == "whole":
        return list(zip(one_by_one, falls))
    if rotary.layout == "in_turns":
        left, axes = list(sections), []
        for i in range(total):
            axis = i % len(sections)
            axis = axis if left[axis] else 0
            left[axis] -= 1
            axes.append(axis)
        return list(zip(axes, falls))
    if rotary.layout == "restarted":
        return [(axis, base ** (-i / n)) for axis, n in enumerate(sections) for i in range(n)]
    return [(a, w) for a in range(len(sections)) for w in falls[a :: len(sections)]]


def turned(x, positions_ABT, rotary):
    """One pair of features at a time, in float64."""
    x = np.asarray(x, np.float64)
    result, pairs = x.copy(), pairs_of(rotary)
    slow = 3.0 if rotary.scaling else 1.0
    for b, t, n in np.ndindex(x.shape[:3]):
        for i, (axis, frequency) in enumerate(pairs):
            one, two = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + len(pairs))
            angle = rotary.unit * float(positions_ABT[axis, b, t]) * frequency / slow
            c, s = math.cos(angle), math.sin(angle)
            result[b, t, n, one] = x[b, t, n, one] * c - x[b, t, n, two] * s
            result[b, t, n, two] = x[b, t, n, two] * c + x[b, t, n, one] * s
    return result


def positions_of(rotary, seed=0, length=T, floats=False):
    rng = np.random.default_rng(seed)
    if floats:
        return rng.uniform(-1, 1, size=(rotary.axes, B, length)).astype(np.float32)
    return rng.integers(-50, 1000, size=(rotary.axes, B, length)).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("floats", [False, True], ids=["integers", "floats"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_pair_turns_by_its_axis(name, floats):
    rotary, x = LAYOUTS[name], normal(0, B, T, N, H)
    positions = positions_of(rotary, floats=floats)
    assert_close(rotary(x, positions), turned(x, positions, rotary), "float32")
    half = rotary(x.astype("bfloat16"), positions)
    assert half.dtype == jnp.bfloat16
    assert_close(half, turned(x, positions, rotary), "bfloat16")


@pytest.mark.slow
def test_with_x64_floats_have_all_their_bits():
    with x64():
        rotary = LAYOUTS["restarted"]
        x, at = normal(0, B, T, N, H, dtype="float64"), positions_of(rotary, floats=True)
        at = at.astype(np.float64) / 3
        assert_close(rotary(x, at), turned(x, at, rotary), "float64")
        far = positions_of(rotary) + 10**6
        np.testing.assert_allclose(rotary(x, far), turned(x, far, rotary), atol=1e-8)


@pytest.mark.slow
def test_one_axis_is_rotary_and_the_same_positions_on_all_axes_are_text():
    x, at = normal(0, B, T, N, H), np.arange(T, dtype=np.int32)[None] + 10**6
    plain = Rotary(base=1e6)(x, at)
    for name in ("whole", "in_turns"):
        rotary = LAYOUTS[name]
        same = np.broadcast_to(at, (3, 1, T))
        text = Rotary(base=rotary.base)(x, at)
        assert_close(rotary(x, same), text, "float32")
        assert_close(rotary(x, at), text, "float32")
    assert_close(AxialRotary(sections=(8,), base=1e6)(x, at[None]), plain, "float32")


def test_pairs_of_qwen_s_sections():
    """mrope_section as in their configs: T H W T H W ..., and T for what is left."""
    axes = AxialRotary(sections=(24, 20, 20), layout="in_turns").pair_axes
    assert axes[:60].tolist() == [0, 1, 2] * 20
    assert axes[60:].tolist() == [0, 0, 0, 0]
    small = AxialRotary(sections=(11, 11, 10), layout="in_turns")
    assert small.pair_axes[-3:].tolist() == [2, 0, 1]
    counts = np.bincount(AxialRotary(sections=(16, 24, 24)).pair_axes)
    assert counts.tolist() == [16, 24, 24]


# --- in the layer -------------------------------------------------------------------------------


def layer(name, **fields):
    config = MultiHeadAttentionConfig(N, H, position=LAYOUTS[name], **fields)
    return config, random_params(param_shapes(config, (T, D)))


def expected_scores(params, x, source, at, source_at, rotary):
    heads = {
        name: np.einsum("btd,dnh->btnh", np.asarray(y, np.float64), params[name]["kernel"])
        + np.asarray(params[name]["bias"])
        for name, y in (("query", x), ("key", source))
    }
    query, key = turned(heads["query"], at, rotary), turned(heads["key"], source_at, rotary)
    powers = np.exp(np.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(H))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("name", ["whole", "in_turns", "restarted", "dealt"])
def test_a_layer_with_positions_of_several_axes(name, implementation):
    config, params = layer(name)
    rotary, (x, source) = config.position, (normal(1, B, T, D), normal(2, B, S, D))
    at, source_at = positions_of(rotary, 1), positions_of(rotary, 2, S, floats=True)
    expected = expected_scores(params, x, source, at, source_at, rotary)
    call = dict(config=config, positions=(jnp.asarray(at), jnp.asarray(source_at)))
    _, scores = multi_head_attention(params, x, source, return_attention_scores=True, **call)
    assert_close(scores, expected, "float32")
    rows = jnp.array([6, 0, 3])
    chosen = attention_scores(params, x, source, query_rows=rows, **call)
    assert_close(chosen, expected[:, :, np.asarray(rows)], "float32")
    named = dict(call, config=config.replace(implementation=implementation))
    output = multi_head_attention(params, x, source, **named)
    last, first = (jax.tree.map(np.asarray, params[x]) for x in ("attention_output", "value"))
    value = np.einsum("bsd,dnh->bsnh", source, first["kernel"]) + first["bias"]
    context = np.einsum("bnts,bsnh->btnh", expected, value)
    expected = np.einsum("btnh,nhe->bte", context, last["kernel"]) + last["bias"]
    assert_close(output, expected, "float32")
    gradient = jax.grad(lambda x: (multi_head_attention(params, x, source, **named) ** 2).sum())
    assert np.isfinite(gradient(x)).all()


@pytest.mark.slow
def test_none_counts_alike_on_all_axes():
    config, params = layer("whole")
    x = normal(1, B, T, D)
    text = multi_head_attention(
        params, x, x, config=config.replace(position=Rotary(base=1e6)), use_causal_mask=True
    )
    call = dict(config=config, use_causal_mask=True)
    assert_close(multi_head_attention(params, x, x, **call), text, "float32")
    counted = jnp.arange(T, dtype="int32")
    for positions in (counted, counted[None], jnp.broadcast_to(counted, (3, 1, T))):
        again = multi_head_attention(params, x, x, positions=positions, **call)
        assert_close(again, text, "float32")
    ids = jnp.array([[1, 1, 1, 2, 2, 2, 2]])
    packed = multi_head_attention(params, x, x, segment_ids=ids, **call)
    assert_close(packed[:, :3], text[:, :3], "float32")
    alone = multi_head_attention(params, x[:, 3:], x[:, 3:], **call)
    assert_close(packed[:, 3:], alone, "float32")


def test_under_vmap_and_over_pictures():
    config, params = layer("restarted")
    x, at = normal(1, B, T, D), positions_of(config.position, floats=True)
    call = lambda x, at: multi_head_attention(params, x, x, config=config, positions=at)
    batched = call(x, jnp.asarray(at))
    assert_close(jax.vmap(call, (0, 1))(x, jnp.asarray(at)), batched, "float32")
    # Rows and columns are attended together: the positions have both axes, too.
    picture = normal(2, B, 2, 3, D)
    rows, columns = np.mgrid[:2, :3]
    grid = jnp.asarray(np.stack([rows, columns])[:, None], "int32")
    flat = call(picture.reshape(B, 6, D), grid.reshape(2, 1, 6))
    assert_close(call(picture, grid).reshape(B, 6, D), flat, "float32")


@pytest.mark.slow
def test_decoding_with_positions_is_one_causal_pass():
    """A picture in the middle, after which text counts on from its largest position."""
    config, params = layer("whole")
    x = normal(1, B, T, D)
    at = np.array([[0, 1, 2, 2, 2, 4, 5], [0, 1, 2, 2, 3, 4, 5], [0, 1, 2, 3, 2, 4, 5]])
    at = jnp.asarray(np.broadcast_to(at[:, None], (3, B, T)), "int32")
    whole = multi_head_attention(params, x, x, config=config, positions=at, use_causal_mask=True)
    cache, outputs = init_cache(config, B, 9), []
    for part in (slice(0, 5), slice(5, 6), slice(6, 7)):
        step = x[:, part]
        output, cache = multi_head_attention(
            params, step, step, config=config, positions=at[..., part], cache=cache
        )
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), whole, "float32")
    cache, outputs = init_cache(config, B, 9), []
    for t in range(T):
        step = x[:, t : t + 1]
        output, cache = multi_head_attention(params, step, step, config=config, cache=cache)
        outputs.append(output)
    text = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
    assert_close(jnp.concatenate(outputs, 1), text, "float32")


def test_queries_beside_an_encoder():
    config, params = layer("in_turns")
    source, x = normal(2, B, S, D), normal(1, B, T, D)
    cache = init_cross_cache(params, source, config=config)
    at = jnp.asarray(positions_of(config.position))
    beside, _ = multi_head_attention(params, x, None, config=config, cache=cache, positions=at)
    keys = jnp.arange(S, dtype="int32")[None]
    together = multi_head_attention(params, x, source, config=config, positions=(at, keys))
    assert_close(beside, together, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_along_a_context_axis(layout):
    """The whole sequence in the layout's order, with its positions and without."""
    axis = flax_mha.ContextAxis("context", layout=layout)
    config, params = layer("whole", context_axis=axis)
    here = config.replace(context_axis=None)
    x = normal(1, B, 8, D)
    at = jnp.asarray(positions_of(config.position, length=8))
    order = np.asarray(flax_mha.zigzag_order(8, 2)) if layout == "zigzag" else np.arange(8)
    with jax.set_mesh(jax.make_mesh((2,), ("context",))):
        run = jax.jit(lambda x, at: multi_head_attention(params, x, x, config=config, positions=at))
        cut = run(x[:, order], at[..., order]), run(x[:, order], None)
    for positions, output in zip((at, None), cut):
        plain = multi_head_attention(params, x, x, config=here, positions=positions)
        assert_close(output, plain[:, order], "float32")


def test_each_device_of_a_ring_has_its_own_positions():
    """In a `shard_map` over the axis a call has a device's tokens, and their positions."""
    config, params = layer("restarted", context_axis="context")
    x, at = normal(1, B, 8, D), jnp.asarray(positions_of(config.position, length=8, floats=True))
    kinds = (jax.sharding.AxisType.Auto,)
    mesh, P = jax.make_mesh((2,), ("context",), axis_types=kinds), jax.sharding.PartitionSpec
    cut = (P(), P(None, "context"), P(None, None, "context"))
    ring = jax.shard_map(
        lambda params, x, at: multi_head_attention(params, x, x, config=config, positions=at),
        mesh=mesh, in_specs=cut, out_specs=P(None, "context"),
    )  # fmt: skip
    here = config.replace(context_axis=None)
    expected = multi_head_attention(params, x, x, config=here, positions=at)
    assert_close(jax.jit(ring)(params, x, at), expected, "float32")


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh_over_the_batch(kind):
    config, params = layer("in_turns")
    x, at = normal(1, B, T, D), jnp.asarray(positions_of(config.position))
    expected = multi_head_attention(params, x, x, config=config, positions=at)
    kinds = (getattr(jax.sharding.AxisType, kind),)
    mesh, P = jax.make_mesh((2,), ("data",), axis_types=kinds), jax.sharding.PartitionSpec
    with jax.set_mesh(mesh):
        place = lambda x, *axes: jax.device_put(x, jax.sharding.NamedSharding(mesh, P(*axes)))
        x, at = place(x, "data"), place(at, None, "data")
        params = jax.tree.map(place, params)
        run = jax.jit(
            lambda params, x, at: multi_head_attention(params, x, x, config=config, positions=at)
        )
        assert_close(run(params, x, at), expected, "float32")


@pytest.mark.slow
def test_nan_for_a_position_in_padding_goes_nowhere():
    config, params = layer("restarted")
    x, at = normal(1, B, T, D), positions_of(config.position, floats=True)
    real = jnp.ones((B, T), bool).at[:, 5:].set(False)
    broken = jnp.asarray(at).at[1, :, 5:].set(jnp.nan)

    def loss(params, x, at):
        output = multi_head_attention(
            params, x, x, config=config, positions=at, query_mask=real, value_mask=real
        )
        return (jnp.where(real[..., None], output, 0) ** 2).sum()

    value, gradients = jax.value_and_grad(loss, (0, 1))(params, x, broken)
    assert_close(value, loss(params, x, jnp.asarray(at)), "float32")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    shown = multi_head_attention(params, x, x, config=config, positions=broken)
    assert np.isnan(shown).all()  # where it is not padding, it is not hidden


@pytest.mark.slow
def test_float_positions_can_be_learned():
    config, params = layer("restarted")
    x, at = normal(1, B, T, D), jnp.asarray(positions_of(config.position, floats=True))
    loss = lambda at: (multi_head_attention(params, x, x, config=config, positions=at) ** 2).sum()
    direction = normal(3, *at.shape)
    slope = float((jax.grad(loss)(at) * direction).sum())
    step = 1e-3
    numeric = float(loss(at + step * direction) - loss(at - step * direction)) / (2 * step)
    assert slope == pytest.approx(numeric, rel=2e-2)


def test_in_both_modules():
    from flax_mha.nnx import MultiHeadAttention

    config, params = layer("in_turns")
    x, at = normal(1, B, T, D), jnp.asarray(positions_of(config.position))
    expected = multi_head_attention(params, x, x, config=config, positions=at)
    fields = dict(num_heads=N, key_dim=H, position=config.position)
    module = flax_mha.MultiHeadAttention(**fields)
    assert_close(module.apply({"params": params}, x, x, positions=at), expected, "float32")
    layered = MultiHeadAttention.from_params(params, config)
    assert_close(layered(x, x, positions=at), expected, "float32")


# --- the transformers library -------------------------------------------------------------------


def torch_and(module):
    reason = "needs transformers and torch"
    library = pytest.importorskip(f"transformers.models.{module}", reason=reason)
    return pytest.importorskip("torch", reason=reason), library


def rotated_by(library, torch, embedding, x, at):
    """`[B, T, N, H]` turned by a text model of the library."""
    query = torch.tensor(np.asarray(x)).transpose(1, 2)
    cos, sin = embedding(query, torch.tensor(at).long())
    return library.apply_rotary_pos_emb(query, query, cos, sin)[0].transpose(1, 2).numpy()


@pytest.mark.models
@pytest.mark.parametrize(
    ("module", "prefix", "kind", "layout", "sections"),
    [
        ("qwen2_vl", "Qwen2VL", "Qwen2VLRotaryEmbedding", "whole", (16, 24, 24)),
        ("qwen2_vl", "Qwen2VL", "Qwen2VLRotaryEmbedding", "whole", (8, 28, 28)),
        ("qwen3_vl", "Qwen3VL", "Qwen3VLTextRotaryEmbedding", "in_turns", (24, 20, 20)),
        ("qwen3_vl", "Qwen3VL", "Qwen3VLTextRotaryEmbedding", "in_turns", (22, 21, 21)),
    ],
)
def test_m_rope_is_that_of_the_transformers_library(module, prefix, kind, layout, sections):
    torch, library = torch_and(f"{module}.modeling_{module}")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    config = types.SimpleNamespace(
        max_position_embeddings=100, head_dim=128, rope_parameters=rope, hidden_size=256,
        num_attention_heads=2,
    )  # fmt: skip
    ours = AxialRotary(sections=sections, layout=layout, base=1e6)
    x, at = normal(0, B, T, 2, 128), np.abs(positions_of(ours)) % 90
    expected = rotated_by(library, torch, getattr(library, kind)(config), x, at)
    np.testing.assert_allclose(ours(x, at), expected, atol=3e-5)


@pytest.mark.models
def test_the_vision_tower_of_qwen2_vl():
    torch, library = torch_and("qwen2_vl.modeling_qwen2_vl")
    rope = {"rope_type": "axial", "rope_theta": 1e4}
    config = types.SimpleNamespace(
        rope_parameters=rope, embed_dim=64, num_attention_heads=4, head_dim=None
    )
    ours = AxialRotary(sections=(4, 4), layout="restarted")
    x, at = normal(0, 1, T, 4, 16), np.abs(positions_of(ours))[:, 0] % 30
    embedding = library.Qwen2VLVisionRotaryEmbedding(config)
    query = torch.tensor(np.asarray(x))[0]
    cos, sin = embedding(query, torch.tensor(at).T.long())
    expected = library.apply_rotary_pos_emb_vision(query, query, cos, sin)[0]
    np.testing.assert_allclose(ours(x, at[:, None])[0], expected.numpy(), atol=3e-5)


@pytest.mark.models
def test_pixtral_s_rows_and_columns():
    torch, library = torch_and("pixtral.modeling_pixtral")
    rope = {"rope_type": "axial", "rope_theta": 1e4}
    config = types.SimpleNamespace(
        rope_parameters=rope, hidden_size=64, num_attention_heads=4, head_dim=16
    )
    ours = AxialRotary(sections=(4, 4), layout="dealt")
    x, at = normal(0, 1, T, 4, 16), np.abs(positions_of(ours))[:, 0] % 30
    query = torch.tensor(np.asarray(x)).transpose(1, 2)
    cos, sin = library.PixtralVisionRotaryEmbedding(config)(query, torch.tensor(at).T.long())
    expected = library.apply_rotary_pos_emb(query, query, cos, sin, unsqueeze_dim=0)[0]
    np.testing.assert_allclose(ours(x, at[:, None]), expected.transpose(1, 2).numpy(), atol=3e-5)


@pytest.mark.models
def test_dinov3_s_coordinates_and_its_prefix():
    """Class and register tokens stand at 0, which turns nothing."""
    torch, library = torch_and("dinov3_vit.modeling_dinov3_vit")
    config = types.SimpleNamespace(
        rope_theta=100.0, hidden_size=64, num_attention_heads=4, image_size=32, patch_size=8
    )
    embedding = library.DINOv3ViTRopePositionEmbedding(config).eval()
    cos, sin = embedding(torch.zeros(1, 3, 24, 32))
    coordinates = library.get_patches_center_coordinates(3, 4, torch.float32, torch.device("cpu"))
    prefix = 3
    x = normal(0, 1, prefix + 12, 4, 16)
    query = torch.tensor(np.asarray(x)).transpose(1, 2)
    expected = library.apply_rotary_pos_emb(query, query, cos, sin)[0].transpose(1, 2).numpy()
    at = np.concatenate([np.zeros((prefix, 2), np.float32), coordinates.numpy()]).T[:, None]
    ours = AxialRotary(sections=(4, 4), layout="restarted", base=100.0, unit=2 * math.pi)
    np.testing.assert_allclose(ours(x, at), expected, atol=3e-5)


# --- configs and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_axial_configs_go_to_json_and_back(name):
    config = MultiHeadAttentionConfig(N, H, position=LAYOUTS[name])
    back = MultiHeadAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)
    assert isinstance(back.position.sections, tuple)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sections": ()}, ValueError, "number of pairs of each axis"),
        ({"sections": 4}, TypeError, "number of pairs of each axis"),
        ({"sections": (2, 0)}, ValueError, "must be a positive integer"),
        ({"sections": (2, 2), "layout": "rows"}, ValueError, r"one of \['whole', 'in_turns'"),
        ({"sections": (2, 4, 2), "layout": "in_turns"}, ValueError, r"\(3, 3, 2\) come out"),
        ({"sections": (2, 4), "layout": "dealt"}, ValueError, r"\(3, 3\) come out"),
        ({"sections": (2, 2), "unit": 0}, ValueError, "finite number > 0"),
    ],
)
def test_bad_sections(fields, error, message):
    with pytest.raises(error, match=message):
        AxialRotary(**fields)


@pytest.mark.parametrize(
    ("position", "positions", "error", "message"),
    [
        ("rotary", np.zeros((B, T), np.float32), TypeError, "an array of integers.*AxialRotary"),
        ("rotary", np.zeros((B, T), bool), TypeError, "an array of integers.*dtype bool"),
        ("rotary", np.zeros((3, B, T), int), ValueError, "1 axes in the config.*AxialRotary"),
        ("whole", np.zeros((2, B, T), int), ValueError, r"shape \(2, 2, 7\).*3 axes"),
        ("whole", np.zeros((3, T), int), ValueError, r"Axes stand before a batch"),
        ("whole", np.zeros((3, B, T + 1), int), ValueError, r"\[\*batch, T\]"),
        ("whole", np.zeros((3, 1, B, T), int), ValueError, r"\[axes, \*batch, T\]"),
        ("whole", np.zeros((3, B, T), complex), TypeError, "integers or floats"),
        ("whole", list(np.zeros((3, B, T), int)), TypeError, "axes are one array.*jnp.stack"),
    ],
)
def test_bad_positions(position, positions, error, message):
    config = MultiHeadAttentionConfig(N, H, position=LAYOUTS.get(position, position))
    x = normal(1, B, T, D)
    params = random_params(param_shapes(config, x.shape))
    with pytest.raises(error, match=message):
        multi_head_attention(params, x, x, config=config, positions=positions)


def test_rows_and_columns_are_no_pair_of_queries_and_keys():
    """With two axes nobody can tell: taken as a pair, columns would be the keys' positions."""
    config, params = layer("restarted")
    x, (rows, columns) = normal(1, B, T, D), jnp.asarray(positions_of(config.position))
    call = lambda positions, v=x: multi_head_attention(
        params, x, v, config=config, positions=positions
    )
    with pytest.raises(ValueError, match=r"\(queries, keys\).*two axes.*jnp\.stack"):
        call((rows, columns))
    both = jnp.stack([rows, columns])
    assert_close(call((both, both)), call(both), "float32")
    assert call((rows, rows[:, :S]), x[:, :S]).shape == x.shape  # T != S: a pair it is


def test_sections_that_are_not_the_head_s():
    x, at = normal(0, B, T, N, H), np.zeros((2, 1, T), int)
    with pytest.raises(ValueError, match=r"half of the features.*Set `dim=8`"):
        AxialRotary(sections=(2, 2))(x, at)
    with pytest.raises(ValueError, match="half of the features"):
        AxialRotary(sections=(8, 8))(x, at)
    with pytest.raises(ValueError, match=r"\[axes, B, T\] with 2 axes"):
        AxialRotary(sections=(4, 4))(x, np.zeros((3, 1, T), int))
