"""What a user may write for an initializer, a regularizer or a constraint, as one frozen object.

`resolve` reads Keras's names and config dicts, and objects of Keras or of this package; `serialize`
writes the dict that both `resolve` and Keras read. Keras is never imported.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, TypeAlias, TypeGuard

from flax_mha.core import checks
from flax_mha.core.frozen import Frozen, arguments
from flax_mha.keras import constraints, initializers, regularizers

Kind: TypeAlias = Literal["initializer", "regularizer", "constraint"]

BASES: dict[Kind, Any] = {
    "initializer": initializers.Initializer,
    "regularizer": regularizers.Regularizer,
    "constraint": constraints.Constraint,
}
_MODULES = {"initializer": initializers, "regularizer": regularizers, "constraint": constraints}
_SIGNATURES = {
    "initializer": "(key, shape, dtype) -> array",
    "regularizer": "(x) -> scalar",
    "constraint": "(w) -> w",
}

# Keras's names that are neither a class name nor its snake_case.
_ALIASES = {
    "zero": "Zeros",
    "one": "Ones",
    "normal": "RandomNormal",
    "uniform": "RandomUniform",
    "IdentityInitializer": "Identity",
    "OrthogonalInitializer": "Orthogonal",
    "l1_l2": "L1L2",
}
_STFT = ("STFT", "stft", "STFTInitializer")

# What Keras writes beside `class_name` and `config`; none of it is an argument of the object.
_KERAS_KEYS = ("module", "registered_name", "build_config", "compile_config", "shared_object_id")


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _classes(kind: Kind) -> dict[str, type[Frozen]]:
    """The concrete classes of a kind by their names."""
    return {cls.__name__: cls for cls in vars(_MODULES[kind]).values() if _is_concrete(kind, cls)}


def _is_concrete(kind: Kind, cls: Any) -> TypeGuard[type[Frozen]]:
    return inspect.isclass(cls) and issubclass(cls, BASES[kind]) and not inspect.isabstract(cls)


def _spellings(kind: Kind) -> dict[str, type[Frozen]]:
    classes = _classes(kind)
    aliases = {alias: classes[name] for alias, name in _ALIASES.items() if name in classes}
    return {**{_snake_case(name): cls for name, cls in classes.items()}, **classes, **aliases}


CLASSES: dict[Kind, dict[str, type[Frozen]]] = {kind: _classes(kind) for kind in BASES}
SPELLINGS: dict[Kind, dict[str, type[Frozen]]] = {kind: _spellings(kind) for kind in BASES}


def resolve(kind: Kind, identifier: Any) -> Callable[..., Any] | None:
    """The object that `identifier` names.

    Args:
        kind: "initializer", "regularizer" or "constraint".
        identifier: None; a name in any of Keras's spellings; a mapping `{"class_name": ...,
            "config": {...}}`; an object or a class of this package or of Keras; or a callable.

    Returns:
        A frozen object; a callable as it is; None for None.

    Raises:
        ValueError: an unknown name or argument, or a class that only its author's Keras knows.
        TypeError: anything else.

    Example:
        >>> resolve("initializer", "he_normal")
        HeNormal(seed=None, input_axes=None, output_axes=None)
        >>> resolve("regularizer", {"class_name": "L2", "config": {"l2": 0.5}})
        L2(l2=0.5)
    """
    if identifier is None or isinstance(identifier, BASES[kind]):
        return identifier
    if isinstance(identifier, str):
        return _build(kind, identifier, {})
    if isinstance(identifier, Mapping):
        return _from_mapping(kind, identifier)
    if inspect.isclass(identifier):
        return _from_class(kind, identifier)
    if hasattr(identifier, "get_config"):
        return _from_keras(kind, identifier)
    if not callable(identifier) or isinstance(identifier, Frozen):
        _refuse_type(kind, identifier)
    if getattr(identifier, "__hash__", None) is None:
        rule = f"A callable that is {_a(kind)} must be hashable, as the config that holds it is."
        checks.fail(TypeError, rule, repr(identifier), "Wrap it in a function.")
    return identifier


def serialize(obj: Any) -> dict[str, Any] | None:
    """The JSON-able dict from which `resolve`, and Keras's `get`, make an equal object.

    Args:
        obj: None, or an object of this package.

    Returns:
        None for None, else `{"class_name": ..., "config": {argument: value}}`.

    Raises:
        TypeError: `obj` is a plain callable, whose code JSON cannot hold.

    Example:
        >>> serialize(resolve("constraint", "max_norm"))
        {'class_name': 'MaxNorm', 'config': {'max_value': 2.0, 'axis': 0}}
    """
    if obj is None:
        return None
    if not any(type(obj) in classes.values() for classes in CLASSES.values()):
        rule = "Only None and the objects of flax_mha's initializers, regularizers and constraints"
        remedy = "Give a Keras name, a config dict or one of those objects instead."
        checks.fail(TypeError, f"{rule} can be written to JSON.", repr(obj), remedy)
    values = {name: getattr(obj, name) for name in arguments(type(obj))}
    config = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return {"class_name": type(obj).__name__, "config": config}


def _from_mapping(kind: Kind, mapping: Mapping[str, Any]) -> Any:
    what = f"A key of the {kind} dict"
    checks.known_names(what, mapping, ("class_name", "config", *_KERAS_KEYS))
    name, config = mapping.get("class_name"), mapping.get("config")
    rule = f'The {kind} dict must be {{"class_name": a name, "config": a dict of arguments}}.'
    if not isinstance(name, str):
        checks.fail(TypeError, rule, f"class_name={name!r}")
    registered_name = mapping.get("registered_name")
    module = mapping.get("module", "keras") if registered_name in (None, name) else None
    _check_origin(kind, name, module)
    if not isinstance(config, Mapping | None):
        checks.fail(TypeError, rule, f"config={config!r}")
    return _build(kind, name, config or {})


def _from_keras(kind: Kind, instance: Any) -> Any:
    name = type(instance).__name__
    _check_origin(kind, name, type(instance).__module__)
    # Keras's Identity leaves its gain out of get_config(): attributes stand in for what is missing.
    names = arguments(SPELLINGS[kind][name]) if name in SPELLINGS[kind] else ()
    attributes = {a: getattr(instance, a) for a in names if hasattr(instance, a)}
    return _build(kind, name, {**attributes, **instance.get_config()})


def _from_class(kind: Kind, cls: type) -> Any:
    """Keras makes an object of a class by calling it without arguments."""
    if _is_concrete(kind, cls):
        return cls()
    if not hasattr(cls, "get_config"):
        _refuse_type(kind, cls)
    _check_origin(kind, cls.__name__, cls.__module__)
    return _build(kind, cls.__name__, {})


def _build(kind: Kind, name: str, config: Mapping[str, Any]) -> Any:
    cls = SPELLINGS[kind].get(name)
    if cls is None:
        _refuse_name(kind, name)
    checks.known_names(f"An argument of {cls.__name__}", config, arguments(cls))
    return cls(**config)


# --- refusals -----------------------------------------------------------------------------------


def _check_origin(kind: Kind, name: str, module: str | None) -> None:
    """A class of the user's own may bear the name of a built-in one."""
    if module is None or module.partition(".")[0] != "keras":
        rule = f"Of Keras's {kind}s only the built-in ones are known here."
        remedy = f"Pass a callable {_SIGNATURES[kind]} that does the same."
        checks.fail(ValueError, rule, f"the custom class {name!r}", remedy)


def _refuse_name(kind: Kind, name: str) -> NoReturn:
    if kind == "initializer" and name in _STFT:
        rule = f"The initializer {name!r} makes kernels of Fourier transforms, not of attention."
        checks.fail(ValueError, rule, repr(name), f"Use one of {_names(kind)}.")
    others = [f", which is {_a(other)}" for other in BASES if name in SPELLINGS[other]]
    # In lower case, for difflib finds "GLOROT_UNIFORM" and "glorot_uniform" unlike.
    close = difflib.get_close_matches(_snake_case(name), _names(kind), n=1)
    hint = f"Did you mean {close[0]!r}?" if close else ""
    rule = f"The name of {_a(kind)} must be among {_names(kind)}."
    checks.fail(ValueError, rule, repr(name) + "".join(others), hint)


def _names(kind: Kind) -> list[str]:
    return [_snake_case(name) for name in CLASSES[kind]]


def _a(kind: Kind) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _refuse_type(kind: Kind, identifier: Any) -> NoReturn:
    rule = f"{_a(kind).capitalize()} must be None, a Keras name, a config dict"
    rule = f"{rule}, an object of flax_mha.keras.{kind}s, or a callable {_SIGNATURES[kind]}."
    checks.fail(TypeError, rule, f"{identifier!r} of type {type(identifier).__name__}")
