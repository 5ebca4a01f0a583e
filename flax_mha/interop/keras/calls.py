"""How a functional model calls a layer, as its config.json tells it."""

from collections.abc import Mapping
from typing import Any

from flax_mha.core import checks


def causal_in_calls(entry: Mapping[str, Any], default: bool) -> bool:
    """`use_causal_mask` of every call of the layer, which must agree."""
    nodes = entry.get("inbound_nodes", [])
    nodes = nodes if isinstance(nodes, list) else [nodes]
    told = {_causal(node, default) for node in nodes}
    if len(told or {default}) > 1 or None in told:
        rule = "The calls of a layer must tell by name, and alike, whether they are causal."
        evidence = f"{entry.get('name')!r}, called with {[_named(node) for node in nodes]}"
        checks.fail(ValueError, rule, evidence, "Take it with `load_keras_file`, and say so.")
    return (told or {default}).pop() is True


def _named(node: Any) -> Any:
    return node.get("kwargs") if isinstance(node, Mapping) else node


def _causal(node: Any, default: bool) -> bool | None:
    """None where a call does not tell it: some flag without its name, or no flag at all."""
    named = _named(node)
    if not isinstance(named, Mapping):
        return None
    args = node.get("args", [])
    value = named.get("use_causal_mask", default)
    unnamed = isinstance(args, list) and any(isinstance(x, bool) for x in args)
    return value if isinstance(value, bool) and not unnamed else None
