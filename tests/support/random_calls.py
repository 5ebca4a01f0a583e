"""Random calls of `dot_product_attention`: what hypothesis draws, as data that a person can paste.

`Call(...)` holds numbers and names alone, so that its repr is a runnable example: it makes the
arrays and the arguments of the call, and says a second time, in NumPy, what they mean. See
`drawn_calls` for what is drawn, and for how a call is held against the oracle.
"""

import dataclasses
import math
from typing import Any

import dense_oracle
import jax
import jax.numpy as jnp
import numpy as np
from random_masks import allowed_by, has_band, mask_of

from flax_mha import dot_product_attention, explain
from flax_mha.attention import DistanceBias
from flax_mha.attention.dropout import keep_mask, words_of

SCORES = ("slopes", "squared", "table", "bent")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call; see `drawn_calls` for what its fields may be, `random_masks` for its mask."""

    batch: tuple = (2,)
    T: int = 5
    S: int = 7
    K: int = 1
    G: int = 1
    H: int = 3
    V: int = 2
    dtype: str = "float32"
    seed: int = 0
    on_grid: bool = False  # query and key on a grid whose products no dtype rounds
    mask: tuple = ()
    mask_as_array: bool = False
    offset: str | None = None  # of the mask's bands: "one", or "each" example its own
    is_causal: bool = False
    window: Any = None
    bias: tuple | None = None  # (which axes are full, kind, size, whether it is wide)
    distances: tuple | None = None  # (how many, the first, offset)
    score: str | None = None
    sinks: float | None = None  # their size
    soft_cap: float | None = None
    scale: float | None = None
    rate: float | None = None
    start: tuple | None = None
    shared: bool = False
    implementation: str | None = "blockwise"
    block_sizes: tuple | None = None
    return_weights: bool = False
    return_residuals: bool = False

    @property
    def N(self):
        return self.K * self.G

    @property
    def sizes(self):
        return (math.prod(self.batch), self.N, self.T, self.S)

    @property
    def wide(self):
        return "float64" if self.dtype == "float64" else "float32"

    def random(self, name):
        """A generator of its own for each array, so that none moves another one's numbers."""
        return np.random.default_rng([self.seed, *name.encode()])

    def normal(self, name, *shape):
        return self.random(name).normal(size=shape)

    # --- the arguments ------------------------------------------------------------------------

    def arrays(self):
        """What has a gradient, by name; `floats` are those that the score function closes over."""
        arrays = {
            "query": self._on_grid(self.normal("query", *self.batch, self.T, self.N, self.H)),
            "key": self._on_grid(self.normal("key", *self.batch, self.S, self.K, self.H)),
            "value": self.normal("value", *self.batch, self.S, self.K, self.V),
        }
        arrays = {name: jnp.asarray(x, self.dtype) for name, x in arrays.items()}
        if self.bias is not None:
            arrays["bias"] = self._bias(*self.bias)
        if self.distances is not None:
            values = self._on_grid(self.normal("values", self.N, self.distances[0]))
            arrays["values"] = jnp.asarray(values, self.wide)
        if self.sinks is not None:
            arrays["sinks"] = jnp.asarray(self.sinks * self.normal("sinks", self.N), self.wide)
        if self.score is not None:
            arrays["floats"] = jnp.asarray(self.normal("floats", self.N), self.wide)
        return arrays

    def _on_grid(self, x):
        return np.clip(np.round(2 * x) / 2, -3, 3) if self.on_grid else x

    def _bias(self, full, kind, size, is_wide):
        dtype = jnp.dtype(self.wide if is_wide else self.dtype)
        shape = tuple(
            n if is_full else 1 for n, is_full in zip((*self.batch, *self.sizes[1:]), full)
        )
        if kind == "normal":
            x = size * self.normal("bias", *shape)
        elif kind == "constant":
            x = np.full(shape, size)
        else:  # "removed": what an additive mask adds
            x = np.where(self.random("bias").random(shape) < 0.5, 0.0, -np.inf)
        least = float(jnp.finfo(dtype).min)
        return jnp.asarray(np.clip(x, least, -least), dtype)

    def offsets(self, kind, name="offset"):
        """`[B]`, or None."""
        each = self.random(name).integers(-2, 6, self.sizes[0])
        return {None: None, "one": each[:1], "each": each}[kind]

    def arguments(self):
        """All others."""
        mask = mask_of(self.mask, self) if self.mask else None
        if mask is not None and self.mask_as_array:
            mask = jnp.asarray(self.allowed_by_mask().reshape(*self.batch, *self.sizes[1:]))
        arguments = {
            **dict(mask=mask, is_causal=self.is_causal, local_window_size=self.window),
            **dict(soft_cap=self.soft_cap, scale=self.scale, block_sizes=self.block_sizes),
            **dict(implementation=self.implementation, return_weights=self.return_weights),
            "return_residuals": self.return_residuals,
        }
        if self.rate is not None:
            arguments |= dict(dropout_rate=self.rate, dropout_key=jax.random.key(self.seed))
            arguments |= dict(dropout_start=self.start, broadcast_dropout=self.shared)
        return arguments

    def whole(self, arrays):
        """Every argument of `dot_product_attention`, of arrays as `arrays` names them."""
        given = dict(arrays)
        if "values" in given:
            offset = self.offsets(self.distances[2], "distances")
            offset = None if offset is None else jnp.asarray(offset)
            given["distance_bias"] = DistanceBias(given.pop("values"), offset, self.distances[1])
        if "floats" in given:
            given["score"] = self._score(given.pop("floats"))
        return {**given, **self.arguments()}

    def attend(self, arrays):
        return dot_product_attention(**self.whole(arrays))

    def refusal(self):
        """Why the implementation cannot serve the call, or None."""
        told = explain(**self.whole(self.arrays()))[self.implementation or "reference"]
        return None if told.startswith("ok") else told

    def _score(self, floats_N):
        """A function of pairs; `_scored` says it a second time."""

        def score(x, b, n, t, s):
            distance = abs(t - s).astype(x.dtype)
            return {
                "slopes": lambda: x - 0.1 * floats_N[n] * distance,
                "squared": lambda: x + 0.05 * x * x * floats_N[n],
                "table": lambda: jnp.where(s > t, x + floats_N[n], x),
                "bent": lambda: jnp.tanh(x * (1 + 0.1 * (b + n).astype(x.dtype))) + floats_N[n],
            }[self.score]()

        return score

    # --- the meaning, in NumPy ----------------------------------------------------------------

    def allowed_by_mask(self):
        return np.broadcast_to(allowed_by(self.mask, self), self.sizes)

    def allowed(self):
        """Booleans `[B, N, T, S]`, of all that restricts attention."""
        b, _, t, s = np.indices(self.sizes)
        banded = has_band(self.mask) and not self.mask_as_array
        offset = self.offsets(self.offset) if banded else None
        distance = s - t - (0 if offset is None else np.broadcast_to(offset, self.sizes[:1])[b])
        allowed = self.allowed_by_mask().copy()
        if self.is_causal:
            allowed &= distance <= 0
        if self.window is not None:
            left, right = self.window if isinstance(self.window, tuple) else (self.window,) * 2
            allowed &= (left is None) | (distance >= -(left or 0))
            allowed &= (right is None) | (distance <= (right or 0))
        return allowed

    def keep(self):
        """What dropout keeps, cut out of the mask of a whole of which this call is a part."""
        if self.rate is None:
            return np.ones(self.sizes, bool)
        start = self.start or (0, 0, 0, 0)
        start = (0, 0, *start[2:]) if self.shared else start
        whole = tuple(a + n for a, n in zip(start, self.sizes))
        keep = np.asarray(keep_mask(words_of(jax.random.key(self.seed)), self.rate, whole))
        keep = keep[tuple(slice(a, None) for a in start)]
        return np.broadcast_to(keep[:1, :1], self.sizes) if self.shared else keep

    def _entries(self):
        """(head, entry) of the distance values that every pair reads."""
        b, n, t, s = np.indices(self.sizes)
        count, first, kind = self.distances
        offset = self.offsets(kind, "distances")
        moved = 0 if offset is None else np.broadcast_to(offset, self.sizes[:1])[b]
        return n, np.clip(s - t - moved - first, 0, count - 1)

    def _scored(self, floats_N, x):
        """The score, its slope, and the gradient of its floats, written out."""
        b, n, t, s = np.indices(self.sizes)
        p, distance, factor = floats_N[n], abs(t - s), 1 + 0.1 * (b + n)
        bent = np.tanh(x * factor)
        value, slope, by_float = {
            "slopes": (x - 0.1 * p * distance, np.ones_like(x), -0.1 * distance),
            "squared": (x + 0.05 * x * x * p, 1 + 0.1 * x * p, 0.05 * x * x),
            "table": (x + p * (s > t), np.ones_like(x), 1.0 * (s > t)),
            "bent": (bent + p, (1 - bent**2) * factor, np.ones_like(x)),
        }[self.score]
        d_floats = lambda d_BNTS: (d_BNTS * by_float).sum((0, 2, 3))
        return dense_oracle.Scored(value, slope, d_floats)

    def problem(self, arrays):
        """The call as the oracle takes it, of arrays that are read as they are, in float64."""
        B, of = self.sizes[0], {x: np.asarray(y).astype(np.float64) for x, y in arrays.items()}
        flat = {x: of[x].reshape(B, *of[x].shape[-3:]) for x in ("query", "key", "value")}
        bias_BNTS = np.zeros(self.sizes)
        if "bias" in of:
            full = np.broadcast_to(of["bias"], (*self.batch, *self.sizes[1:]))
            bias_BNTS = full.reshape(self.sizes)
        if "values" in of:
            bias_BNTS = bias_BNTS + of["values"][self._entries()]
        scale = 1 / math.sqrt(self.H) if self.scale is None else self.scale
        rounded = lambda x: x.astype(self.wide).astype(np.float64)
        score = dense_oracle.unscored
        if self.score is not None:
            score = lambda x: self._scored(of["floats"], x)
        return dense_oracle.Problem(
            flat["query"], flat["key"], flat["value"], self.allowed(), bias_BNTS, self.keep(),
            scale, self.rate or 0.0, self.soft_cap, of.get("sinks"), score,
            rounded if self.on_grid else None,
        )  # fmt: skip

    def gradients(self, problem, result, cotangents):
        """By the names of `arrays`, in the shapes that these have."""
        found = dense_oracle.gradients(problem, result, *cotangents)
        gradients = {name: found[name] for name in ("query", "key", "value")}
        for name, x in gradients.items():
            gradients[name] = x.reshape(*self.batch, *x.shape[1:])
        if self.bias is not None:
            whole = found["bias"].reshape(*self.batch, *self.sizes[1:])
            full = (*self.batch, *self.sizes[1:])
            shape = tuple(n if is_full else 1 for n, is_full in zip(full, self.bias[0]))
            gradients["bias"] = dense_oracle.summed_to(shape, whole)
        if self.distances is not None:
            gradients["values"] = np.zeros((self.N, self.distances[0]))
            np.add.at(gradients["values"], self._entries(), found["bias"])
        names = [x for x in ("sinks", "floats") if getattr(self, "score" if x == "floats" else x)]
        return gradients | {name: found[name] for name in names}
