"""Every public name explains itself: what it takes, gives and refuses, and how it is used."""

import doctest
import importlib
import inspect
import pathlib
import pydoc
import re

import pytest
from docstring_rules import Public, public_names, required, sections, violations

import flax_mha
import flax_mha.nnx

ROOT = pathlib.Path(__file__).parents[1]
PUBLIC = {public.name: public for public in public_names()}
DOCS = {name.removeprefix("flax_mha."): public.doc for name, public in PUBLIC.items()}

# What only some docstrings must hold besides; an equation stands before the first section.
MORE = {
    "multi_head_attention": ("equation", "Memory", "Differs from", "Reference"),
    "dot_product_attention": ("equation", "Memory", "Differs from", "Reference"),
    "attention_scores": ("Memory",),
    "init_cache": ("Memory",),
    "init_cross_cache": ("Memory",),
    "KVCache": ("Memory",),
    "CrossCache": ("Memory",),
    "Mask": ("equation", "Memory"),
    "Mask.dense": ("Memory",),
    "Mask.window": ("equation", "Differs from"),
    "MultiHeadAttention": ("Memory", "Differs from"),
    "MultiHeadAttentionConfig": ("Raises", "Differs from"),
    "nnx.MultiHeadAttention": ("Memory", "Differs from"),
    "attention.merge": ("equation", "Memory", "Reference"),
    "attention.Residuals": ("equation",),
    "attention.DistanceBias": ("Memory",),
    "positions.Alibi": ("equation", "Reference"),
    "positions.RelativeBias": ("equation", "Reference"),
    "positions.Rotary": ("equation", "Reference"),
    "positions.Llama3Scaling": ("Reference",),
    "norms.RMSNorm": ("equation", "Reference"),
    "norms.LayerNorm": ("equation", "Reference"),
    "norms.L2Norm": ("equation",),
    "positions.YarnScaling": ("Reference",),
    "interop.jax_nn.dot_product_attention": ("equation", "Memory", "Differs from"),
    "interop.flax.attention_fn": ("equation", "Memory", "Differs from"),
    "interop.huggingface.load_adapter": ("Memory",),
    "interop.huggingface.save_adapter": ("Memory",),
    "interop.torch.load_safetensors": ("Memory",),
    "interop.torch.mask_from_torch": ("equation", "Differs from"),
    "interop.torch.mask_to_torch": ("equation",),
    "interop.keras.from_keras_layer": ("Differs from",),
    "interop.equinox.from_equinox": ("Differs from",),
}


def lacks(doc, what):
    """Whether a docstring has no such section, or no line that is an equation before its Args."""
    if what == "equation":
        return not re.search(r" = | <= |softmax\(|->", "\n".join(sections(doc)[""]))
    return re.search(rf"\b{what}\b[^:\n]*: ", doc) is None and what not in sections(doc)


def test_the_names_are_found():
    expected = {"MultiHeadAttention", "Mask.causal", "KVCache.reorder", "nnx.MultiHeadAttention"}
    expected |= {"positions.Rotary", "interop.keras.from_keras_layer", "attention.merge"}
    assert expected | set(MORE) <= set(DOCS)
    exported = {n for n, x in vars(flax_mha).items() if callable(x)}
    assert exported <= set(DOCS)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_is_complete(name):
    assert violations(PUBLIC[name], DOCS) == []


@pytest.mark.parametrize("name", MORE)
def test_what_only_some_hold(name):
    assert [what for what in MORE[name] if lacks(DOCS[name], what)] == []


@pytest.mark.parametrize("name", [n for n, p in PUBLIC.items() if ">>>" in (p.value.__doc__ or "")])
def test_its_example_is_run_by_pytest(name):
    """pytest collects what doctest's finder finds in the module that defines the name."""
    function = PUBLIC[name].value
    module = importlib.import_module(function.__module__)
    found = doctest.DocTestFinder(exclude_empty=True).find(module)
    assert f"{module.__name__}.{function.__qualname__}" in {test.name for test in found}


@pytest.mark.parametrize("cls", [flax_mha.MultiHeadAttention, flax_mha.nnx.MultiHeadAttention])
def test_help_of_a_module_leads_to_its_fields_and_its_call(cls):
    text = pydoc.plain(pydoc.render_doc(cls))
    named = re.findall(r"help\((flax_mha[\w.]+)\)", text)
    assert set(named) == {"flax_mha.MultiHeadAttentionConfig", "flax_mha.multi_head_attention"}
    shown = "\n".join(pydoc.plain(pydoc.render_doc(pydoc.locate(name))) for name in named)
    arguments = {*inspect.signature(flax_mha.MultiHeadAttentionConfig).parameters}
    arguments |= {*inspect.signature(cls.__call__).parameters} - {"self", "training", "rngs"}
    assert [name for name in arguments if not re.search(rf"^ \|? +{name}: ", shown, re.M)] == []


# --- the rules bite -----------------------------------------------------------------------------


WHOLE = """One line.

Args:
    query: `[B, T, D]`.
    mask: booleans.

Returns:
    An array.

Raises:
    ValueError: never.

Example:
    >>> 1
    1
"""
GAPS = {
    "no docstring": ("", "first line"),
    "a first line that runs on": (WHOLE.replace("One line", "One\nline"), "first line"),
    "a parameter left out": (WHOLE.replace("    mask: booleans.\n", ""), "no mask in"),
    "a parameter misspelled": (WHOLE.replace("mask:", "masks:"), "masks in Args is no"),
    "no Returns": (WHOLE.replace("Returns:", "Gives:"), "no Returns"),
    "no Raises": (WHOLE.replace("Raises:", "Errors:"), "no Raises"),
    "no Example": (WHOLE.replace("Example:", "Sample:"), "no Example"),
    "an example that does not run": (WHOLE.replace(">>> 1", "f(x)"), "no Example"),
}


def described(doc):
    def function(query, *, mask=None): ...

    function.__doc__ = doc
    return Public("function", function)


def test_a_whole_docstring_passes():
    assert violations(described(WHOLE), {}) == []


@pytest.mark.parametrize("gap", GAPS)
def test_a_planted_gap_is_found(gap):
    doc, complaint = GAPS[gap]
    assert any(complaint in violation for violation in violations(described(doc), {}))


def test_a_method_without_an_example_or_its_parameter_is_found():
    class Shape:
        """A shape.

        Example:
            >>> shape.turn(1)
        """

        def turn(self, angle):
            """Turns it by `angle`."""

        def grow(self, factor):
            """Grows it."""

    turn, grow = (Public(f"Shape.{f.__name__}", f, Shape) for f in (Shape.turn, Shape.grow))
    assert violations(turn, {}) == []
    assert violations(grow, {}) == ["no Example", "no factor in Args"]


def test_borrowed_arguments_count():
    def call(query, key): ...

    call.__doc__ = "Calls.\n\nArgs: those of `f`, and\n    key: an array.\n"
    assert "no query in Args" in violations(Public("call", call), {"f": "F.\n"})
    lender = {"f": "F.\n\nArgs:\n    query: an array.\n    other: that `call` does not take.\n"}
    assert [v for v in violations(Public("call", call), lender) if "in Args" in v] == []


def test_an_equation_or_a_section_that_is_missing_is_found():
    assert lacks("Words alone.\n\nArgs:\n    x: y = 1.\n", "equation")
    assert not lacks("Words.\n\n    y = 2 x\n\nArgs:\n    x: a number.\n", "equation")
    assert lacks("One line.\n\nMemory grows.\n", "Memory")
    assert not lacks("One line. Memory: O(T).\n", "Memory")
    assert required(Public("f", lambda x: x)) == ["Args", "Returns", "Raises", "Example"]


# --- the README ---------------------------------------------------------------------------------


def dead_anchors(readme):
    """Links within the page that no heading answers."""
    headings = re.findall(r"^#+ (.*)$", readme, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return set(re.findall(r"\]\(#([^)]+)\)", readme)) - anchors


def test_the_readme_leads_where_it_says():
    readme = (ROOT / "README.md").read_text()
    assert dead_anchors(readme) == set()
    assert dead_anchors(readme.replace("## Contributing", "## Helping")) == {"contributing"}
    contents = re.search(r"\*\*Contents\*\*.*?\n\n", readme, flags=re.DOTALL)[0]
    assert contents.count("](#") == len(re.findall(r"^## ", readme, flags=re.MULTILINE))


def test_the_picture_is_small():
    picture = (ROOT / "notebooks" / "attention.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 60_000
