"""Times the parts, the attention and the layer of one case in the same rounds."""

import dataclasses
from typing import Any

from flax_mha.bench import extras, pairs, timing
from flax_mha.bench.cases import Case
from flax_mha.bench.crossover import choice
from flax_mha.bench.parts import projections, tiles
from flax_mha.bench.parts.part import Part
from flax_mha.bench.results import Row
from flax_mha.bench.rows import fill


@dataclasses.dataclass(frozen=True)
class Timed:
    """A part, and the median seconds of doing it once."""

    part: Part
    seconds: float

    @property
    def in_all(self) -> float:
        return self.part.times * self.seconds

    def to_dict(self) -> dict[str, Any]:
        told = {field.name: getattr(self.part, field.name) for field in dataclasses.fields(Part)}
        return {name: x for name, x in told.items() if name != "function"} | {
            "seconds": self.seconds
        }


@dataclasses.dataclass(frozen=True)
class Found:
    """The parts of the projections and of the attention; median seconds of the whole of each."""

    case: Case
    how: str
    projections: list[Timed]
    attention: list[Timed]
    attention_seconds: float
    layer_seconds: float
    gemm_rate: float  # operations a second

    @property
    def attention_sum(self) -> float:
        """Seconds of the attention's parts; of whole arrays none is known."""
        return sum(timed.in_all for timed in self.attention)

    @property
    def layer_sum(self) -> float:
        """Seconds of the projections' parts, and of the attention's."""
        return self.attention_sum + sum(timed.in_all for timed in self.projections)

    def to_dict(self) -> dict[str, Any]:
        groups = {"projections": self.projections, "attention": self.attention}
        return {
            "case": self.case.label,
            "how": self.how,
            "parts": {name: [timed.to_dict() for timed in group] for name, group in groups.items()},
            "sums": {"attention": self.attention_sum, "layer": self.layer_sum},
            "whole": {"attention": self.attention_seconds, "layer": self.layer_seconds},
            "gemm_flops_per_second": self.gemm_rate,
        }


def measure(case: Case, seconds: float, rounds: int | None) -> Found:
    """All medians of one case; `seconds` are shared by all that is timed."""
    how, of_attention = _attention_of(case)
    of_projections = list(projections.parts_of(case))
    named = {f"{i} {part.name}": part for i, part in enumerate([*of_projections, *of_attention])}
    product, operations = extras.gemm()
    wholes = {"attention": pairs.attention(case), "layer": pairs.layer(case)}
    programs = {name: part.program() for name, part in named.items()}
    medians = _medians(programs | wholes | {"GEMM": timing.Call(product)}, seconds, rounds)
    timed = [Timed(part, medians[name] / part.steps) for name, part in named.items()]
    return Found(
        case,
        how,
        timed[: len(of_projections)],
        timed[len(of_projections) :],
        medians["attention"],
        medians["layer"],
        operations / medians["GEMM"],
    )


def _attention_of(case: Case) -> tuple[str, list[Part]]:
    """(what runs in words, its parts: of tiles alone, for whole arrays are XLA's to cut)."""
    name = choice(case)
    if name != "blockwise":
        return f"attention by {name!r}, of whole arrays", []
    tiling, visits = tiles.plan_of(case)
    size = f"{tiling.b} x {tiling.k} x {tiling.r} x {tiling.s}"
    told = (
        f"{visits.tiles} tiles of {size} (examples, heads, queries, keys), {visits.masked} masked"
    )
    return told, list(tiles.parts_of(case, tiling, visits))


def _medians(calls: dict[str, timing.Call], seconds: float, rounds: int | None) -> dict[str, float]:
    rows = {name: Row(name, "ours") for name in calls}
    fill(rows, calls, seconds, rounds)
    return {name: row.median for name, row in rows.items()}
