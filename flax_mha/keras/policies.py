"""Keras's dtype policies as the two dtypes of a layer: of its arithmetic and of its parameters."""

from collections.abc import Mapping
from typing import Any

from flax_mha.core import checks


def policy_dtypes(policy: Any) -> dict[str, str]:
    """`dtype` and `param_dtype` of a policy as `get_config()` has it; nothing of None.

    Keras writes a policy as a name, or as {"class_name": "DTypePolicy", "config": {"name"}}.
    """
    if isinstance(policy, Mapping):
        checks.one_of("dtype policy", policy.get("class_name"), ["DTypePolicy"])
        policy = policy["config"]["name"]
    if policy is None:
        return {}
    if policy.startswith("mixed_"):
        return {"dtype": policy.removeprefix("mixed_"), "param_dtype": "float32"}
    return {"dtype": policy, "param_dtype": policy}
