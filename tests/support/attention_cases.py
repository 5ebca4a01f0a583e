"""The one table of attention calls; every implementation must serve or refuse each row."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracles
from helpers import booleans, normal

from flax_mha import Mask
from flax_mha.attention import DistanceBias
from flax_mha.attention.dropout import keep_mask, words_of

B, T, S, N, K, H, V = 2, 5, 7, 3, 1, 11, 13


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, and which pairs it lets attend, said a second time in plain numpy."""

    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    allowed: Any = True  # broadcasts to [B, N, T, S]
    sizes: tuple[int, ...] = (B, T, S, N, N, H, V)

    def arrays(self, dtype="float32"):
        b, t, s, n, k, h, v = self.sizes
        shapes = {"query": (b, t, n, h), "key": (b, s, k, h), "value": (b, s, k, v)}
        return {
            name: normal(i, *shape, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())
        }

    def expected(self, arrays):
        """(context [B, T, N, V], weights [B, N, T, S]) of the float64 oracle."""
        b, t, s, n, k, h, v = self.sizes
        query, key, value = (
            np.asarray(arrays[x]).astype(np.float64) for x in ("query", "key", "value")
        )
        full = (b, n, t, s)
        allowed = np.broadcast_to(self.allowed, full)
        bias = np.broadcast_to(np.asarray(self.call.get("bias", 0.0), np.float64), full)
        rate = self.call.get("dropout_rate", 0.0)
        bias = bias + self.of_distances(full)
        cap, sinks = self.call.get("soft_cap"), self.call.get("sinks")
        keep = np.ones(full, bool)
        if "dropout_key" in self.call:
            keep = np.asarray(keep_mask(words_of(self.call["dropout_key"]), rate, full))
        scale = self.call.get("scale", 1 / np.sqrt(h))
        context, weights = np.zeros((b, t, n, v)), np.zeros(full)
        for i in range(b):
            for j in range(n):
                kv = j // (n // k)
                context[i, :, j], weights[i, j] = oracles.attention(
                    query[i, :, j], key[i, :, kv], value[i, :, kv],
                    allowed[i, j], bias[i, j], scale, keep[i, j], rate,
                    cap, None if sinks is None else float(sinks[j]),
                )  # fmt: skip
        return context, weights

    def of_distances(self, full):
        """The distance bias, entry by entry; the end's value beyond either end."""
        result = np.zeros(full)
        if (bias := self.call.get("distance_bias")) is None:
            return result
        values = np.asarray(bias.values, np.float64)
        offsets = np.zeros(full[0], int) if bias.query_offset is None else bias.query_offset
        for b, n, t, s in np.ndindex(*full):
            entry = s - (t + int(offsets[b])) - bias.first
            result[b, n, t, s] = values[n, min(max(entry, 0), values.shape[1] - 1)]
        return result


def distance(t=T, s=S):
    """[T, S]: how far a key stands behind (positive) or before the query."""
    return np.arange(s)[None] - np.arange(t)[:, None]


def same(query_ids, key_ids):
    return (query_ids[:, :, None] == key_ids[:, None, :])[:, None]


def dense(*shape, seed=5):
    return np.asarray(booleans(seed, *shape))


KEY_OK, QUERY_OK = dense(B, S, seed=6), dense(B, T, seed=7)
QUERY_IDS, KEY_IDS = np.array([[0, 0, 1, 1, 2]] * B), np.array([[0, 1, 1, 1, 2, 2, 9], [1] * S])
PER_HEAD, NOBODY = dense(B, N, T, S), np.zeros((B, 1, T, S), bool)
OFFSET = np.array([2, 0])
JOINED = (
    Mask.causal()
    & Mask.padding(key=KEY_OK)
    & Mask.dense(PER_HEAD)
    & Mask.segments(QUERY_IDS, KEY_IDS)
)


def row_dropped():
    import jax

    return {"dropout_rate": 0.3, "dropout_key": jax.random.key(11)}


CASES = {
    "plain": Case(),
    "one token": Case(sizes=(1, 1, 1, 1, 1, 1, 1)),
    "long": Case(sizes=(1, 37, 41, 2, 2, 3, 5)),
    "long causal": Case({"is_causal": True}, distance(37, 41) <= 0, (1, 37, 41, 2, 2, 3, 5)),
    "causal, T > S": Case({"is_causal": True}, distance(41, 37) <= 0, (1, 41, 37, 2, 2, 3, 5)),
    "no queries": Case(sizes=(B, 0, S, N, N, H, V)),
    "no keys": Case(sizes=(B, T, 0, N, N, H, V)),
    "no batch": Case(sizes=(0, T, S, N, N, H, V)),
    "grouped heads": Case(sizes=(B, T, S, 6, 2, H, V)),
    "one key head": Case({"is_causal": True}, distance() <= 0, (B, T, S, N, 1, H, V)),
    "scale": Case({"scale": 0.7}),
    "causal": Case({"is_causal": True}, distance() <= 0),
    "causal with offset": Case(
        {"mask": Mask.causal(jnp.asarray(OFFSET))}, (distance() <= OFFSET[:, None, None])[:, None]
    ),
    "window": Case({"local_window_size": 2}, abs(distance()) <= 2),
    "one-sided window": Case({"local_window_size": (1, 3)}, (distance() >= -1) & (distance() <= 3)),
    "causal window": Case(
        {"local_window_size": 2, "is_causal": True}, (distance() >= -2) & (distance() <= 0)
    ),
    "key padding": Case({"mask": Mask.padding(key=KEY_OK)}, KEY_OK[:, None, None, :]),
    "query padding": Case({"mask": Mask.padding(query=QUERY_OK)}, QUERY_OK[:, None, :, None]),
    "segments": Case({"mask": Mask.segments(QUERY_IDS, KEY_IDS)}, same(QUERY_IDS, KEY_IDS)),
    "dense TS": Case({"mask": dense(T, S)}, dense(T, S)),
    "dense 11S": Case({"mask": dense(B, 1, 1, S)}, dense(B, 1, 1, S)),
    "dense 1T1": Case({"mask": dense(B, 1, T, 1)}, dense(B, 1, T, 1)),
    "dense NTS": Case({"mask": dense(N, T, S)}, dense(N, T, S)),
    "dense BNTS": Case({"mask": PER_HEAD}, PER_HEAD),
    "nobody may attend": Case({"mask": NOBODY}, NOBODY),
    "all masks": Case(
        {"mask": JOINED},
        (distance() <= 0) & KEY_OK[:, None, None] & PER_HEAD & same(QUERY_IDS, KEY_IDS),
    ),
    "bias": Case({"bias": normal(8, B, N, T, S)}),
    "bias of heads": Case({"bias": normal(8, N, 1, S), "is_causal": True}, distance() <= 0),
    "distance bias": Case({"distance_bias": DistanceBias(normal(9, N, T + S - 1), first=1 - T)}),
    "distance bias with offset": Case(
        {
            "mask": Mask.causal(jnp.asarray(OFFSET)),
            "distance_bias": DistanceBias(normal(9, N, 9), jnp.asarray(OFFSET), first=-8),
        },
        (distance() <= OFFSET[:, None, None])[:, None],
    ),
    "short distance bias": Case(
        {"distance_bias": DistanceBias(normal(9, 4, 3), first=-1), "is_causal": True},
        distance(37, 41) <= 0,
        (1, 37, 41, 4, 2, 3, 5),
    ),
    "soft cap": Case({"soft_cap": 0.5, "bias": normal(8, T, S)}),
    "sinks": Case({"sinks": normal(10, N), "mask": NOBODY | PER_HEAD[..., :1]}, PER_HEAD[..., :1]),
    "sinks of some heads": Case(
        {"sinks": np.float32([-np.inf, 0.5, -np.inf]), "mask": NOBODY | PER_HEAD[..., :1]},
        PER_HEAD[..., :1],
    ),
    "everything else": Case(
        {
            "distance_bias": DistanceBias(normal(9, 6, T + S - 1), first=1 - T),
            "sinks": normal(10, 6),
            "soft_cap": 2.0,
            "is_causal": True,
            **row_dropped(),
        },
        distance() <= 0,
        (B, T, S, 6, 2, H, V),
    ),
    "dropout": Case(row_dropped()),
    "dropout and all masks": Case(
        {"mask": JOINED, "bias": normal(8, T, S), **row_dropped()},
        (distance() <= 0) & KEY_OK[:, None, None] & PER_HEAD & same(QUERY_IDS, KEY_IDS),
    ),
    "everything dropped": Case({**row_dropped(), "dropout_rate": 1.0}),
    "grouped dropout": Case(
        {**row_dropped(), "is_causal": True}, distance() <= 0, (B, T, S, 6, 2, H, V)
    ),
}  # fmt: skip
