"""One table a case: each part, and the sum of the parts beside the whole."""

from rich.console import Console

from flax_mha.bench.parts.measure import Found, Timed
from flax_mha.bench.tables import say, table

COLUMNS = ("part", "operands", "times", "ms in all", "G/s", "of GEMM")


def print_case(console: Console, found: Found) -> None:
    """Products in floating-point operations a second, passes in the numbers that they read."""
    gemm = f"GEMM {found.gemm_rate / 1e9:.0f} GFLOP/s"
    lines = table(f"{found.case.label}   ({found.how}; {gemm})", COLUMNS, ("part", "operands"))
    for timed in (*found.projections, *found.attention):
        lines.add_row(*_cells(timed, found.gemm_rate))
    console.print(lines)
    if found.attention:
        say(console, _whole("attention alone", found.attention_seconds, found.attention_sum))
        say(console, _whole("the layer", found.layer_seconds, found.layer_sum))
    else:
        for name in ("attention", "layer"):
            say(console, f"  {name}: {1e3 * getattr(found, f'{name}_seconds'):.4g} ms")
    share = found.case.flops / found.layer_seconds / found.gemm_rate
    say(console, f"  the layer's useful operations: {share:.0%} of GEMM")


def _cells(timed: Timed, gemm_rate: float) -> list[str]:
    part = timed.part
    rate = (part.flops or part.numbers) / timed.seconds
    share = f"{rate / gemm_rate:.0%}" if part.flops else ""
    operands = ", ".join("x".join(map(str, shape)) for shape in part.shapes)
    numbers = [f"{1e3 * timed.in_all:.4g}", f"{rate / 1e9:.3g}", share]
    return [part.name, operands, str(part.times), *numbers]


def _whole(name: str, seconds: float, parts: float) -> str:
    """A line of the whole.

    Example:
        >>> _whole("the layer", 0.3, 0.24)
        '  the layer: 300 ms; its parts, each timed alone: 240 ms, 80%'
    """
    told = f"{1e3 * seconds:.4g} ms; its parts, each timed alone: {1e3 * parts:.4g} ms"
    return f"  {name}: {told}, {parts / seconds:.0%}"
