"""Compiles every program that was asked for, and reads it."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax_mha.bench.aot.cases import T_OF_SCHEDULES, Case
from flax_mha.bench.aot.compile import Compiled, Refused, chip, compile_for, unit_width
from flax_mha.bench.aot.contenders import Contender, program
from flax_mha.bench.aot.figures import Figure, parts_of

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compile: every case of every contender for every topology, F and FB."""

    topologies: Sequence[str]
    cases: Sequence[Case]
    contenders: Sequence[Contender]
    lengths: Sequence[int]  # of the gradients whose memory is read; none = no memory


def figures(settings: Settings, say: Say) -> Iterator[Figure]:
    """The figures of one program after the other, F before FB."""
    for topology in settings.topologies:
        device = chip(topology)
        for case in settings.cases:
            for contender in settings.contenders:
                say(f"{topology} {case.name}: {contender.name}")
                yield from _of_contender(topology, device, case, contender, settings.lengths)


def _of_contender(
    topology: str, device: Any, case: Case, contender: Contender, lengths: Sequence[int]
) -> Iterator[Figure]:
    forward = Figure(topology, case.name, contender.name, gradient=False)
    both = Figure(topology, case.name, contender.name, gradient=True)
    for figure in (forward, both):
        reason = contender.unsupported(case, T_OF_SCHEDULES)
        if reason:
            figure.status, figure.reason = "unserved", reason
        else:
            _read(figure, device, case, contender, forward)
        if figure is both and figure.status == "ok":
            for T in lengths:
                _read_memory(figure, device, case, contender, T)
        yield figure


def _read(figure: Figure, device: Any, case: Case, contender: Contender, forward: Figure) -> None:
    """Fills in the figure of a program, whose own forward pass was read before."""
    width = unit_width(figure.topology)
    known = forward.parts if figure.gradient else ()
    try:
        compiled = _compiled(device, case, contender, T_OF_SCHEDULES, figure.gradient)
    except Refused as error:
        figure.status, figure.reason = "refused", str(error)
        return
    figure.parts = parts_of(compiled, case.H, width, known)
    if all(part.name != compiled.module.entry for part in figure.parts):
        figure.outside = compiled.module.cycles(compiled.module.entry)


def _read_memory(figure: Figure, device: Any, case: Case, contender: Contender, T: int) -> None:
    try:
        compiled = _compiled(device, case, contender, T, figure.gradient)
    except Refused as error:
        figure.extra_bytes[T] = str(error)
        return
    figure.extra_bytes[T] = compiled.extra_bytes
    figure.largest_buffer[T] = compiled.module.largest_buffer[1]


def _compiled(device: Any, case: Case, contender: Contender, T: int, gradient: bool) -> Compiled:
    return compile_for(device, *program(contender, case, T, gradient))
