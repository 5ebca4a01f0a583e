"""The house rules, read from the source: imports point downward, einsum strings spell suffixes.

Each rule is a function from source text to the list of its violations, so that a planted violation
can show that the rule bites.
"""

import ast
import dataclasses
import functools
import pathlib
import re
import statistics

import pytest

from flax_mha import MultiHeadAttentionConfig

PACKAGE = pathlib.Path(__file__).parents[1] / "flax_mha"
SOURCES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
}
# The rooms, folders and files of the package's top, from the ground up: a room may import from
# lower floors only. Inside a room no file may, over any way, import itself.
FLOORS = [
    ["core"],
    ["masks", "norms", "positions", "keras"],
    ["attention", "plots"],
    ["config"],
    ["params"],
    ["sharding"],
    ["layer", "interop"],
    ["decoding", "scores", "training"],
    ["functional"],
    ["linen", "nnx"],
    ["__init__"],
    ["guides", "bench", "demo", "commands"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MAY_IMPORT = {
    "flax": ("linen", "nnx", "interop.flax", "demo", "bench"),
    "optax": ("training", "demo"),
}
OPTIONAL = {"matplotlib", "keras", "h5py", "torch", "safetensors", "equinox", "haiku"}


def room(module: str) -> str:
    return module.split(".")[0]


@functools.cache
def imported(source: str) -> tuple[tuple[str, bool], ...]:
    """(absolute module name, whether at the top level of the file) of every import."""
    tree = ast.parse(source)
    top = set(tree.body)
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [(f"{module}.{alias.name}", node in top) for alias in node.names]
    return tuple(names)


def own_module(name: str) -> str:
    """The file that an imported name comes from: a module's own, or its package's __init__."""
    inner = name.removeprefix("flax_mha").removeprefix(".")
    parent = inner.rpartition(".")[0]
    candidates = [inner, f"{inner}.__init__", parent, f"{parent}.__init__", "__init__"]
    return next(module for module in candidates if module in SOURCES)


@functools.cache
def own_imports(source: str) -> frozenset[str]:
    names = [name for name, _ in imported(source)]
    return frozenset(own_module(name) for name in names if name.split(".")[0] == "flax_mha")


@functools.cache
def reached(module: str) -> frozenset[str]:
    """The files of a room that one of them imports, over any way, itself included."""
    found, pending = {module}, [module]
    while pending:
        inside = {x for x in own_imports(SOURCES[pending.pop()]) if room(x) == room(module)}
        pending += inside - found
        found |= inside
    return frozenset(found)


def floor_violations(module: str, source: str) -> list[str]:
    found = [f"{module}: relative import {x}" for x, _ in imported(source) if x.startswith(".")]
    for target in sorted(own_imports(source)):
        if room(target) != room(module) and FLOOR[room(target)] >= FLOOR[room(module)]:
            found.append(f"{module} imports {target}, which is not below it")
        if room(target) == room(module) and module in reached(target):
            found.append(f"{module} imports {target}, which imports it")
    return found


def face_violations(module: str, source: str) -> list[str]:
    """What a folder's `__init__` holds besides its docstring and names that it hands on."""
    body = ast.parse(source).body if module.endswith(".__init__") else []
    return [
        f"{module}:{node.lineno}: {ast.unparse(node)}"
        for node in body
        if not isinstance(node, ast.Expr)
        and not (isinstance(node, ast.ImportFrom) and all(x.name == x.asname for x in node.names))
    ]


def package_violations(module: str, source: str) -> list[str]:
    found = []
    for name, at_top in imported(source):
        package = name.split(".")[0]
        allowed = MAY_IMPORT.get(package, (module,))
        if not any(module == a or module.startswith(a + ".") for a in allowed):
            found.append(f"{module} imports {package}")
        if package in OPTIONAL and at_top:
            found.append(f"{module} imports the optional {package} at its top")
    return found


def suffix(node: ast.expr) -> str | None:
    """The letters at the end of a name: `logits_BNTS` -> BNTS."""
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    match = re.search(r"_([A-Z1]{2,}|[A-Z])$", name)
    return match and match[1]


def einsum_violations(module: str, source: str) -> list[str]:
    """Names with a suffix that stand for an operand or the result of an equation spell it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        call = node.value if isinstance(node, ast.Assign) else node
        equation = equation_of(call)
        if equation is None:
            continue
        operands, result = equation.split("->")
        pairs = list(zip(call.args[1:], operands.split(",")))
        if isinstance(node, ast.Assign):
            pairs.append((node.targets[0], result))
        for expression, letters in pairs:
            if suffix(expression) not in (None, letters):
                found.append(f"{module}:{node.lineno}: {ast.unparse(expression)} is not {letters}")
    return sorted(set(found))


def equation_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        text = node.args[0].value
        if isinstance(text, str) and re.fullmatch(r"[A-Za-z1,]+->[A-Za-z1]*", text):
            return text
    return None


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downward(module):
    assert floor_violations(module, SOURCES[module]) == []


@pytest.mark.parametrize("module", SOURCES)
def test_flax_and_optax_stay_in_their_files(module):
    assert package_violations(module, SOURCES[module]) == []


@pytest.mark.parametrize("module", SOURCES)
def test_einsum_strings_spell_the_suffixes(module):
    assert einsum_violations(module, SOURCES[module]) == []


@pytest.mark.parametrize("module", [module for module in SOURCES if module.endswith("__init__")])
def test_a_face_hands_on_and_defines_nothing(module):
    if module != "__init__" and room(module) not in ("bench", "demo"):
        assert face_violations(module, SOURCES[module]) == []


def test_every_module_has_a_layer_and_every_layer_a_module():
    assert {room(module) for module in SOURCES} == set(FLOOR)


def test_one_look_shows_the_house():
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 25
    hidden = [module for module in SOURCES if re.search(r"(^|\.)_(?!_init__|_main__)", module)]
    assert hidden == []  # the folder is the wall


@pytest.mark.slow
def test_equations_are_found_where_they_are():
    counts = {module: source.count("->B") for module, source in SOURCES.items()}
    found = [
        module
        for module, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if equation_of(node)
    ]
    assert found.count("attention.reference") == counts["attention.reference"] == 3
    assert (found.count("layer.heads"), found.count("layer.equation")) == (3, 2)


@pytest.mark.parametrize(
    ("rule", "module", "planted"),
    [
        (floor_violations, "masks", "from flax_mha import config"),
        (floor_violations, "masks", "from flax_mha.config import MultiHeadAttentionConfig"),
        (floor_violations, "attention.reference", "import flax_mha.params"),
        (floor_violations, "masks", "def f():\n    from flax_mha import linen"),
        (floor_violations, "masks", "from . import config"),
        (floor_violations, "config", "from flax_mha import MultiHeadAttention"),
        (package_violations, "functional", "from flax import linen"),
        (floor_violations, "attention.contract", "from flax_mha.attention import explain"),
        (floor_violations, "layer.heads", "from flax_mha.layer.equation import layer"),
        (floor_violations, "training.losses", "from flax_mha.functional import forward"),
        (face_violations, "layer.__init__", "def helper(): ..."),
        (face_violations, "positions.__init__", "from flax_mha.core import checks"),
        (package_violations, "scores", "import optax"),
        (package_violations, "bench.peers.haiku", "import haiku"),
        (package_violations, "demo.plots", "import matplotlib.pyplot as plt"),
        (einsum_violations, "x", "y_BTNH = jnp.einsum('BTD,DNH->BTHN', x_BTD, w_DNH)"),
        (einsum_violations, "x", "y = jnp.einsum('BTD,DNH->BTNH', x_BSD, w_DNH)"),
        (einsum_violations, "x", "y = project('BTD,DNH->BTNH', inputs.query_BTNH, w)"),
    ],
)
def test_a_planted_violation_is_found(rule, module, planted):
    assert len(rule(module, SOURCES.get(module, "") + "\n" + planted)) == 1


@pytest.mark.slow
def test_no_error_is_swallowed_whole():
    swallowed = [
        f"{module}:{node.lineno}"
        for module, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    ]
    assert swallowed == []


def function_lengths(source: str) -> list[int]:
    """Lines of each function's body, docstring and signature aside."""
    lengths = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lengths.append(body[-1].end_lineno - body[0].lineno + 1 if body else 0)
    return lengths


@pytest.mark.slow
def test_files_and_functions_are_small():
    long = {module: text.count("\n") for module, text in SOURCES.items() if text.count("\n") > 300}
    assert long == {}
    lengths = [length for source in SOURCES.values() for length in function_lengths(source)]
    assert statistics.median(lengths) <= 12
    fields = len(dataclasses.fields(MultiHeadAttentionConfig))
    assert SOURCES["linen"].count("\n") - fields <= 120  # a field of the config is a line
