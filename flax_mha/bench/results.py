"""What a run found, as plain dataclasses that become JSON."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from flax_mha.bench.cases import AnyCase, Case
from flax_mha.bench.pairs import Pair


@dataclasses.dataclass
class Row:
    """One contender of one case. `status` is ok, or one of `rows.STATUS` with its `reason`."""

    name: str
    family: str
    version: str | None = None
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    temp_bytes: int | None = None
    compile_seconds: float | None = None
    calls: int = 0
    samples: list[float] = dataclasses.field(default_factory=list)  # seconds a call

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)

    def to_dict(self) -> dict[str, Any]:
        times = {"median": self.median, "minimum": self.minimum} if self.samples else {}
        return dataclasses.asdict(self) | times


@dataclasses.dataclass
class CaseResult:
    """All contenders of one case."""

    case: AnyCase
    rows: list[Row] = dataclasses.field(default_factory=list)

    def timed(self, *families: str) -> list[Row]:
        """The rows with times, of some families or of all."""
        return [row for row in self.rows if row.samples and row.family in (families or _ALL)]

    def row(self, name: str) -> Row | None:
        """The contender's row, if it was timed."""
        return next((row for row in self.timed() if row.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        return {"case": self.case.label, "flops": self.case.flops, "contenders": rows}


@dataclasses.dataclass
class LayerResult(CaseResult):
    """With the machine's GEMM rate in the same rounds."""

    case: Case
    gemm_flops: list[float] = dataclasses.field(default_factory=list)  # a second, by round

    @property
    def gemm_rate(self) -> float:
        """The machine's operations a second in a matrix product: the median of the rounds."""
        return statistics.median(self.gemm_flops)

    def gemm_share(self, row: Row) -> float:
        """The row's useful operations a second, as a share of the machine's matrix product."""
        return self.case.flops / row.median / self.gemm_rate

    def to_dict(self) -> dict[str, Any]:
        found = {**dataclasses.asdict(self.case), "gemm_flops_per_second": self.gemm_flops}
        return found | super().to_dict()


_ALL = ("ours", "jax", "torch")


@dataclasses.dataclass
class Run:
    """Everything of one run; what was skipped or not reached is None."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    cases: list[LayerResult] = dataclasses.field(default_factory=list)
    pairs: list[Pair] = dataclasses.field(default_factory=list)
    compile_case: str | None = None
    compile_seconds: dict[str, list[float]] | None = None
    memory: dict[str, int | None] | None = None
    import_seconds: list[float] | None = None
    finished: bool = False

    def find(self, **fields: Any) -> LayerResult | None:
        """The first case with these fields; those not named are as in a plain forward pass."""
        for result in self.cases:
            values = dataclasses.asdict(result.case)
            if all(values[name] == value for name, value in (_PLAIN | fields).items()):
                return result
        return None

    def to_dict(self, targets: list[Any], crossover: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("finished", "environment", "settings")},
            "cases": [result.to_dict() for result in self.cases],
            "pairs": [pair.to_dict() for pair in self.pairs],
            "compile": {"case": self.compile_case, "seconds": self.compile_seconds},
            "temp_bytes_compiled_only": self.memory,
            "import_flax_mha_after_flax_seconds": self.import_seconds,
            "targets": [dataclasses.asdict(t) | {"verdict": t.verdict} for t in targets],
            "crossover": {name: found.to_dict() for name, found in crossover.items()},
        }


_PLAIN = {"gradient": False, "causal": False, "dropout": 0.0, "window": None}
