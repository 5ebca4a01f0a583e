"""What the docstring of a public name must hold, checked from its text and its signature.

    every name   a first line that is a sentence
    function     Args, Returns, Raises, Example
    class        Args or Attributes, Example
    method       its parameters, in Args or in backticks, and a place in an example: its own or the
                 class's

Args name every parameter and nothing else; "Args: those of `f`" takes over those of another name.
"""

import ast
import importlib
import inspect
import re
from typing import Any, NamedTuple

from flax import linen, nnx

from flax_mha import __main__ as overview

FROM_FLAX = {"parent", "name"}  # fields of every linen module
HEADING = re.compile(
    r"^(Args|Attributes|Returns|Raises|Memory|Differs from|Reference|Example)\b[^:]*:"
)
ENTRY = re.compile(r"^    (\*{0,2}\w+): ")
BORROWED = re.compile(r"^(?:Args: those of|See) `([\w.]+)`", flags=re.MULTILINE)


class Public(NamedTuple):
    """A public name and what it stands for; `owner` is the class of a method."""

    name: str
    value: Any
    owner: Any = None

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.value) or ""


def public_names() -> list[Public]:
    """The functions and classes that users import, once each, and the classes' methods."""
    found: dict[int, Public] = {}
    for module in ("flax_mha", *overview.submodules()):
        for name, value in offered(module).items():
            found.setdefault(id(value), Public(f"{module}.{name}", value))
    methods = [method for public in found.values() for method in methods_of(public)]
    return [*found.values(), *methods]


def offered(module: str) -> dict[str, Any]:
    """The functions and classes that a file defines, or imports as themselves for others."""
    scope = importlib.import_module(module)
    names = []
    for node in ast.parse(inspect.getsource(scope)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.asname == alias.name]
    values = {name: getattr(scope, name) for name in names if not name.startswith("_")}
    return {n: x for n, x in values.items() if inspect.isclass(x) or inspect.isroutine(x)}


def methods_of(public: Public) -> list[Public]:
    if not inspect.isclass(public.value):
        return []
    is_module = issubclass(public.value, linen.Module | nnx.Module)
    methods = []
    for name, value in vars(public.value).items():
        value = value.__func__ if isinstance(value, classmethod) else value
        is_own = inspect.isfunction(value) or isinstance(value, property)
        if is_own and (not name.startswith("_") or (is_module and name == "__call__")):
            methods.append(Public(f"{public.name}.{name}", value, public.value))
    return methods


# --- the rules ----------------------------------------------------------------------------------


def violations(public: Public, others: dict[str, str]) -> list[str]:
    """What is wrong with one docstring; `others` are those that it may borrow from, by name."""
    found = sections(public.doc)
    missing = [f"no {name}" for name in required(public) if name not in found]
    return [*first_line_violations(public.doc), *missing, *args_violations(public, others)]


def first_line_violations(doc: str) -> list[str]:
    first, *rest = doc.split("\n") if doc else [""]
    if not first.endswith((".", ":", ",")) or (rest and rest[0]):
        return ["the first line is no sentence of its own"]
    return []


def required(public: Public) -> list[str]:
    """The sections that a docstring of this kind has."""
    if inspect.isabstract(public.value):
        return []
    if public.owner is not None:
        return [] if is_in_example(public) else ["Example"]
    if not inspect.isclass(public.value):
        returns = inspect.signature(public.value).return_annotation is not None
        return ["Args", *(["Returns"] if returns else []), "Raises", "Example"]
    return ["Example"]


def is_in_example(method: Public) -> bool:
    """Whether its name stands in code that a doctest runs."""
    name = method.name.rpartition(".")[2]
    docs = (method.doc, inspect.getdoc(method.owner) or "")
    code = "\n".join(re.findall(r"^ *(?:>>>|\.\.\.) .*$", "\n".join(docs), flags=re.MULTILINE))
    return name == "__call__" or re.search(rf"\.{name}\b", code) is not None


def args_violations(public: Public, others: dict[str, str]) -> list[str]:
    """Args against the signature."""
    if isinstance(public.value, property) or inspect.isabstract(public.value):
        return []
    actual, own = parameters(public.value), arguments(public.doc)
    borrowed = [name for other in BORROWED.findall(public.doc) for name in arguments(others[other])]
    named = {*own, *borrowed, *(in_backticks(public.doc) if public.owner is not None else [])}
    unknown = [f"{name} in Args is no parameter" for name in own if name not in actual]
    missing = [name for name in actual if not {name, name.strip("*")} & named]
    return unknown + [f"no {name} in Args" for name in missing]


def parameters(value: Any) -> list[str]:
    """The names of a signature, with their stars."""
    # nnx's metaclass hides the signature of a module's constructor.
    hidden = inspect.isclass(value) and issubclass(value, nnx.Module)
    found = inspect.signature(value.__init__ if hidden else value).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    is_linen = inspect.isclass(value) and issubclass(value, linen.Module)
    skipped = {"self", "cls"} | (FROM_FLAX if is_linen else set())
    return [stars.get(p.kind, "") + p.name for p in found if p.name not in skipped]


def arguments(doc: str) -> list[str]:
    """The names that Args, or Attributes, explain."""
    found = sections(doc)
    lines = found.get("Args", found.get("Attributes", []))
    return [match[1] for line in lines if (match := ENTRY.match(line))]


def in_backticks(doc: str) -> list[str]:
    return re.findall(r"`(\w+)", doc)


def sections(doc: str) -> dict[str, list[str]]:
    """The lines of each section by its heading; those before the first heading under ""."""
    found: dict[str, list[str]] = {"": []}
    heading = ""
    for line in doc.split("\n"):
        if match := HEADING.match(line):
            heading = match[1]
        found.setdefault(heading, []).append(line)
    if "Example" in found and not any(">>>" in line for line in found["Example"]):
        del found["Example"]
    return found
