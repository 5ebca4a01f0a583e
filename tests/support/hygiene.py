"""Layers, calls and decoders whose data change while their programs must not; what JAX compiled."""

import collections
import contextlib
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from helpers import booleans, normal, random_params

import flax_mha.nnx
from flax_mha import (
    Latent,
    Mask,
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    lora_params,
    multi_head_attention,
    param_shapes,
    quantize_params,
)
from flax_mha.positions import RelativeBias, Rotary

B, N, D = 2, 4, 8
LENGTH = {"reference": 16, "blockwise": 130}
COMPILED = collections.Counter()


def note_event(event, _, fun_name="", **details):
    """Programs, and traces of the layer: linen itself traces initializers, to compare shapes."""
    if event.endswith("backend_compile_duration") or "layer" in fun_name:
        COMPILED[event.rsplit("/", 1)[-1], fun_name] += 1


jax.monitoring.register_event_duration_secs_listener(note_event)


@contextlib.contextmanager
def nothing_compiled():
    """What runs in here traces, lowers and compiles nothing."""
    before = COMPILED.copy()
    yield
    assert dict(COMPILED - before) == {}


class Traced:
    """A function under a kind of jit; `count` is how often Python has run it."""

    def __init__(self, function, jit=jax.jit, **options):
        self.count, self.function = 0, function
        self.run = jit(self._counted, **options)

    def _counted(self, *arguments):
        self.count += 1
        return self.function(*arguments)


@dataclasses.dataclass(frozen=True)
class Feature:
    """Fields of a layer, and what its calls are given: `data(seed, T)` are arrays, anew a seed."""

    fields: dict = dataclasses.field(default_factory=dict)
    data: object = lambda seed, T: {}
    flags: dict = dataclasses.field(default_factory=dict)
    shape: object = lambda T: (B, T, D)


def lengths(seed, T):
    return jnp.arange(T)[None] < jnp.array([[T - seed], [5 + seed]])


def masks(seed, T):
    named = {"value_mask": lengths(seed, T), "query_mask": lengths(seed + 1, T)}
    return {**named, "attention_mask": booleans(seed, B, T, T)}


def segments(seed, T):
    return {"segment_ids": lengths(seed, T).astype("int32") + seed}


def adapters(seed, T):
    key, other = jax.random.split(jax.random.key(seed))
    tree = lora_params(key, config_of("lora", "reference"), (B, T, D), rank=3)
    lora = {"lora": jax.tree.map(lambda x: x + seed, tree), "lora_scale": jnp.float32(seed)}
    return {**lora, "lora_dropout_key": other}


def joined_ids(seed, T):
    """A function of one pair, made anew at each call, that looks into an array."""
    ids = lengths(seed, T)
    same = Mask.function(lambda b, n, t, s: ids[b, t] == ids[b, s])
    return {"attention_mask": same & Mask.causal()}


CAUSAL = {"use_causal_mask": True}
FEATURES = {
    "plain": Feature(),
    "masks": Feature(data=masks),
    "bias": Feature(data=lambda seed, T: {"bias": normal(seed, B, N, T, T)}),
    "segments, causal": Feature(data=segments, flags=CAUSAL),
    "dropout": Feature(
        {"dropout": 0.3}, lambda seed, T: {"dropout_key": jax.random.key(seed)} | masks(seed, T)
    ),
    "dropout of a shard": Feature(
        {"dropout": 0.3},
        lambda seed, T: {
            "dropout_key": jax.random.key(seed),
            "dropout_start": tuple(jnp.uint32(seed + i) for i in range(4)),
        },
    ),
    "rotary, positions": Feature(
        {"position": "rotary"}, lambda seed, T: {"positions": jnp.arange(T)[None] + seed}
    ),
    "grouped, window": Feature({"num_kv_heads": 2, "sliding_window": 5}, masks),
    "gate, sinks, norm": Feature({"use_gate": True, "use_sinks": True, "qk_norm": "rms"}, masks),
    "alibi": Feature({"position": "alibi"}, masks, CAUSAL),
    "relative bias": Feature({"position": RelativeBias()}, masks),
    "soft cap, chunks": Feature({"soft_cap": 5.0, "chunk_size": 8}, masks, CAUSAL),
    "latent": Feature(
        {"latent": Latent(5, 2, norm="rms"), "position": Rotary(dim=2), "use_bias": False}, masks
    ),
    "two axes": Feature(
        {"attention_axes": (1, 2)},
        lambda seed, T: {"value_mask": booleans(seed, B, 2, T // 2)},
        CAUSAL,
        lambda T: (B, 2, T // 2, D),
    ),
    "no batch": Feature({"dropout": 0.0}, shape=lambda T: (T, D), flags=CAUSAL),
    "scores": Feature(data=masks, flags={"return_attention_scores": True}),
    # The function's alone:
    "pair functions": Feature(data=joined_ids),
    "lora": Feature({"dropout": 0.0}, adapters, {"lora_dropout": 0.25}),
    "int8 weights": Feature(data=masks),
}
OF_THE_FUNCTION = ("pair functions", "lora", "int8 weights")


def config_of(feature, implementation):
    """Made anew at each call, as people's code makes it."""
    sizes = {"num_heads": N, "key_dim": 6, "implementation": implementation}
    return MultiHeadAttentionConfig(**sizes, **FEATURES[feature].fields)


def data_of(feature, config, seed):
    """Parameters, one input and the arrays of a call, all of them of that seed."""
    T = LENGTH[config.implementation]
    shape = FEATURES[feature].shape(T)
    params = random_params(param_shapes(config, shape), seed)
    params = quantize_params(params) if feature == "int8 weights" else params
    return params, normal(seed, *shape), FEATURES[feature].data(seed, T)


def total(result):
    return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(result))


class Function:
    """The pure function; the config is static."""

    jit, options = staticmethod(jax.jit), {"static_argnums": (0, 1)}

    @staticmethod
    def layer(config, params):
        return config, params

    @staticmethod
    def call(config, flags, params, x, data):
        return multi_head_attention(params, x, x, config=config, **dict(flags), **data)

    @classmethod
    def grad(cls, config, flags, params, x, data):
        loss = lambda params, x: total(cls.call(config, flags, params, x, data))
        return jax.grad(loss, (0, 1))(params, x)


class Linen(Function):
    """The linen module, static too; `training=True` where the call has a key."""

    @staticmethod
    def layer(config, params):
        return MultiHeadAttention.from_config(config), params

    @staticmethod
    def call(module, flags, params, x, data):
        data, key = dict(data), data.get("dropout_key")
        data.pop("dropout_key", None)
        how = {} if key is None else {"training": True, "rngs": {"dropout": key}}
        return module.apply({"params": params}, x, x, **dict(flags), **how, **data)


class Nnx(Function):
    """The nnx module, whose config is in its graph; `rngs` is one key."""

    jit, options = staticmethod(nnx.jit), {"static_argnums": 1}

    @staticmethod
    def layer(config, params):
        return flax_mha.nnx.MultiHeadAttention.from_params(params, config), params

    @staticmethod
    def call(layer, flags, params, x, data):
        data, key = dict(data), data.get("dropout_key")
        data.pop("dropout_key", None)
        how = {} if key is None else {"training": True, "rngs": key}
        return layer(x, x, **dict(flags), **how, **data)

    @classmethod
    def grad(cls, layer, flags, params, x, data):
        loss = lambda layer, x: total(cls.call(layer, flags, params, x, data))
        return nnx.grad(loss, argnums=(0, 1))(layer, x)


FACES = {"function": Function, "linen": Linen, "nnx": Nnx}


def arguments_of(face, feature, implementation, seed):
    """What a face's `call` and `grad` take: equal statics, and data of that seed."""
    config = config_of(feature, implementation)
    params, x, data = data_of(feature, config, seed)
    layer, params = FACES[face].layer(config, params)
    return layer, tuple(FEATURES[feature].flags.items()), params, x, data
