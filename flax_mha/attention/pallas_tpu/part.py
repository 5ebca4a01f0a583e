"""Inside the kernels, one part of a tile: where it stands, and its blocks of the operands."""

import dataclasses
from typing import Any

from jax.experimental import pallas as pl

from flax_mha.attention.pallas_tpu.operands import At, of_example
from flax_mha.attention.pallas_tpu.plan import Part, Plan


@dataclasses.dataclass(frozen=True)
class Here:
    """One part of a tile: the operands' blocks by name, the tile, and the part's first entries."""

    plan: Plan
    refs: dict[str, Any]
    at: At
    part: Part
    row: int
    column: int

    @property
    def rows(self) -> Any:
        return pl.ds(self.row, self.part.rows)

    @property
    def columns(self) -> Any:
        return pl.ds(self.column, self.part.columns)

    def scalar(self, name: str, index: Any) -> Any:
        """One number of a scalar operand, of this tile's example."""
        row = of_example(self.plan, name, self.at.b)
        return self.refs[name][row * self.plan.shape(name)[1] + index]


def parts(plan: Plan, refs: dict[str, Any], at: At, part: Part) -> list[Here]:
    """The parts of a tile: from the first key to the last, and of these from the first query."""
    rows, columns = range(0, plan.t, part.rows), range(0, plan.s, part.columns)
    return [Here(plan, refs, at, part, row, column) for column in columns for row in rows]
