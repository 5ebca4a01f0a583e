"""What is static of a call, and how its arrays stand in the flat list that a program takes."""

import dataclasses
from string import digits
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.allowed import Allowed, blocks_left
from flax_mha.attention.blockwise.call import Blocks, Plan
from flax_mha.attention.blockwise.parts import (
    Distances,
    Keys,
    Operands,
    Part,
    Queries,
    ScoredQueries,
    Scores,
    StoredKeys,
    StoredValues,
    Table,
)
from flax_mha.attention.blockwise.tile_sizes import tiling_of
from flax_mha.attention.contract import Options, Scales
from flax_mha.attention.distance import DistanceBias
from flax_mha.core.pairs.blocks import Grid
from flax_mha.core.pairs.separated import Separated
from flax_mha.core.platform import Place
from flax_mha.core.typing import Array
from flax_mha.masks import Mask

KINDS: dict[str, Any] = {
    "query": Queries,
    "key": Keys,
    "value": Keys,
    "bias": Scores,
    "distances": Distances,
    "operand": Operands,  # of a score function, numbered
    "table": Table,
}
SCORED = {"query": ScoredQueries}  # of a call with a score function
STORED = {"key": StoredKeys, "value": StoredValues}  # of a call with scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """The arrays of a call that have no derivative, and the distance of the first bias of them."""

    mask: Mask
    distance_offset: Array | None
    dropout_word_2: Array | None
    dropout_start_4: Array | None
    first_distance: int = dataclasses.field(metadata={"static": True})
    where: tuple[Allowed, ...] = ()
    score: Separated | None = None  # without its floats, which have a derivative
    scales: Scales | None = None


@dataclasses.dataclass(frozen=True)
class Signature:
    """The static half of a call; its arrays stand in the order [*facts, *parts]."""

    options: Options
    facts: Any  # the tree of `Facts`
    names: tuple[str, ...]  # of KINDS, those that the call has
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, options: Options, facts: Facts, arrays: dict[str, Array]) -> Any:
        kinds = KINDS if facts.score is None else KINDS | SCORED
        kinds = kinds if facts.scales is None else kinds | STORED
        parts = tuple(kinds[name.rstrip(digits)].of(x) for name, x in arrays.items())
        return cls(options, jax.tree.structure(facts), tuple(arrays), parts)

    @property
    def leaves(self) -> int:
        """How many arrays the facts are."""
        return self.facts.num_leaves

    def blocks(self, arrays: list[Array]) -> Blocks:
        """The arrays by their names, as they are."""
        facts = jax.tree.unflatten(self.facts, arrays[: self.leaves])
        return _blocks(facts, dict(zip(self.names, arrays[self.leaves :])))

    def filled(self, arrays: list[Array], place: Place) -> tuple[Plan, Blocks]:
        """The tiles' sizes, and the arrays filled up to whole blocks."""
        facts = jax.tree.unflatten(self.facts, arrays[: self.leaves])
        named = dict(zip(self.names, arrays[self.leaves :]))
        blocks = _blocks(facts, named)
        tiling = tiling_of(blocks, self.options.block_sizes, place)
        plan = Plan(tiling, self.options, skips=place.devices == 1)
        fill = {name: part.fill for name, part in zip(self.names, self.parts)}
        named = {name: fill[name](plan.tiling, x) for name, x in named.items()}
        grid = Grid(tiling.T, tiling.S, tiling.t, tiling.s)
        left = blocks_left(facts.where, grid) if plan.skips else None
        facts = _filled(facts, plan)
        return plan, _blocks(facts, named, None if left is None else left.some)


def _blocks(facts: Facts, named: dict[str, Array], needed: Array | None = None) -> Blocks:
    bias = None
    if "distances" in named:
        bias = DistanceBias(named["distances"], facts.distance_offset, facts.first_distance)
    return Blocks(
        named["query"],
        named["key"],
        named["value"],
        named.get("bias"),
        bias,
        facts.mask,
        facts.dropout_word_2,
        facts.dropout_start_4,
        facts.where,
        None if facts.score is None else facts.score.with_moving(named),
        needed,
        facts.scales,
    )


def _filled(facts: Facts, plan: Plan) -> Facts:
    """The facts up to whole blocks; the score's floats are parts, and filled as these."""

    def fill(x: Any) -> Any:
        return None if x is None else Operands.of(x).fill(plan.tiling, x)

    def keys(x_BSK: Array) -> Array:
        return Keys.of(x_BSK[..., None]).fill(plan.tiling, x_BSK[..., None])[..., 0]

    def operands(pairs: Separated) -> Separated:
        return dataclasses.replace(pairs, operands=tuple(map(fill, pairs.operands)))

    return dataclasses.replace(
        facts,
        mask=_filled_mask(facts.mask, plan),
        where=tuple(dataclasses.replace(one, pairs=operands(one.pairs)) for one in facts.where),
        score=None if facts.score is None else operands(facts.score),
        scales=jax.tree.map(keys, facts.scales),
    )


def _filled_mask(mask: Mask, plan: Plan) -> Mask:
    tiling = plan.tiling
    T, S = tiling.query_blocks * tiling.t, tiling.key_blocks * tiling.s

    def fill(x: Array | None, length: int) -> Any:
        return None if x is None else jnp.pad(x, ((0, 0), (0, length - x.shape[1])))

    return dataclasses.replace(
        mask,
        query_padding=fill(mask.query_padding, T),
        key_padding=fill(mask.key_padding, S),
        segment_ids=tuple((fill(q, T), fill(k, S)) for q, k in mask.segment_ids),
        dense_masks=tuple(Scores.of(x).fill(tiling, x) for x in mask.dense_masks),
    )
