"""What a flax.linen module's adapters are to a call: variables of the collection "lora"."""

from typing import Any

from flax_mha.config import Lora, MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.params.lora import check_rule, lora_params
from flax_mha.training.streams import dropout_key


def lora_of(
    module: Any, config: MultiHeadAttentionConfig, training: bool, *arrays: Any
) -> dict[str, Any]:
    """The arguments of `forward` for `module.lora`; the variables are made where they may be."""
    if module.lora is not None:
        checks.instance("lora", module.lora, Lora)
        for name in module.lora.which:
            _variable(module, config, name, arrays)
    tree = dict(module.variables.get("lora", {}))
    check_rule(module.lora, tree)
    if module.lora is None:
        return {}
    rate = module.lora.dropout
    call = {"lora": tree, "lora_scale": module.lora.scale, "lora_dropout": rate}
    return call | {"lora_dropout_key": dropout_key(module, rate, training)}


def _variable(module: Any, config: MultiHeadAttentionConfig, name: str, arrays: Any) -> None:
    def initial() -> Any:
        shapes: Any = (None if array is None else array.shape for array in arrays)
        own: Any = {"rank": module.lora.rank, "which": (name,)}
        tree: Any = lora_params(module.make_rng("params"), config, *shapes, **own)
        return tree[name]

    module.variable("lora", name, initial)
