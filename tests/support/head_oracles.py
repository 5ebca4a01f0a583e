"""What becomes of one head, one number at a time in float64: clip, norm, place; see `oracles`.

Written from the papers' words, and nothing here is shared with the package.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Extras:
    """A config's fields beyond Keras's, as `oracles.layer` takes them."""

    clip_qkv: float | None = None
    qk_norm: str | None = None
    value_norm: str | None = None
    position: str | None = None
    scale: float | None = None
    soft_cap: float | None = None
    chunk_size: int | None = None

    def head(self, vector, name, params, place):
        """One projected vector H of `name`, "query", "key" or "value", that stands at `place`."""
        if self.clip_qkv is not None:
            vector = np.array([min(max(x, -self.clip_qkv), self.clip_qkv) for x in vector])
        kind = self.value_norm if name == "value" else self.qk_norm
        if kind is not None:
            vector = normed(vector, kind, params.get(f"{name}_norm"))
        is_turned = self.position == "rotary" and name != "value"
        return turned(vector, place) if is_turned else vector

    def bias(self, n, heads, t, s):
        """What a position adds to the logit of query `t` and key `s` in head `n`."""
        return -alibi_slope(n, heads) * abs(t - s) if self.position == "alibi" else 0.0

    def share_a_chunk(self, p, q):
        return self.chunk_size is None or p // self.chunk_size == q // self.chunk_size


def normed(vector, kind, params):
    """ "rms": root mean square 1, times a learned scale; "l2": length sqrt(H)."""
    square = math.fsum(vector**2)
    if kind == "l2":
        return vector * math.sqrt(len(vector) / square) if square > 0 else 0 * vector
    return vector / math.sqrt(square / len(vector) + 1e-6) * params["scale"]


def turned(vector, place):
    """RoFormer's rotation of the pairs (i, i + H / 2) by place 10000^(-2 i / H)."""
    half, result = len(vector) // 2, np.zeros(len(vector))
    for i in range(half):
        angle = place * 10000.0 ** (-2 * i / len(vector))
        a, b = vector[i], vector[i + half]
        result[i] = a * math.cos(angle) - b * math.sin(angle)
        result[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return result


def alibi_slope(n, heads):
    """2^(-8 (n + 1) / P) of the first P heads, P a power of two; then every second of 2 P."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    if n < power:
        return 2.0 ** (-8 * (n + 1) / power)
    return 2.0 ** (-8 * (2 * (n - power) + 1) / (2 * power))


def places(entries, ids):
    """Where tokens stand: as they are told, or counted anew in each segment, or 0, 1, ..."""
    if entries is not None:
        return list(entries)
    if ids is None:
        return None
    return [sum(other == ids[i] for other in ids[:i]) for i in range(len(ids))]
