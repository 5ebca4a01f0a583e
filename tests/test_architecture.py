"""The house rules, read from the source: imports point downward, einsum strings spell suffixes.

Each rule is a function from source text to the list of its violations, so that a planted violation
can show that the rule bites.
"""

import ast
import pathlib
import re
import statistics

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "flax_mha"
SOURCES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
}
# From the ground up; a module may import from lower lines only.
LAYERS = [
    ["_typing"],
    ["_checks", "_dtypes", "_platform", "_threefry"],
    ["_frozen", "_tree_checks", "_projection"],
    ["_distributions"],
    ["initializers", "regularizers", "constraints", "masks", "_dropout", "_folding"],
    ["_identifiers", "attention._distance"],
    ["attention._contract"],
    ["attention._canonical", "attention._quarantine", "attention._choice"],
    ["attention._tiles", "attention._merge"],
    ["attention._blockwise_call", "attention._sinks", "attention._tile_sizes"],
    ["attention._blockwise_forward"],
    ["attention._blockwise_backward"],
    ["attention.reference", "attention.blockwise"],
    ["attention._canonical"],
    ["attention._dispatch"],
    ["attention.__init__"],
    ["rotary"],
    ["positions"],
    ["config"],
    ["params", "_placement", "caches"],
    ["_call"],
    ["_heads", "_cached_call"],
    ["_layer", "decoding"],
    ["functional"],
    ["losses", "updates", "scores"],
    ["interop._layout"],
    ["interop._torch_arrays", "interop._torch_models", "interop._safetensors"],
    ["interop._torch_layouts", "interop._torch_masks"],
    ["interop.torch"],
    ["interop._keras_arrays", "interop._keras_config", "interop._keras_file"],
    ["interop._keras_tree"],
    ["interop._keras_layers"],
    ["interop._keras_save"],
    ["interop.keras"],
    ["_plot_labels"],
    ["_plot_checks", "_plot_figure"],
    ["_plot_bands"],
    ["linen", "nnx", "plots"],
    ["interop.equinox"],
    ["interop._flax_attention", "interop._flax_weights"],
    ["interop._flax_modules"],
    ["interop.__init__", "interop.flax", "interop.jax_nn"],
    ["__init__"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MAY_IMPORT = {
    "flax": ("linen", "nnx", "interop.flax", "demo", "bench"),
    "optax": ("updates", "demo"),
}
OPTIONAL = {"matplotlib", "keras", "h5py", "torch", "safetensors", "equinox", "haiku"}
ON_TOP = ("demo.", "bench.")


def level(module: str) -> float:
    """Demo and bench stand on top of everything; their own files may import each other."""
    return float("inf") if module.startswith(ON_TOP) else LEVEL[module]


def imported(source: str) -> list[tuple[str, bool]]:
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
    return names


def own_module(name: str) -> str:
    """The file that an imported name comes from: a module's own, or its package's __init__."""
    inner = name.removeprefix("flax_mha").removeprefix(".")
    parent = inner.rpartition(".")[0]
    candidates = [inner, f"{inner}.__init__", parent, f"{parent}.__init__", "__init__"]
    return next(module for module in candidates if module in SOURCES)


def layer_violations(module: str, source: str) -> list[str]:
    found = []
    for name, _ in imported(source):
        if name.startswith("."):
            found.append(f"{module}: relative import {name}")
        elif name.split(".")[0] == "flax_mha":
            target = own_module(name)
            if not (level(target) < level(module) or level(module) == float("inf")):
                found.append(f"{module} imports {target}, which is not below it")
    return found


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
    assert layer_violations(module, SOURCES[module]) == []


@pytest.mark.parametrize("module", SOURCES)
def test_flax_and_optax_stay_in_their_files(module):
    assert package_violations(module, SOURCES[module]) == []


@pytest.mark.parametrize("module", SOURCES)
def test_einsum_strings_spell_the_suffixes(module):
    assert einsum_violations(module, SOURCES[module]) == []


def test_every_module_has_a_layer_and_every_layer_a_module():
    named = {name for name in SOURCES if not name.startswith(ON_TOP)}
    assert named == set(LEVEL)


def test_equations_are_found_where_they_are():
    counts = {module: source.count("->B") for module, source in SOURCES.items()}
    found = [
        module
        for module, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if equation_of(node)
    ]
    assert found.count("attention.reference") == counts["attention.reference"] == 3
    assert (found.count("_heads"), found.count("_layer")) == (3, 2)


@pytest.mark.parametrize(
    ("rule", "module", "planted"),
    [
        (layer_violations, "masks", "from flax_mha import config"),
        (layer_violations, "masks", "from flax_mha.config import MultiHeadAttentionConfig"),
        (layer_violations, "attention.reference", "import flax_mha.params"),
        (layer_violations, "masks", "def f():\n    from flax_mha import linen"),
        (layer_violations, "masks", "from . import config"),
        (layer_violations, "config", "from flax_mha import MultiHeadAttention"),
        (package_violations, "functional", "from flax import linen"),
        (package_violations, "losses", "import optax"),
        (package_violations, "bench.peers.haiku", "import haiku"),
        (package_violations, "demo.plots", "import matplotlib.pyplot as plt"),
        (einsum_violations, "x", "y_BTNH = jnp.einsum('BTD,DNH->BTHN', x_BTD, w_DNH)"),
        (einsum_violations, "x", "y = jnp.einsum('BTD,DNH->BTNH', x_BSD, w_DNH)"),
        (einsum_violations, "x", "y = project('BTD,DNH->BTNH', inputs.query_BTNH, w)"),
    ],
)
def test_a_planted_violation_is_found(rule, module, planted):
    assert len(rule(module, SOURCES.get(module, "") + "\n" + planted)) == 1


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


def test_files_and_functions_are_small():
    long = {module: text.count("\n") for module, text in SOURCES.items() if text.count("\n") > 300}
    assert long == {}
    lengths = [length for source in SOURCES.values() for length in function_lengths(source)]
    assert statistics.median(lengths) <= 12
    assert SOURCES["linen"].count("\n") <= 150
