"""The layers and calls that are compared with Keras and with the oracle."""

import dataclasses

import jax.numpy as jnp
from helpers import B, C, D, E, H, M, N, S, T, V, booleans, normal, pairwise
from thinning import half

from flax_mha import multi_head_attention

F = 4  # a batch axis besides B
GRID_T, GRID_S = (5, 4), (7, 6)  # two attended axes


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer (constructor arguments, Keras's names), its input shapes and one call.

    Without `value` the layer attends to itself; without `key` the value is the key.
    """

    name: str
    arguments: dict
    query: tuple
    value: tuple | None = None
    key: tuple | None = None
    call: dict = dataclasses.field(default_factory=dict)

    @property
    def shapes(self):
        """The shapes of query, value and key."""
        value = self.value or self.query
        return self.query, value, self.key or value

    def inputs(self, dtype="float32"):
        """The arrays, by name; only those that the call is given."""
        named = {"query": self.query, "value": self.value, "key": self.key}
        return {
            name: normal(seed, *shape, dtype=dtype)
            for seed, (name, shape) in enumerate(named.items())
            if shape is not None
        }


def case(name, query, value=None, key=None, call=None, **arguments):
    """A case whose constructor arguments are the usual sizes and `arguments`."""
    return Case(name, {"num_heads": N, "key_dim": H, **arguments}, query, value, key, call or {})


def attend(params, inputs, config, **call):
    """The layer under test: (output, attention_scores) unless the call says otherwise."""
    query = inputs["query"]
    value, key = inputs.get("value", query), inputs.get("key")
    call = {"return_attention_scores": True, **call}
    return multi_head_attention(params, query, value, key, config=config, **call)


def scalar(results, seed=99):
    """One number that depends on every entry of the result(s), with random weights."""
    results = results if isinstance(results, tuple) else (results,)
    total = jnp.float32(0)
    for i, result in enumerate(results):
        weights = normal(seed + i, *result.shape, dtype="float32").astype(result.dtype)
        total = total + (result * weights).astype(total.dtype).sum()
    return total


def named(row):
    """A short id of a row of options."""
    return "-".join(f"{key}={value}".replace(" ", "") for key, value in row.items() if value)


# --- one attended axis --------------------------------------------------------------------------

OUTPUT_SHAPES = [None, E, (6, 4)]
SMALL_AXES = {
    "cross": [False, True],
    "own_key": [False, True],
    "use_bias": [True, False],
    "value_dim": [None, V],
    "output_shape": OUTPUT_SHAPES,
}
MASK_SHAPES = {
    "TS": lambda T, S: (T, S),
    "1TS": lambda T, S: (1, T, S),
    "BTS": lambda T, S: (B, T, S),
    "B1S": lambda T, S: (B, 1, S),
    "BT1": lambda T, S: (B, T, 1),
    "BNTS": lambda T, S: (B, N, T, S),
    "1NTS": lambda T, S: (1, N, T, S),
    "B11S": lambda T, S: (B, 1, 1, S),
}
MASK_AXES = {
    "attention_mask": [None, *MASK_SHAPES],
    "query_mask": [False, True],
    "value_mask": [False, True],
    "key_mask": [False, True],
    "causal": [False, True],
    "sliding_window": [None, 2],
    "cross": [True, False],
    "own_key": [True, False],
    "use_bias": [True, False],
    "value_dim": [None, V],
    "use_gate": [False, True],
    "dropout": [0.0, 0.3],
}


def from_row(row):
    """The case that a row of options describes."""
    row = dict(row)
    name = named(row)
    cross, own_key = row.pop("cross"), row.pop("own_key")
    source = S if cross else T
    query, value = (B, T, D), (B, source, M if cross else D)
    call = masks_of(row, T, source)
    return case(
        name,
        query,
        value if cross else None,
        (B, source, C) if own_key else None,
        call,
        **row,
    )


def masks_of(row, T, S):
    """The call arguments that a row names; taken out of the row."""
    call = {}
    if shape := row.pop("attention_mask", None):
        call["attention_mask"] = booleans(11, *MASK_SHAPES[shape](T, S))
    for seed, (name, length) in enumerate(
        {"query_mask": T, "value_mask": S, "key_mask": S}.items()
    ):
        if row.pop(name, False):
            call[name] = booleans(seed + 21, B, length, share=0.8)
    if row.pop("causal", False):
        call["use_causal_mask"] = True
    return call


def product_cases():
    """Every combination of any four of the five options without masks."""
    rows = half(*SMALL_AXES.values())
    return [from_row(dict(zip(SMALL_AXES, row, strict=True))) for row in rows]


def mask_cases():
    """Every pair of mask kinds, ranks and options."""
    return [from_row(row) for row in pairwise(MASK_AXES)]


# --- other attended axes ------------------------------------------------------------------------


LINE, FREE, GRID = (B, T, F, D), (B, F, T, D), (B, *GRID_T, D)
ACROSS_LINE, ACROSS_FREE, ACROSS_GRID = (B, S, F, M), (B, F, S, M), (B, *GRID_S, M)
AXES = [  # attention_axes, query, value, the leading axes of two masks (None = no mask)
    ((1,), LINE, ACROSS_LINE, [None, (B,)]),
    ((-3,), LINE, ACROSS_LINE, [(B, F), (B, F, N)]),
    ((2,), FREE, ACROSS_FREE, [None, (B, F)]),
    ((-2,), FREE, ACROSS_FREE, [(B,), (1, F, 1)]),
    (2, FREE, None, [(B, F, N)]),
    ((1, 2), GRID, ACROSS_GRID, [None, (B,)]),
    ((-3, -2), GRID, ACROSS_GRID, [()]),
    (None, GRID, ACROSS_GRID, [(B, N)]),
    ((2, 1), GRID, ACROSS_GRID, [None, (), (B,), (B, N)]),
    ((-2, -3), GRID, None, [(1, N)]),
]


def axes_cases():
    """Every choice of axes that Keras has, with masks of every rank that they allow."""
    cases = []
    for axes, query, value, masks in AXES:
        for leading in masks:
            i = len(cases)
            shape = None if leading is None else leading + lengths(axes, query, value or query)
            call = {} if shape is None else {"attention_mask": booleans(i, *shape)}
            options = {"use_gate": i % 2 == 1, "value_dim": V if i % 3 else None}
            name = f"axes={axes}-mask={shape}".replace(" ", "")
            cases.append(case(name, query, value, None, call, attention_axes=axes, **options))
    padding = {"query_mask": booleans(1, B, T), "value_mask": booleans(2, B, S)}
    call = {**padding, "use_causal_mask": True}
    line = case("axes=1-all", LINE, ACROSS_LINE, None, call, attention_axes=1, sliding_window=3)
    return [*cases, line]


def lengths(axes, query, value):
    """The sizes (*T axes, *S axes) of a mask."""
    axes = range(1, len(query) - 1) if axes is None else (axes,) if isinstance(axes, int) else axes
    return tuple(shape[axis] for shape in (query, value) for axis in axes)
