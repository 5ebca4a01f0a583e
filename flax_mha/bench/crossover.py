"""Where blockwise overtakes the reference on this machine, and whether the rule knows it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha import explain
from flax_mha.attention.choice import RULE
from flax_mha.bench.cases import Case
from flax_mha.bench.results import LayerResult, Run

PAIR = ("ours/reference", "ours/blockwise")


@dataclasses.dataclass(frozen=True)
class Crossover:
    """One variant's medians over T: `{T: (reference, blockwise)}`, and what None chooses there."""

    medians: dict[int, tuple[float, float]]
    chosen: dict[int, str]

    @property
    def blockwise_from(self) -> int | None:
        """The least T from which blockwise is never slower; None where the longest T is."""
        least = None
        for length in sorted(self.medians, reverse=True):
            reference, blockwise = self.medians[length]
            if blockwise > reference:
                break
            least = length
        return least

    @property
    def lost(self) -> dict[int, float]:
        """Where None chooses the slower one: how many times slower."""
        names = [name.removeprefix("ours/") for name in PAIR]
        quotients = {
            length: self.medians[length][names.index(name)] / min(self.medians[length])
            for length, name in self.chosen.items()
        }
        return {length: quotient for length, quotient in quotients.items() if quotient > 1}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"blockwise_from": self.blockwise_from}


def crossovers(run: Run) -> dict[str, Crossover]:
    """By variant, where both implementations were timed at two or more lengths."""
    groups: dict[str, list[LayerResult]] = {}
    for result in run.cases:
        if None not in [result.row(name) for name in PAIR]:
            groups.setdefault(result.case.variant, []).append(result)
    return {variant: _crossover(group) for variant, group in groups.items() if len(group) > 1}


def _crossover(results: list[LayerResult]) -> Crossover:
    medians, chosen = {}, {}
    for result in results:
        length = result.case.length
        times = {row.name: row.median for row in result.timed()}
        medians[length] = (times[PAIR[0]], times[PAIR[1]])
        chosen[length] = choice(result.case)
    return Crossover(medians, chosen)


def choice(case: Case) -> str:
    """What `implementation=None` runs, from `explain`."""
    shape = (case.batch, case.length, case.heads, case.head_size)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    answers: dict[str, Any] = explain(x, x, x, is_causal=case.causal)
    return next(name for name, answer in answers.items() if answer.endswith(RULE))
