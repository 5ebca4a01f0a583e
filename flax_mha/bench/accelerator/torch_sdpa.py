"""`torch.nn.functional.scaled_dot_product_attention` on the GPU that JAX runs on, or on the CPU."""

from typing import Any

import jax
import numpy as np

from flax_mha.bench.accelerator.cases import Case
from flax_mha.bench.accelerator.textbook import Data
from flax_mha.bench.peers import torch_layers
from flax_mha.bench.peers.contract import Unserved


def device() -> str:
    """torch's name of the place that JAX runs on.

    Raises:
        Unserved: torch has no such place.
    """
    import torch

    platform = jax.default_backend()
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    if platform == "cpu":
        return "cpu"
    raise Unserved(f"torch {torch.__version__} does not run on a {platform} here")


class Attention:
    """One case: the tensors, and the calls that compute the context or the gradients of them."""

    def __init__(self, case: Case, data: Data) -> None:
        import torch

        self.torch, self.case, self.place = torch, case, device()
        query, key, value, *bias = (self.tensor(x) for x in data.arrays)
        # [B, N, T, H], as views of the same layout that the others have.
        self.heads = [x.transpose(1, 2).requires_grad_(case.gradient) for x in (query, key, value)]
        self.bias = bias[0].requires_grad_(case.gradient) if bias else None
        self.probe = self.tensor(data.probe_BTNH).transpose(1, 2)
        self.causal = case.causal and case.window is None and self.bias is None
        self.mask = self.allowed()

    def tensor(self, x: Any) -> Any:
        wide = self.torch.from_numpy(np.asarray(x).astype(np.float32))
        return wide.to(self.place, getattr(self.torch, self.case.dtype))

    def allowed(self) -> Any:
        """A boolean matrix, where a flag does not say it."""
        found = None if self.causal else torch_layers.mask(self.case)
        return None if found is None else found.to(self.place)

    def context(self, dropout: float) -> Any:
        mask = self.mask
        if self.bias is not None:
            mask = self.bias[None]
            if self.mask is not None:
                mask = mask.masked_fill(~self.mask, float("-inf"))
        call = dict(attn_mask=mask, is_causal=self.causal, dropout_p=dropout)
        return self.torch.nn.functional.scaled_dot_product_attention(*self.heads, **call)

    def results(self, dropout: float) -> list[Any]:
        if not self.case.gradient:
            with self.torch.no_grad():
                return [self.context(dropout)]
        named = [*self.heads, *([] if self.bias is None else [self.bias])]
        return list(self.torch.autograd.grad((self.context(dropout) * self.probe).sum(), named))

    def wait(self, results: Any) -> None:
        if self.place == "cuda":
            self.torch.cuda.synchronize()

    def on_host(self, tensors: list[Any]) -> list[np.ndarray]:
        """In the layout of the others."""
        swapped = [x.transpose(1, 2) if x.ndim == 4 else x for x in tensors]
        return [x.detach().float().cpu().numpy() for x in swapped]
