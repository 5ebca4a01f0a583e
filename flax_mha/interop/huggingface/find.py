"""The attention layers of a folder: which there are, each with its config and its arrays' names."""

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.interop.huggingface.families import FAMILIES, UNSAYABLE
from flax_mha.interop.huggingface.family import COMMON, OFF, Family, Index, Stack, Tower
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.huggingface.folder import Folder
from flax_mha.interop.torch.models import Layout

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MOST = 10_000  # layers; a larger number is no model's
# Layers that predict tokens further ahead, beside the model's own.
_BESIDE = ("mtp.",)


class Found(NamedTuple):
    """One layer: its module's path, and what it takes to read and to write it.

    `sources` has the array of the file for each name below the module's path; `features` is D.
    """

    name: str
    config: MultiHeadAttentionConfig
    layout: Layout
    call: dict[str, Any]
    sources: dict[str, str]
    features: int
    remark: str


class Contents(NamedTuple):
    """The layers that can be read; and modules that stand beside them, with the reason."""

    layers: list[Found]
    left_out: dict[str, str]


class _Place(NamedTuple):
    """A module that holds attention: its path, and its arrays."""

    path: str
    sources: dict[str, str]


def find(folder: Folder, max_length: int | None, ignore: Sequence[str]) -> Contents:
    """Every attention layer of the folder; a field that is set and not understood is refused."""
    if max_length is not None:
        checks.integer("max_length", max_length, minimum=1)
    ignore = checks.names("ignore", ignore)
    _refuse_quantised(folder.fields, ignore)
    family = _family(folder.fields.get("model_type"), "model_type")
    fields = Fields(folder.fields, family.defaults, family.names, "", max_length, ignore)
    return _family_layers(folder, family, fields, None)


def _family_layers(folder: Folder, family: Family, fields: Fields, prefix: str | None) -> Contents:
    found = Contents([], {})
    for stack in family.stacks:
        _add(found, _stack_layers(folder, stack, fields, prefix, len(family.stacks) > 1))
    for tower in family.towers:
        is_there = fields.has(tower.field) or tower.or_all
        if is_there and not fields.is_ignored(tower.field):
            _add(found, _tower_layers(folder, family, tower, fields))
    _refuse_unread(family, fields)
    if not found.layers:
        rule = f"The folder must hold attention layers of {'/'.join(family.types)}."
        checks.fail(ValueError, rule, _some(folder))
    return found


def _some(folder: Folder) -> str:
    """Some names of a folder's arrays, however long they are."""
    return f"names such as {[name[:80] for name in sorted(folder.headers)[:4]]}"


def _tower_layers(folder: Folder, whole: Family, tower: Tower, fields: Fields) -> Contents:
    inner = fields.inner(tower.field)
    model_type = inner.values.get("model_type") or tower.model_type
    if model_type == fields.values.get("model_type"):  # the whole's own, in older files
        model_type = tower.model_type
    if tower.or_all and not fields.has(tower.field):
        inner = _beside_the_towers(whole, fields)
        model_type = tower.model_type
    family = _family(model_type, f"{inner.path}model_type", inner)
    inner.defaults, inner.names = family.defaults, family.names
    found = _family_layers(folder, family, inner, tower.prefix)
    remarked = [x._replace(remark=x.remark or tower.remark) for x in found.layers]
    return found._replace(layers=remarked)


def _beside_the_towers(whole: Family, fields: Fields) -> Fields:
    """A tower's fields where they stand beside the others' objects: all, but those objects."""
    towers = {tower.field for tower in whole.towers}
    own = {name: value for name, value in fields.values.items() if name not in towers}
    fields.seen |= set(own)  # the tower's row answers for them
    return Fields(own, None, None, fields.path, fields.max_length, fields.ignore)


def _add(found: Contents, more: Contents) -> None:
    found.layers.extend(more.layers)
    found.left_out.update(more.left_out)


# --- the family and its fields ------------------------------------------------------------------


def _family(model_type: Any, field: str, tower: Fields | None = None) -> Family:
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and model_type in UNSAYABLE:
        rule = f"Attention of model type {model_type!r} cannot be loaded: {UNSAYABLE[model_type]}."
        checks.fail(ValueError, rule, f"`{field}`: {model_type!r}")
    close = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    beside = ""
    if tower is not None:
        beside = f"To go without it: `ignore=[{tower.path.rstrip('.')!r}]`. "
    rule = f"config.json's `{field}` must be among {sorted(FAMILIES)}."
    remedy = (
        f"{hint}{beside}For another model: `flax_mha.interop.torch.from_linear_layers`, with a "
        "config written by hand."
    )
    checks.fail(ValueError, rule, repr(model_type), remedy)


def _refuse_quantised(fields: Mapping[str, Any], ignore: Sequence[str]) -> None:
    for name in ("quantization_config", "compression_config"):
        if fields.get(name) is not None and name not in ignore:
            rule = f"Weights must be floats: config.json has a `{name}`."
            remedy = (
                "Take the original checkpoint, or dequantise it first. Where attention itself is "
                f"not quantised, as in gpt-oss: `ignore=[{name!r}]`."
            )
            checks.fail(ValueError, rule, f"{str(fields[name])[:80]}", remedy)


def _refuse_unread(family: Family, fields: Fields) -> None:
    """What is set in config.json was read by the row, or concerns no attention."""
    for name, reason in family.refused.items():
        if fields.get(name) not in (None, False, 0, [], {}) and not fields.is_ignored(name):
            fields.refuse(name, reason)
    known = COMMON | family.ignored
    known |= {name for name in OFF if not fields.values.get(name)}
    unread = [name for name in fields.unread() if name not in known]
    unknown = [name for name in unread if not fields.is_ignored(name)]
    if unknown:
        spelled = [f"{fields.path}{name}" for name in unknown]
        rule = f"config.json has fields that are not known for {'/'.join(family.types)}."
        evidence = ", ".join(
            f"`{x}`: {str(fields.values[y])[:40]}" for x, y in zip(spelled, unknown)
        )
        remedy = f"What changes no attention layer can be passed over: `ignore={spelled}`."
        checks.fail(ValueError, rule, evidence, remedy)


# --- layers -------------------------------------------------------------------------------------


def _stack_layers(
    folder: Folder, stack: Stack, fields: Fields, prefix: str | None, is_optional: bool
) -> Contents:
    """The layers of a stack, each expected one there; or none, as of an encoder saved alone."""
    before, there = _places(folder, stack.path, prefix)
    layers: list[Found] = []
    left_out: dict[str, str] = {}
    if is_optional and not there:
        for at in itertools.islice(_indices(stack, fields), 1):
            _arguments(stack, fields, at)  # its fields are understood nonetheless
        return Contents([], {stack.path: "none of its arrays is in the folder"})
    for at in _indices(stack, fields):
        place = there.pop(at, None)
        reason = None if stack.left_out is None else stack.left_out(fields, at)
        if reason is not None:
            left_out[before + stack.path.format(*at)] = reason
        elif place is None:
            _missing(folder, stack, before, at)
        else:
            layers.append(_layer(folder, stack, fields, at, place))
    for place in there.values():
        left_out[place.path] = "beyond the layers that config.json says"
    return Contents(_with_shared(stack, layers), left_out)


def _indices(stack: Stack, fields: Fields) -> Iterator[Index] | list[Index]:
    if callable(stack.layers):
        return stack.layers(fields)
    number = fields.size(stack.layers)
    if number > _MOST:
        fields.fail(stack.layers, f"at most {_MOST}", number)
    return ((layer,) for layer in range(number))


def _places(folder: Folder, path: str, prefix: str | None) -> tuple[str, dict[Index, _Place]]:
    """The modules at such a path, by their numbers; and the one prefix under which all stand."""
    ending = re.escape(path).replace(r"\{\}", r"(\d+)")
    pattern = re.compile(rf"((?:[^.]+\.)*?)({ending})\.(.+)")
    found: dict[str, dict[Index, _Place]] = {}
    for name in folder.headers:
        match = pattern.fullmatch(name)
        if match is None or not _belongs(match[1], prefix):
            continue
        numbers, rest = match.groups()[2:-1], match.groups()[-1]
        place = _Place(match[1] + match[2], {})
        modules = found.setdefault(match[1], {})
        modules.setdefault(tuple(map(int, numbers)), place).sources[rest] = name
    if len(found) > 1:
        rule = f"One model's layers `{path}` must stand in the folder."
        checks.fail(ValueError, rule, f"such under each of {sorted(found)[:6]}")
    return next(iter(found.items()), ("", {}))


def _belongs(before: str, prefix: str | None) -> bool:
    if prefix is None:
        return not before.startswith(_BESIDE)
    return re.fullmatch(prefix, before) is not None


def _missing(folder: Folder, stack: Stack, before: str, at: Index) -> NoReturn:
    rule = f"The folder must hold the arrays of `{before}{stack.path.format(*at)}`."
    remedy = "Is a file missing, or does config.json say too many layers?"
    checks.fail(ValueError, rule, _some(folder), remedy)


def _layer(folder: Folder, stack: Stack, fields: Fields, at: Index, place: _Place) -> Found:
    arguments = {**_arguments(stack, fields, at), "param_dtype": _dtype(folder, place)}
    layout = stack.layout(fields, at) if callable(stack.layout) else stack.layout
    call = stack.call(fields, at) if callable(stack.call) else stack.call
    config = MultiHeadAttentionConfig(**arguments)
    D = stack.features(fields, at) if callable(stack.features) else fields.size(stack.features)
    own = place.sources
    same = {} if stack.aliases is None else stack.aliases(fields, at)
    sources = {**own, **{name: own[other] for name, other in same.items() if other in own}}
    return Found(place.path, config, layout, dict(call), sources, D, stack.remark)


def _arguments(stack: Stack, fields: Fields, at: Index) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for reader in stack.readers:
        arguments |= reader(fields, at)
    return arguments


def _dtype(folder: Folder, place: _Place) -> str:
    """The dtype of a layer's largest array, a kernel."""
    largest = max(place.sources.values(), key=lambda name: _size(folder.headers[name].shape))
    dtype = folder.headers[largest].dtype
    if dtype not in _DTYPES:
        rule = f"`{largest}` must have one of the dtypes {list(_DTYPES)}."
        checks.fail(TypeError, rule, f"dtype {dtype}", "Dequantise the weights first.")
    return _DTYPES[dtype]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _with_shared(stack: Stack, layers: list[Found]) -> list[Found]:
    """Each layer with the arrays that the first one's module holds for all."""
    if not layers:
        return layers
    first = layers[0].sources
    shared = {name: first[name] for name in stack.shared if name in first}
    return [layer._replace(sources={**shared, **layer.sources}) for layer in layers]
