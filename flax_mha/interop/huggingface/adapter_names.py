"""Modules' paths in PEFT's files: those of the model that it wraps, not those of its checkpoint."""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from flax_mha.core import checks
from flax_mha.interop.huggingface.adapter_fields import is_among

PREFIX = "base_model.model."
_LONGEST = 300  # characters: patterns are run on them
_HEADS = tuple((rf"\.attention\.{name}$", f".{name[0]}_proj") for name in ("query", "key", "value"))
_OUTPUT = (r"\.output\.dense$", ".o_proj")
_TOWERS = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
)
# What transformers 5 calls modules whose arrays its files name as ever, by `model_type`.
_RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "vit": (*_HEADS, _OUTPUT, (r"(^|\.)encoder\.layer\.", r"\1layers.")),
    "beit": (*_HEADS, _OUTPUT, (r"(^|\.)encoder\.layer\.", r"\1layers.")),
    "dinov2": (*_HEADS, _OUTPUT),
    "swin": (
        *((pattern.replace("attention", "self"), new) for pattern, new in _HEADS),
        _OUTPUT,
    ),
    "dinov3_vit": ((r"^(?:model\.)?layer\.", "model.layer."),),
    "qwen2_vl": (
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
    ),
    "llava": _TOWERS,
    "gemma3": _TOWERS,
}


class Names(NamedTuple):
    """What a file of adapters holds.

    Attributes:
        pairs: the arrays {"A": name, "B": name} of each module.
        others: arrays of another kind, each with its path below the prefix.
    """

    pairs: dict[str, dict[str, str]]
    others: dict[str, str]


def renamed(module: str, model_type: str) -> str:
    """The path that the newest transformers gives a module of a checkpoint."""
    for pattern, new in _RENAMED.get(model_type, ()):
        module = re.sub(pattern, new, module)
    return module


def parse(names: Iterable[str]) -> Names:
    """The arrays by modules; a pair is whole."""
    found = Names({}, {})
    for name in names:
        if len(name) > _LONGEST:
            rule = f"The names of arrays must have at most {_LONGEST} characters."
            checks.fail(ValueError, rule, f"{name[:80]!r}..., {len(name)} characters")
        if not name.startswith(PREFIX):
            rule = f"The arrays of an adapter must be named {PREFIX}MODULE.lora_A.weight and so on."
            checks.fail(ValueError, rule, repr(name[:200]), "Was it saved by `save_pretrained`?")
        below = name.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", below)
        if match is None:
            found.others[name] = below
        else:
            found.pairs.setdefault(match[1], {})[match[2]] = name
    return found


def expect_pairs(pairs: Mapping[str, Mapping[str, str]]) -> None:
    for module, sides in pairs.items():
        if len(sides) < 2:
            rule = "An adapter must have both lora_A and lora_B."
            checks.fail(ValueError, rule, f"only {list(sides.values())} of {module!r}")


def placed(modules: Sequence[str], known: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The checkpoint's path of each module that is one of attention.

    Args:
        modules: paths in the adapter's file.
        known: the checkpoint's paths, each with the spellings it may have.

    A model that holds the checkpoint's, or that it holds, has one prefix more, or one fewer: the
    same for all.
    """
    ends: dict[str, set[tuple[str, str]]] = {}
    whole = {spelled: path for path, spellings in known.items() for spelled in spellings}
    for spelled, path in whole.items():
        for end in _ends(spelled):
            ends.setdefault(end, set()).add((spelled, path))
    found, steps = {}, {}
    for module in modules:
        options = _options(module, whole, ends)
        if len({path for _, path in options}) > 1:
            rule = f"The path {module!r} must be that of one module of `like`."
            paths = sorted(path for _, path in options)
            checks.fail(ValueError, rule, f"it may be any of {paths[:4]}")
        for spelled, path in options:
            found[module] = path
            steps[_step(module, spelled)] = module
    _one_step(steps)
    _once(found)
    return found


def _options(
    module: str, whole: Mapping[str, str], ends: Mapping[str, set[tuple[str, str]]]
) -> set[tuple[str, str]]:
    """The module itself; or one whose path ends in this one, or is an end of this one."""
    if module in whole:
        return {(module, whole[module])}
    longer = ends.get(module, set())
    shorter = {(end, whole[end]) for end in _ends(module) if end in whole}
    return longer | shorter


def _ends(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _step(module: str, spelled: str) -> tuple[str, str]:
    """What each path has before the other, of which one is an end of the other."""
    more, fewer = (len(x) - len(y) for x, y in ((module, spelled), (spelled, module)))
    return module[: max(more, 0)], spelled[: max(fewer, 0)]


def _one_step(steps: Mapping[tuple[str, str], str]) -> None:
    if len(steps) > 1:
        rule = "The paths of an adapter must differ from those of `like` by one prefix."
        evidence = ", ".join(f"{more!r} for {less!r} at {x!r}" for (more, less), x in steps.items())
        checks.fail(ValueError, rule, evidence[:400], "Is it an adapter of this model?")


def _once(found: Mapping[str, str]) -> None:
    before: dict[str, str] = {}
    for module, path in found.items():
        if path in before:
            rule = f"The module {path!r} of `like` must have one adapter."
            checks.fail(ValueError, rule, f"{before[path]!r} and {module!r}")
        before[path] = module


def expect_known(
    names: Names, found: Mapping[str, str], layers: Iterable[str], ignore_modules: Sequence[str]
) -> None:
    """What is no attention is left out where the caller says so, and attention never."""
    attention = {*layers, *(module.rpartition(".")[0] for module in found)}
    for path in (*names.pairs, *names.others.values()):
        is_ignored, is_attention = is_among(path, ignore_modules), _is_within(path, attention)
        if is_ignored and is_attention:
            rule = "`ignore_modules` is of modules that are no attention."
            checks.fail(ValueError, rule, f"{path!r}, which {list(ignore_modules)} would leave out")
        if not is_ignored and path not in found:
            _refuse(path, is_attention)


def _is_within(path: str, modules: Collection[str]) -> bool:
    """Whether some parts of the path, one behind the other, are one of the modules."""
    parts = path.split(".")
    spans = itertools.combinations(range(len(parts) + 1), 2)
    return any(".".join(parts[start:stop]) in modules for start, stop in spans)


_KINDS = {
    "lora_magnitude_vector": "the lengths of DoRA",
    "lora_B.bias": "the bias of an adapter (`lora_bias`)",
    "lora_embedding_A": "an adapter of a table",
    "lora_embedding_B": "an adapter of a table",
    "token_adapter": "rows of a table (`trainable_token_indices`)",
}


def _refuse(path: str, is_attention: bool) -> None:
    kinds = (kind for end, kind in _KINDS.items() if f".{end}." in f".{path}.")
    kind = next(kinds, "an adapter, or an array that was trained whole (`modules_to_save`, `bias`)")
    if is_attention:
        rule = "The arrays of an attention layer must be lora_A and lora_B of its Linears."
        remedy = "Merge it in PEFT (`merge_and_unload`), and load that model by `load_attention`."
        checks.fail(ValueError, rule, f"{path!r}, {kind}", remedy)
    rule = "The adapter must be one of attention layers of `like`: what else it changes is lost."
    part = next((x for x in reversed(path.split(".")) if x in _COMMON), path.split(".")[-1])
    remedy = (
        f"Is `like` its base? To go without what is no attention, say so: "
        f"`ignore_modules=[{part!r}]`."
    )
    checks.fail(ValueError, rule, f"{path!r}, {kind}", remedy)


_COMMON = ("mlp", "experts", "lm_head", "embed_tokens", "score", "classifier", "linear_attn")
