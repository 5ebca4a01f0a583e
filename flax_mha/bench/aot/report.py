"""The figures on the screen: cycles by case and contender, then memory against T."""

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console

from flax_mha.bench.aot.contenders import BEST_OF
from flax_mha.bench.aot.figures import Figure, Part
from flax_mha.bench.tables import say, table

PLAIN = "causal"
COLUMNS = (
    *("case", "contender, kernels", "whole", "masked", "x splash", "x plain"),
    *("MXU", "VALU", "outside"),
)
_LEFT = ("case", "contender", COLUMNS[1])
NOTES = """\
Cycles a tile of 512 x 512 entries of one head, in the body that runs once a visited tile: whole =
without a mask, masked = with one; a contender with one body, such as splash, always masks. FB = the
gradient, with the forward pass that it needs. A kernel's are bundles of the compiler's static
schedule, all other (~) the compiler's own estimates of its fusions. x splash: to splash with two
backward kernels at the better of blocks of 512 and 1024 (whole to its one body); x plain: to the
contender's own causal case. MXU, VALU: the share of the slots of the matrix and the vector units in
the bodies of the kernels. Outside: thousands of estimated cycles of what is neither a kernel nor a
loop, for all heads at T = 2048: other layouts, zeros, row sums of the gradient; it grows with T.
These are the compiler's figures. No device ran: waits for memory, for a full queue and what stands
around the bodies are not counted, and no time may be read off them."""


def print_cycles(console: Console, topology: str, figures: Sequence[Figure]) -> None:
    """The table of one topology, and why contenders are missing."""
    of_here = [figure for figure in figures if figure.topology == topology]
    lines = table(f"{topology}   (cycles a tile; T = 2048, N = 8)", COLUMNS, _LEFT)
    for figure in by_case(figure for figure in of_here if figure.status == "ok"):
        ours = not figure.contender.startswith("splash")
        lines.add_row(*cells(figure, of_here), style="bold" if ours else "")
        for part in figure.parts if figure.kernels or len(figure.parts) > 1 else ():
            lines.add_row(*part_cells(part), style="dim")
    console.print(lines)
    for line in missing(of_here):
        say(console, line)


def by_case(figures: Iterable[Figure]) -> list[Figure]:
    """Contenders of one case and pass beside each other; cases in the order in which they came."""
    figures = list(figures)
    cases = list(dict.fromkeys(figure.case for figure in figures))
    return sorted(figures, key=lambda figure: (cases.index(figure.case), figure.gradient))


def cells(figure: Figure, figures: Sequence[Figure]) -> list[str]:
    """One program's line."""
    mark = "" if figure.kernels else "~"
    return [
        f"{figure.case} {'FB' if figure.gradient else 'F'}",
        figure.contender,
        *(_cycles(number, mark) for number in (figure.whole, figure.masked)),
        _ratio(figure.whole, splash_at_its_best(figure, figures)),
        _ratio(figure.whole, plain(figure, figures)),
        *(_share(figure.use(unit)) for unit in ("MXU", "VALU")),
        f"{figure.outside / 1000:.0f}",
    ]


def part_cells(part: Part) -> list[str]:
    """A line for one kernel, or for the loops of one pass."""
    is_kernel = part.source == "schedule"
    cycles = [_cycles(number, "" if is_kernel else "~") for number in (part.whole, part.masked)]
    shares = [_share(part.use.get(unit)) for unit in ("MXU", "VALU")]
    return ["", f"  {part.name if is_kernel else 'loop over tiles'}", *cycles, "", "", *shares, ""]


def splash_at_its_best(figure: Figure, figures: Iterable[Figure]) -> float | None:
    """The cycles of splash at its best block sizes in the same case, if it serves it."""
    same = (x for x in figures if _same(x, figure) and x.contender in BEST_OF)
    return min((x.whole for x in same if x.whole), default=None)


def plain(figure: Figure, figures: Iterable[Figure]) -> float | None:
    """The cycles of the contender's own plain case."""
    same = (x for x in figures if x.contender == figure.contender and x.case == PLAIN)
    alike = (x for x in same if (x.topology, x.gradient) == (figure.topology, figure.gradient))
    return next((x.whole for x in alike), None)


def _same(a: Figure, b: Figure) -> bool:
    return (a.topology, a.case, a.gradient) == (b.topology, b.case, b.gradient)


def missing(figures: Iterable[Figure]) -> Iterator[str]:
    """A line for every contender that serves a case not at all, or not in figures."""
    lines = []
    for figure in figures:
        passes = "FB" if figure.gradient else "F"
        if figure.status != "ok":
            lines.append(f"  {figure.case}: {figure.contender}: {figure.status}: {figure.reason}")
        elif figure.whole is None:
            names = ", ".join(part.name for part in figure.parts if part.entries is None)
            names = f" of {names}" if names else ""
            what = f"the matrix products{names} are not those of attention over a tile"
            lines.append(f"  {figure.case} {passes}: {figure.contender}: not read: {what}")
    yield from dict.fromkeys(lines)


def print_memory(console: Console, topology: str, figures: Sequence[Figure]) -> None:
    """Peak minus arguments and results of FB, in MiB, by T."""
    rows = [figure for figure in figures if figure.topology == topology and figure.extra_bytes]
    if not rows:
        return
    lengths = list(rows[0].extra_bytes)
    title = f"{topology}   (FB: MiB at the peak besides arguments and results, by T)"
    columns = ("case", "contender", *map(str, lengths), "largest buffer, at the last T that fits")
    lines = table(title, columns, ("case", "contender", columns[-1]))
    for figure in rows:
        largest = list(figure.largest_buffer.values())
        lines.add_row(
            figure.case,
            figure.contender,
            *(_mebibytes(figure.extra_bytes[T]) for T in lengths),
            largest[-1] if largest else "-",
        )
    console.print(lines)
    refused = [
        (x, T, text) for x in rows for T, text in x.extra_bytes.items() if isinstance(text, str)
    ]
    for figure, T, text in refused:
        say(console, f"  {figure.case}: {figure.contender}: refused at T = {T}: {text}")


def print_notes(console: Console) -> None:
    """What the figures are, and what they are not."""
    say(console, NOTES)


def _cycles(number: float | None, mark: str) -> str:
    return "-" if number is None else f"{mark}{number:.0f}"


def _ratio(number: float | None, base: float | None) -> str:
    return f"{number / base:.2f}" if number and base else "-"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _mebibytes(extra: int | str) -> str:
    return "refused" if isinstance(extra, str) else f"{extra / 2**20:.0f}"
