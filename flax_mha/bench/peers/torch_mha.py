"""`torch.nn.MultiheadAttention`, without the weights as a result."""

from typing import Any

from flax_mha.bench.cases import Case
from flax_mha.bench.data import Data
from flax_mha.bench.peers import torch_layers
from flax_mha.bench.peers.contract import Contender


def build(case: Case, data: Data) -> Contender:
    """Its mask says what is forbidden; `is_causal` is a hint that comes with the mask."""
    torch = torch_layers.ready()
    allowed = torch_layers.mask(case)
    mask = None if allowed is None else ~allowed
    causal = case.causal and case.window is None

    class Attention(torch.nn.Module):  # type: ignore[name-defined]
        layout = staticmethod(_layout)

        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(
                case.features, case.heads, dropout=case.dropout, batch_first=True
            )

        def forward(self, x: Any) -> Any:
            options = {"need_weights": False, "attn_mask": mask, "is_causal": causal}
            return self.attention(x, x, x, **options)[0]

    return torch_layers.contender(Attention(), _layout(data.params), case, data)


def _layout(params: Any) -> dict[str, Any]:
    weight, bias = torch_layers.output(params)
    return {
        "attention.in_proj_weight": torch_layers.stacked(params, "kernel"),
        "attention.in_proj_bias": torch_layers.stacked(params, "bias"),
        "attention.out_proj.weight": weight,
        "attention.out_proj.bias": bias,
    }
