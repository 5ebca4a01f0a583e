"""A whole run: every case built, checked and timed; its files are written after each case."""

import contextlib
import dataclasses
import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flax_mha.bench import extras, pairs, peers, plots, report, timing
from flax_mha.bench.cases import Case
from flax_mha.bench.check import check
from flax_mha.bench.command import write
from flax_mha.bench.crossover import crossovers
from flax_mha.bench.data import make_data
from flax_mha.bench.memory import long_sequences
from flax_mha.bench.peers.contract import Absent, Contender, Unserved
from flax_mha.bench.results import LayerResult, Row, Run
from flax_mha.bench.rows import admission, fill
from flax_mha.bench.targets import targets
from flax_mha.bench.textbook import Expected, expect


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure, and how long."""

    cases: tuple[Case, ...]
    contenders: tuple[str, ...]
    seconds: float = 8.0
    rounds: int | None = None
    max_gigabytes: float = 4.0
    compiles: int = 5
    imports: int = 5
    memory: bool = True


@dataclasses.dataclass
class Screen:
    """The console, and the bar's line of text."""

    console: Console
    bar: Progress
    task: object

    def show(self, text: str) -> None:
        self.bar.update(self.task, description=text)  # type: ignore[arg-type]


def run(settings: Settings, environment: dict, directory: Path, *, pictures: bool = True) -> bool:
    """Measures everything, prints it, and leaves bench.json and bench.png in `directory`.

    Returns:
        Whether every contender's numbers were right.

    Raises:
        BenchError: the directory cannot be written, or the picture's package is missing.
    """
    console = Console()
    if pictures:
        plots.require_matplotlib()
    result = Run(environment, dataclasses.asdict(settings))
    save(result, directory)
    report.print_head(console, environment)
    with _no_compilation_cache(), _screen(console, len(settings.cases) + 1) as screen:
        for case in settings.cases:
            result.cases.append(run_case(case, settings, screen))
            report.print_case(console, result.cases[-1])
            save(result, directory)
            screen.bar.advance(screen.task)  # type: ignore[arg-type]
        _extras(result, settings, screen)
    result.finished = True
    save(result, directory)
    report.print_crossovers(console, crossovers(result))
    report.print_targets(console, targets(result))
    if pictures:
        plots.plot(result, directory / "bench.png")
    console.print(f"Files: {directory}/", soft_wrap=True, highlight=False)
    return not report.print_wrong(console, result.cases)


def save(result: Run, directory: Path) -> None:
    """Replaces bench.json by what is known so far.

    Raises:
        BenchError: the directory cannot be written.
    """
    goals = targets(result) if result.finished else []
    found = crossovers(result) if result.finished else {}
    write(json.dumps(result.to_dict(goals, found), indent=1), directory / "bench.json")


def run_case(case: Case, settings: Settings, screen: Screen) -> LayerResult:
    """Builds and checks each contender, then times those that are right in interleaved rounds."""
    result = LayerResult(case)
    screen.show(f"{case.label}: textbook")
    data = make_data(case)
    expected = expect(case, data)
    calls: dict[str, timing.Call] = {}
    for name in settings.contenders:
        screen.show(f"{case.label}: {name}")
        row = Row(name, peers.CONTENDERS[name].family)
        result.rows.append(row)
        contender = _admit(row, case, data, expected, settings.max_gigabytes)
        if contender is not None:
            calls[name] = timing.Call(contender.run)
    del expected
    _time(result, calls, settings, screen)
    return result


def _admit(
    row: Row, case: Case, data: object, expected: Expected, max_gigabytes: float
) -> Contender | None:
    """The contender if it may be timed; otherwise the row says why not."""
    with admission(row):
        peers.require(row.name)
        if case.alone and row.name != "ours":
            raise Unserved("left out: the case asks for our own growth with T")
        row.version = peers.version(row.name)
        contender = peers.builder(row.name)(case, data)  # type: ignore[arg-type]
        row.temp_bytes, row.compile_seconds = contender.temp_bytes, contender.compile_seconds
        _check_size(contender, max_gigabytes)
        row.error = check(contender, case, expected)
        return contender
    return None


def _check_size(contender: Contender, max_gigabytes: float) -> None:
    gigabytes = (contender.temp_bytes or 0) / 1e9
    if gigabytes > max_gigabytes:
        limit = f"more than --max-gigabytes {max_gigabytes:g}"
        raise Unserved(f"needs {gigabytes:.1f} GB of temporaries, {limit}")


def _time(result: LayerResult, calls: dict, settings: Settings, screen: Screen) -> None:
    """Fills in the samples, round by round; the GEMM is one of those who take turns."""
    if not calls:
        return
    screen.show(f"{result.case.label}: timing")
    product, operations = extras.gemm()
    calls = calls | {"GEMM": timing.Call(product)}
    rows = {row.name: row for row in result.rows} | {"GEMM": Row("GEMM", "machine")}
    fill(rows, calls, settings.seconds, settings.rounds)
    result.gemm_flops = [operations / seconds for seconds in rows["GEMM"].samples]


def _extras(result: Run, settings: Settings, screen: Screen) -> None:
    """Pairs of cases in turns, fresh compilations of the first FB case, memory, the import."""
    right = [found.case for found in result.cases if found.row("ours") is not None]
    for pair in pairs.pairs_of(right):
        screen.show(f"{pair.above.label} and {pair.below.label}, in turns")
        pairs.measure(pair, settings.seconds, settings.rounds)
        result.pairs.append(pair)
    case = next((c for c in settings.cases if c.gradient and not c.alone), None)
    if settings.compiles and case is not None:
        screen.show(f"{case.label}: {settings.compiles} compilations each")
        result.compile_case = case.label
        result.compile_seconds = _compile_times(case, settings)
    if settings.memory:
        screen.show("memory of long sequences")
        result.memory = long_sequences()
    if settings.imports:
        screen.show("import")
        result.import_seconds = extras.import_seconds(settings.imports)
    screen.bar.advance(screen.task)  # type: ignore[arg-type]


def _compile_times(case: Case, settings: Settings) -> dict[str, list[float]]:
    """By contender; those that were not right or cannot serve the case showed that before."""
    data, compilers = make_data(case), {}
    for name in settings.contenders:
        with contextlib.suppress(Absent, Unserved):
            peers.require(name)
            contender = peers.builder(name)(case, data)
            if contender.compile is not None:
                compilers[name] = contender.compile
    seconds: dict[str, list[float]] = {name: [] for name in compilers}
    for name, value in extras.compile_times(compilers, settings.compiles):
        seconds[name].append(value)
    gc.collect()
    return seconds


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """A cache on disk would answer for the compiler."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


@contextlib.contextmanager
def _screen(console: Console, total: int) -> Iterator[Screen]:
    columns: Sequence = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield Screen(console, bar, bar.add_task("starting", total=total))
