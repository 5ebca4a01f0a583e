"""adapter_config.json: each field is read, known to be harmless, or refused by name."""

import difflib
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeVar

from flax_mha.core import checks
from flax_mha.interop.huggingface.family import fields_set
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.huggingface.folder import read_json

CONFIG = "adapter_config.json"
_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")
# What says where adapters came from or how they were trained: their arrays say what there is.
_HARMLESS = fields_set(
    """
    auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules
    fan_in_fan_out inference_mode layers_pattern layers_to_transform lora_dropout megatron_core
    bias modules_to_save peft_version qalora_group_size revision runtime_config task_type
    trainable_token_indices loftq_config corda_config lora_ga_config
    """
)
_MERGE = "Merge it in PEFT (`merge_and_unload`), and load that model by `load_attention`."
_REFUSED = {
    "use_dora": "DoRA divides each output by a norm of the adapted kernel",
    "use_qalora": "QALoRA pools what an adapter reads",
    "use_bdlora": "its arrays are blocks of a larger one",
    "lora_bias": "its adapters add a bias",
    "layer_replication": "layers stand in the model several times",
    "megatron_config": "its layers are cut over devices",
    "alora_invocation_tokens": "it is added to some tokens alone",
    "arrow_config": "it chooses among several adapters, token by token",
    "kasa_config": "it changes the base's kernels",
    "monteclora_config": "its adapters are drawn at random",
}
# Those that leave the base's kernels as they are; True is PEFT's own.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_MOST, _FEW = 10_000, 100  # patterns, and those that repeat something


T = TypeVar("T")
Patterns: TypeAlias = list[tuple[re.Pattern[str], T]]


class AdapterFields(Fields):
    """Its errors name the file; otherwise as config.json's."""

    def fail(self, name: str, kind: str, value: Any) -> NoReturn:
        checks.fail(ValueError, f"{CONFIG}'s `{name}` must be {kind}.", _shown(value))

    def refuse(self, name: str, reason: str, value: Any = None) -> NoReturn:
        rule = f"{CONFIG}'s `{name}` is not supported: {reason}."
        checks.fail(ValueError, rule, _shown(self.get(name) if value is None else value), _MERGE)


class Ranks(NamedTuple):
    """The rank and the scale of each module's adapter.

    Attributes:
        rank, alpha: of all modules that no pattern names.
        ranks, alphas: of those that one does, the first that fits.
        by_root: whether the scale is alpha / sqrt(rank), not alpha / rank.
        targets: ends of modules' paths, or None where a pattern tells them.
    """

    rank: int
    alpha: float
    ranks: Patterns[int]
    alphas: Patterns[float]
    by_root: bool
    targets: list[str] | None

    def of(self, module: str) -> tuple[int, float]:
        """(rank, scale) of a module, by its path in the model that PEFT wraps."""
        rank = _of_first(self.ranks, module, self.rank)
        alpha = _of_first(self.alphas, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.by_root else rank)


def read_fields(path: pathlib.Path, ignore_modules: Sequence[str]) -> Ranks:
    """What the file says of ranks and scales; what changes the numbers otherwise is refused."""
    fields = AdapterFields(read_json(path, CONFIG), {"r": 8, "lora_alpha": 8})
    if fields.get("peft_type") != "LORA":
        kinds = f"only LoRA's is known, `{_shown('LORA')}`"
        fields.refuse("peft_type", kinds, str(fields.get("peft_type")))
    for name, reason in _REFUSED.items():
        if fields.get(name) not in _EMPTY:
            fields.refuse(name, reason)
    _check_start(fields)
    _check_parameters(fields, ignore_modules)
    rank, ranks = fields.size("r"), _patterns(fields, "rank_pattern", AdapterFields.size)
    alphas = _patterns(fields, "alpha_pattern", AdapterFields.number)
    alpha, by_root = fields.number("lora_alpha"), fields.flag("use_rslora")
    targets = fields.get("target_modules")
    targets = targets if isinstance(targets, list) else None
    for name in fields.unread():
        if name not in _HARMLESS and fields.values[name] not in _EMPTY:
            fields.refuse(name, "it is not known here", fields.values[name])
    return Ranks(rank, alpha, ranks, alphas, by_root, targets)


def written(
    places: Mapping[str, tuple[int, float]], fan_in_fan_out: bool, base: Any
) -> dict[str, Any]:
    """The file of adapters of these (rank, scale), by the modules' paths."""
    ranks = {module: rank for module, (rank, _) in places.items()}
    alphas = {module: _alpha(rank, scale) for module, (rank, scale) in places.items()}
    # The longest first: a pattern fits every path that ends in it.
    order = sorted(places, key=len, reverse=True)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "inference_mode": True,
        "r": ranks[order[0]],
        "lora_alpha": alphas[order[0]],
        "rank_pattern": _if_they_differ(ranks, order),
        "alpha_pattern": _if_they_differ(alphas, order),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "target_modules": sorted(places),
    }


def is_among(module: str, names: Iterable[str]) -> bool:
    """Whether one of the names is some parts of a path: "mlp" of "layers.0.mlp.up_proj"."""
    return any(f".{name}." in f".{module}." for name in names)


# --- in -----------------------------------------------------------------------------------------


def _check_start(fields: AdapterFields) -> None:
    """How training began matters where it took a part out of the base's kernels."""
    start = fields.get("init_lora_weights")
    if not any(start is x or (isinstance(x, str) and start == x) for x in _STARTS):
        reason = "training began from other kernels than the base's, which the file has not"
        rule = f"{CONFIG}'s `init_lora_weights` is not supported: {reason}."
        remedy = (
            "PEFT's `save_pretrained(..., path_initial_model_for_weight_conversion=)` writes it as "
            "an adapter of the base itself."
        )
        checks.fail(ValueError, rule, _shown(start), remedy)


def _check_parameters(fields: AdapterFields, ignore_modules: Sequence[str]) -> None:
    names = fields.entries("target_parameters") or []
    if left := [x for x in names if not (isinstance(x, str) and is_among(x, ignore_modules))]:
        reason = "adapters of single arrays are those of experts, not of attention"
        rule = f"{CONFIG}'s `target_parameters` is not supported: {reason}."
        remedy = 'To go without them, name their module: `ignore_modules=["experts"]`.'
        checks.fail(ValueError, rule, _shown(left), remedy)


def _patterns(
    fields: AdapterFields, name: str, read: Callable[[AdapterFields, str], T]
) -> Patterns[T]:
    """Values by patterns of paths: of a whole path, or of its end behind a dot."""
    values = AdapterFields(fields.inner(name).values)
    patterns = [*values.values]
    repeating = [pattern for pattern in patterns if re.search(r"[*+{]", pattern)]
    if len(patterns) > _MOST or len(repeating) > _FEW:
        kind = f"at most {_MOST} patterns, {_FEW} of them with repeats"
        fields.fail(name, kind, patterns[:3])
    return [(_compiled(fields, name, pattern), read(values, pattern)) for pattern in patterns]


def _compiled(fields: AdapterFields, name: str, pattern: str) -> re.Pattern[str]:
    """A pattern of a stranger's file must not run for hours: no repeat of a repeat, two at most."""
    repeats = re.findall(r"(?<!\\)[*+{]", pattern)
    if len(pattern) > 500 or len(repeats) > 2 or re.search(r"[)}*+][*+{]|\\\d", pattern):
        fields.fail(name, "patterns that repeat at most two characters", pattern)
    try:
        re.compile(pattern)
        return re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except re.error as error:
        fields.fail(name, f"regular expressions ({error})", pattern)


def _of_first(patterns: Patterns[T], module: str, default: T) -> T:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def check_target(ranks: Ranks, module: str) -> None:
    """PEFT passes over arrays of modules that the file does not name as its targets."""
    named = ranks.targets
    if named is None or any(module == x or module.endswith(f".{x}") for x in named):
        return
    rule = f"{CONFIG}'s `target_modules` must name every module of which there are arrays."
    close = difflib.get_close_matches(module, [str(x) for x in named], n=1)
    evidence = f"{module!r}, targets {_shown(named)}"
    checks.fail(ValueError, rule, evidence, f"Did it mean {close[0]!r}?" if close else "")


# --- out ----------------------------------------------------------------------------------------


def _alpha(rank: int, scale: float) -> float:
    """What PEFT divides by the rank: a whole number where that gives the same."""
    alpha = scale * rank
    return round(alpha) if round(alpha) / rank == scale else alpha


def _if_they_differ(values: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    if len(set(values.values())) == 1:
        return {}
    return {re.escape(module): values[module] for module in order}
