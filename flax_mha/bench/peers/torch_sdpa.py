"""`torch.nn.functional.scaled_dot_product_attention` between two `torch.nn.Linear`."""

from typing import Any

from flax_mha.bench.cases import Case
from flax_mha.bench.data import Data
from flax_mha.bench.peers import torch_layers
from flax_mha.bench.peers.contract import Contender


def build(case: Case, data: Data) -> Contender:
    """Query, key and value in one projection; a flag for causal, a matrix for a window."""
    torch = torch_layers.ready()
    causal = case.causal and case.window is None
    mask = None if causal else torch_layers.mask(case)

    class Attention(torch.nn.Module):  # type: ignore[name-defined]
        layout = staticmethod(_layout)

        def __init__(self) -> None:
            super().__init__()
            self.projections = torch.nn.Linear(case.features, 3 * case.features)
            self.output = torch.nn.Linear(case.features, case.features)

        def forward(self, x: Any) -> Any:
            split = self.projections(x).unflatten(-1, (3, case.heads, case.head_size))
            query, key, value = split.permute(2, 0, 3, 1, 4)
            context = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=case.dropout if self.training else 0.0,
                is_causal=causal,
            )
            return self.output(context.transpose(1, 2).flatten(2))

    return torch_layers.contender(Attention(), _layout(data.params), case, data)


def _layout(params: Any) -> dict[str, Any]:
    weight, bias = torch_layers.output(params)
    return {
        "projections.weight": torch_layers.stacked(params, "kernel"),
        "projections.bias": torch_layers.stacked(params, "bias"),
        "output.weight": weight,
        "output.bias": bias,
    }
