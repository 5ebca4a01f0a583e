"""What `implementation=None` chooses, and the figures behind the rule.

Milliseconds of forward / forward and backward, reference against blockwise, 8 heads of 64, the
least of many, two cores, jax 0.10:

    B=64 T=32     2.0 /   5.1    2.0 /   6.8        B=32 T=128    15 /  54     7 / 24
    B=64 T=64     5.5 /  25      5.9 /  17          B=8  T=512    84 / 190    16 / 55

with the projections, forward: B=64 T=64 23.1 against 23.7 (medians 25 and 32), B=32 T=96 18.2
against 17.5. One query against a cache of 2048, 8 examples: 1.5 against 20, for the blocks want the
keys of a cache in another order.
"""

from collections.abc import Sequence
from typing import Any

from flax_mha.attention.contract import Inputs
from flax_mha.core import checks
from flax_mha.core.sizes import at_least

SMALLEST_SIDE = 96
SMALLEST_BLOCKWISE = SMALLEST_SIDE**2
FEWEST_QUERIES = 8
# What runs over tiles, the first that can serve the call.
TILED = {"cpu": ("blockwise",), "gpu": ("blockwise",), "tpu": ("pallas_tpu", "blockwise")}
RULE = "blockwise from T x S = 96 x 96 and T = 8 on, reference below"


def preferred(able: Sequence[str], inputs: Inputs, platform: str) -> str:
    """The name to run on a platform, among those that can serve the call there."""
    if not prefers_tiles(able, inputs):
        return "reference"
    return next(name for name in TILED[platform] if name in able)


def prefers_tiles(able: Sequence[str], inputs: Inputs) -> bool:
    """Whether to run over tiles: on every platform alike, for a trace does not know which."""
    if "reference" not in able or "blockwise" not in able:
        return "blockwise" in able
    return _is_large(inputs.query_BTNH.shape[1], inputs.key_BSKH.shape[1])


def _is_large(T: Any, S: Any) -> bool:
    many = at_least(T, FEWEST_QUERIES)
    large = at_least(T * S, SMALLEST_BLOCKWISE)
    if large is None and at_least(T, SMALLEST_SIDE) and at_least(S, SMALLEST_SIDE):
        large = True
    if many is False or large is False:
        return False
    if many is None or large is None:
        rule = f"`implementation=None` chooses by size: {RULE}."
        remedy = (
            "Name one, `implementation='blockwise'` or `'reference'`; or tell what is known, as "
            f"`jax.export.symbolic_shape('t', constraints=['t >= {SMALLEST_SIDE}'])`."
        )
        checks.fail(
            ValueError, rule, f"T = {T}, S = {S}, symbols whose sizes are not known", remedy
        )
    return True
