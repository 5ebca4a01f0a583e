"""One array's axes and the rules for them become one `PartitionSpec`, or an error."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn

from jax.sharding import PartitionSpec

from flax_mha.core import checks
from flax_mha.core.typing import HeadDims
from flax_mha.sharding.rules import AXIS_NAMES, Axes, Rules


class Axis(NamedTuple):
    """One axis of an array; the letter is empty where no rule can name it."""

    letter: str
    size: int


def check_mesh_axes(rules: Rules, mesh: Mapping[str, int] | None) -> None:
    """Every mesh axis that a rule for a parameter names exists."""
    for key, axes in rules:
        for axis in _names(axes) if _is_known(key) else ():
            if mesh is not None and axis not in mesh:
                rule = f"The rule for {key!r} must name axes of the mesh, {list(mesh)}."
                checks.fail(ValueError, rule, f"{axis!r}", "A mesh comes from `jax.make_mesh`.")


def with_kv_heads(rules: Rules, dims: HeadDims, mesh: Mapping[str, int] | None) -> Rules:
    """N's rules serve K where it has none, as far as they divide it; unknown sizes only for K = N.

    Grouped heads may be fewer than the devices: then those of key and value stay whole.
    """
    if any(is_rule_for(key, "K") for key, _ in rules):
        return rules
    pairs: list[tuple[str, Axes]] = []
    for key, axes in rules:  # K's behind N's, for the order of rules decides
        pairs.append((key, axes))
        if is_rule_for(key, "N") and _follows(axes, dims, mesh):
            pairs.append(("K", axes))
    return tuple(pairs)


def _follows(axes: Axes, dims: HeadDims, mesh: Mapping[str, int] | None) -> bool:
    return dims.K == dims.N if mesh is None else dims.K % _devices(axes, mesh) == 0


def resolve(
    where: str, axes: Sequence[Axis], rules: Rules, mesh: Mapping[str, int] | None
) -> PartitionSpec:
    """The spec of an array: in the order of the rules, each axis gets its first free mesh axes."""
    entries: dict[int, Axes] = {}
    refused: dict[int, Axes] = {}
    for key, value in rules:
        for place, axis in enumerate(axes):
            if is_rule_for(key, axis.letter) and place not in entries:
                (entries if _is_free(value, entries.values()) else refused)[place] = value
    for place, value in refused.items():
        if place not in entries:
            _twice(where, axes, place, value)
    for place, value in entries.items():
        _divides(where, axes, axes[place], value, mesh)
    return PartitionSpec(*(entries.get(place) for place in range(len(axes))))


def is_rule_for(key: str, letter: str) -> bool:
    return letter in AXIS_NAMES and key in (letter, AXIS_NAMES[letter])


def _is_known(key: str) -> bool:
    return any(is_rule_for(key, letter) for letter in AXIS_NAMES)


def _is_free(value: Axes, others: Iterable[Axes]) -> bool:
    """Whether no mesh axis of `value` stands in it twice, or in another entry of the spec."""
    used = [name for entry in others for name in _names(entry)]
    names = _names(value)
    return len(set(names)) == len(names) and not set(names) & set(used)


def _twice(where: str, axes: Sequence[Axis], place: int, value: Axes) -> NoReturn:
    rule = f"A mesh axis can shard one axis of {where} {_letters(axes)}, not two."
    letter = axes[place].letter
    evidence = f"{value!r} for {letter}, which is taken"
    remedy = f"Give {letter} a mesh axis of its own, or None: a letter goes before a name."
    checks.fail(ValueError, rule, evidence, remedy)


def _divides(
    where: str, axes: Sequence[Axis], axis: Axis, value: Axes, mesh: Mapping[str, int] | None
) -> None:
    """The mesh axes divide the size, where there is a mesh to ask."""
    devices = 1 if mesh is None else _devices(value, mesh)
    if axis.size % devices:
        rule = f"The mesh axis {value!r} must divide {axis.letter} of {where} {_letters(axes)}."
        evidence = f"{axis.letter} = {axis.size}, {value!r} of size {devices}"
        remedy = "Leave K without a rule: it follows N where it can." if axis.letter == "K" else ""
        checks.fail(ValueError, rule, evidence, remedy or "A rule of None keeps the axis whole.")


def _devices(axes: Axes, mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[name] for name in _names(axes))


def _letters(axes: Sequence[Axis]) -> str:
    return f"[{', '.join(axis.letter or 'E' for axis in axes)}]"


def _names(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()
