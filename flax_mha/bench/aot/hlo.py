"""What the text of a compiled program says: kernels, loops, estimated cycles, buffers.

Every fusion that libtpu compiles carries its `estimated_cycles`. Where a program has no kernel, the
body of a tile is the body of an innermost loop that holds a matrix product; a program without such
a loop has all of it at once, in its entry.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_HEAD = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BODY = re.compile(r"body=%?([^\s,})]+)")
_FUSED = re.compile(r"(?:calls|to_apply)=%?([^\s,})]+)")
_PRODUCTS = ("convolution", "dot")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`shape` is its result's, a tuple's parts included; `text` all that stands behind the =."""

    name: str
    opcode: str
    shape: str
    text: str

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it gives none."""
        match = _CYCLES.search(self.text)
        return int(match[1]) if match else 0


@dataclasses.dataclass(frozen=True)
class Steps:
    """What computes the entries of `[B, N, T, S]` where no kernel does.

    Attributes:
        name: of the computation that it stands in.
        cycles: of one step of each loop, in the program's order; of the program without loops.
        products: how many matrix products one step has.
        entries: of the largest product: a tile of all heads, or all entries at once.
    """

    name: str
    cycles: tuple[int, ...]
    products: int
    entries: int


class Module:
    """A compiled program, of its text."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        for name, is_entry, lines in _computations(text):
            self.computations[name] = [_instruction(*line) for line in lines]
            self.entry = name if is_entry else self.entry

    @property
    def kernels(self) -> list[str]:
        """The names of the custom calls that are kernels, in the program's order."""
        calls = (i for i in self._all() if i.opcode == "custom-call")
        return [i.name for i in calls if 'custom_call_target="tpu_custom_call"' in i.text]

    @property
    def steps(self) -> list[Steps]:
        """The innermost loops with matrix products, those of one computation together."""
        inner = {name: self._tile_loops(name) for name in self.computations}
        found = [self._steps(name, bodies) for name, bodies in inner.items() if bodies]
        if not found and self.products(self.entry):
            found = [self._steps(self.entry, [self.entry])]
        return found

    def _steps(self, name: str, bodies: list[str]) -> Steps:
        sizes = self.products(bodies[0])
        return Steps(name, tuple(map(self.cycles, bodies)), len(sizes), max(sizes))

    def _tile_loops(self, computation: str) -> list[str]:
        bodies = self._loops(computation)
        return [body for body in bodies if not self._loops(body) and self.products(body)]

    @property
    def largest_buffer(self) -> tuple[int, str]:
        """(bytes, shape) of the largest array that is not inside a fusion."""
        fused = {name for i in self._all() for name in _FUSED.findall(i.text)}
        shapes = (
            f"{dtype}[{sizes}]"
            for name, instructions in self.computations.items()
            if name not in fused
            for instruction in instructions
            for dtype, sizes in _ARRAY.findall(instruction.shape)
        )
        return max(((_bytes(shape), shape) for shape in shapes), default=(0, ""))

    def cycles(self, computation: str) -> int:
        """The estimates of one computation's own instructions; of a loop in it, nothing."""
        return sum(instruction.cycles for instruction in self.computations[computation])

    def products(self, computation: str) -> list[int]:
        """The numbers in the results of the matrix products of a computation and its fusions."""
        found = []
        for instruction in self.computations.get(computation, []):
            if instruction.opcode in _PRODUCTS:
                found.append(_numbers(_ARRAY.search(instruction.shape)[2]))  # type: ignore[index]
            elif instruction.opcode == "fusion":
                for name in _FUSED.findall(instruction.text):
                    found += self.products(name)
        return found

    def _loops(self, computation: str) -> list[str]:
        whiles = (i for i in self.computations[computation] if i.opcode == "while")
        return [match[1] for i in whiles if (match := _BODY.search(i.text))]

    def _all(self) -> Iterator[Instruction]:
        for instructions in self.computations.values():
            yield from instructions


def _computations(text: str) -> Iterator[tuple[str, bool, list[tuple[str, str]]]]:
    """(name, whether it is the entry, [(instruction, text)]); some texts have many lines."""
    name, is_entry, lines = "", False, []  # type: tuple[str, bool, list[tuple[str, str]]]
    for line in text.splitlines():
        if match := _HEAD.match(line):
            name, is_entry, lines = match[2], bool(match[1]), []
        elif line == "}" and name:
            yield name, is_entry, lines
            name = ""
        elif name and (match := _INSTRUCTION.match(line)):
            lines.append((match[1], match[2]))
        elif name and lines:
            lines[-1] = (lines[-1][0], f"{lines[-1][1]}\n{line}")


def _instruction(name: str, text: str) -> Instruction:
    match = _OPCODE.search(_without_comments(text))
    opcode = match[1] if match else ""
    return Instruction(name, opcode, text.partition(f" {opcode}(")[0], text)


def _without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text)


def _bytes(shape: str) -> int:
    dtype, _, sizes = shape.rstrip("]").partition("[")
    bits = re.search(r"\d+", dtype)  # f8e4m3fn has 8, pred none
    return -(-_numbers(sizes) * (int(bits[0]) if bits else 8) // 8)


def _numbers(sizes: str) -> int:
    return math.prod(int(size) for size in sizes.split(",") if size)
