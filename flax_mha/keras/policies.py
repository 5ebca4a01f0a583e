"""Keras's dtype policies as the two dtypes of a layer: of its arithmetic and of its parameters."""

from collections.abc import Mapping
from typing import Any

from flax_mha.core import checks

_MAP = "DTypePolicyMap"
_KINDS = ["DTypePolicy", _MAP]


def policy_dtypes(policy: Any) -> dict[str, str]:
    """`dtype` and `param_dtype` of a policy as `get_config()` has it; nothing of None.

    Keras writes a policy as a name, or as {"class_name": "DTypePolicy", "config": {"name"}}; one
    for each path, as of projections that were made int8, as a DTypePolicyMap.
    """
    if isinstance(policy, Mapping):
        kind = checks.one_of("dtype policy", policy.get("class_name"), _KINDS)
        policy = _default(policy["config"]) if kind == _MAP else policy["config"]["name"]
    if policy is None:
        return {}
    if not isinstance(policy, str):
        rule = "`dtype` of a Keras config must be the name of a dtype policy, or its dict."
        checks.fail(TypeError, rule, f"dtype={policy!r} of type {type(policy).__name__}")
    if policy.startswith("mixed_"):
        return {"dtype": policy.removeprefix("mixed_"), "param_dtype": "float32"}
    return {"dtype": policy, "param_dtype": policy}


def _default(fields: Mapping[str, Any]) -> Any:
    """The policy of all paths, which a quantized projection's must agree with."""
    default = _source(fields["default_policy"])
    found = {path: _source(policy) for path, policy in fields["policy_map"].items()}
    if others := {path: name for path, name in found.items() if name != default}:
        rule = "A map of dtype policies must have one dtype of arithmetic and one of parameters."
        checks.fail(ValueError, rule, f"{default!r}, and {others}")
    return default


def _source(policy: Any) -> Any:
    """The policy's name; of a quantized one, before it was."""
    if isinstance(policy, Mapping):
        fields = policy["config"]
        return fields["source_name"] if "source_name" in fields else fields["name"]
    return policy
