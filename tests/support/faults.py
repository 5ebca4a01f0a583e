"""Faults for the mutation check: one place of one file, chosen by a seed, and what stands there.

Most operators are cosmic-ray's; those that it lacks (a dropped term, a dropped call, swapped
arguments) stand here in its form.
"""

import ast
import dataclasses
import random

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators import binary_operator_replacement as binary
from cosmic_ray.operators import boolean_replacer as boolean
from cosmic_ray.operators import comparison_operator_replacement as comparison
from cosmic_ray.operators import unary_operator_replacement as unary
from cosmic_ray.operators.number_replacer import NumberReplacer
from cosmic_ray.operators.operator import Operator


class Rewriting(Operator):
    """An operator that writes a node anew: `rewritten` gives the texts that may stand for it."""

    def rewritten(self, node):
        raise NotImplementedError

    def mutation_positions(self, node):
        return [(node.start_pos, node.end_pos)] * len(self.rewritten(node))

    def mutate(self, node, index):
        written = get_ast(f"({self.rewritten(node)[index]})").children[0]
        written.get_first_leaf().prefix = node.get_first_leaf().prefix
        return written

    @classmethod
    def examples(cls):
        return ()


def code(nodes) -> str:
    return "".join(node.get_code() for node in nodes).strip()


class DroppedTerm(Rewriting):
    """`a + b - c` without one of its terms, `a * b` without one of its factors."""

    def rewritten(self, node):
        parts = node.children if node.type in ("arith_expr", "term") else []
        if not parts or not {part.value for part in parts[1::2]} <= {"+", "-", "*"}:
            return []
        first = [code(parts[2:])] if parts[1].value != "-" else []
        return first + [code(parts[:i] + parts[i + 2 :]) for i in range(1, len(parts), 2)]


def trailer(node):
    """The arguments of a call `f(...)` that ends a node, else None."""
    last = node.children[-1] if node.type in ("atom_expr", "power") else None
    called = last is not None and last.type == "trailer" and last.children[0].value == "("
    return last.children[1:-1] if called else None


class DroppedCall(Rewriting):
    """`x` for `f(x)`, where that is all that is called."""

    def rewritten(self, node):
        inner = trailer(node)
        is_one = inner and inner[0].type not in ("arglist", "argument")
        return [f"({code(inner)})"] if is_one else []


class SwappedArguments(Rewriting):
    """`f(b, a)` for `f(a, b)`."""

    def rewritten(self, node):
        inner = trailer(node)
        parts = inner[0].children if inner and inner[0].type == "arglist" else []
        found = []
        for i in range(0, len(parts) - 2, 2):
            if all(part.type != "argument" for part in (parts[i], parts[i + 2])):
                a, b = code([parts[i]]), code([parts[i + 2]])
                before, after = code(parts[:i]), code(parts[i + 3 :])
                head = code(node.children[:-1])
                found.append(f"{head}({before}{b}, {a}{after})")
        return found


def replacements(module, pairs: str) -> list:
    """cosmic-ray's operators by their names, `Add_Sub` for `-` in the place of `+`."""
    found = {op.__name__.split("Operator_")[1]: op for op in module.operators()}
    return [found[pair]() for pair in pairs.split()]


KINDS = {
    "operator": replacements(binary, "Add_Sub Sub_Add Mul_Add Div_Mul FloorDiv_Mul Mod_FloorDiv")
    + replacements(binary, "Pow_Mul BitOr_BitAnd BitAnd_BitOr LShift_RShift RShift_LShift"),
    "constant": [NumberReplacer()],
    "comparison": replacements(comparison, "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt")
    + replacements(comparison, "Is_IsNot IsNot_Is"),
    "boolean": [
        boolean.ReplaceAndWithOr(),
        boolean.ReplaceOrWithAnd(),
        boolean.ReplaceTrueWithFalse(),
        boolean.ReplaceFalseWithTrue(),
        boolean.AddNot(),
    ],
    "sign": replacements(unary, "Delete_USub Delete_Invert Delete_Not"),
    "dropped term": [DroppedTerm()],
    "dropped call": [DroppedCall()],
    "swapped arguments": [SwappedArguments()],
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault: line `line` of `file` reads `new` where it read `old`."""

    file: str
    kind: str
    line: int
    old: str
    new: str
    source: str = dataclasses.field(repr=False)


def bare(source: str) -> str | None:
    """What a source computes: its tree without annotations; None if it is none."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            told = getattr(node, name, None)
            if told is not None and "Annotated" not in ast.dump(told):  # those hold checks
                setattr(node, name, ast.Constant(0))
    return ast.dump(tree)


def planted(file: str, kind: str, source: str, mutated: str) -> Fault | None:
    """The fault between two sources, or None where they compute the same or one is no source."""
    if bare(mutated) in (None, bare(source)):
        return None
    before, after = source.splitlines(), mutated.splitlines()
    same = min(len(before), len(after))
    first = next(i for i in range(same) if before[i] != after[i])
    return Fault(file, kind, first + 1, before[first].strip(), after[first].strip(), mutated)


def places(source: str, kind: str) -> list[tuple[Operator, int]]:
    """Every operator of a kind with the number of each place that it finds in a source."""
    nodes = list(ast_nodes(get_ast(source)))
    return [
        (op, i)
        for op in KINDS[kind]
        for i in range(sum(len(list(op.mutation_positions(node))) for node in nodes))
    ]


def draw(file: str, source: str, kind: str, rng: random.Random) -> Fault | None:
    """One place of `kind` in a source, each equally likely; None where there is none."""
    found = places(source, kind)
    rng.shuffle(found)
    faults = (planted(file, kind, source, mutate_code(source, op, i)) for op, i in found)
    return next((fault for fault in faults if fault), None)


def chosen(sources: dict[str, str], seed: int, count: int) -> list[Fault]:
    """`count` faults in as many files, which are drawn by their number of lines.

    The kinds take turns. What is drawn of a file does not depend on the other files' text.
    """
    draws = {file: random.Random(f"{seed} {file}") for file in sources}
    lines = {file: max(len(source.splitlines()), 1) for file, source in sources.items()}
    files = sorted(sources, key=lambda file: draws[file].random() ** (1 / lines[file]))[::-1]
    kinds, faults = list(KINDS), []
    for file in files:
        turn = len(faults) % len(kinds)
        in_turn = kinds[turn:] + kinds[:turn]
        found = (draw(file, sources[file], kind, draws[file]) for kind in in_turn)
        faults += [fault for fault in [next(filter(None, found), None)] if fault]
        if len(faults) == count:
            break
    return faults
