"""What both torch layers share: threads, weights, and a module as a contender."""

from typing import Any

import jax
import numpy as np

from flax_mha.bench.cases import AnyCase, Case
from flax_mha.bench.data import Data
from flax_mha.bench.environment import cores
from flax_mha.bench.masks import allowed
from flax_mha.bench.peers.contract import Contender, Unserved
from flax_mha.bench.textbook import Expected


def ready() -> Any:
    """torch, on all cores.

    Raises:
        Unserved: JAX computes on an accelerator, and these files measure torch on the CPU.
    """
    if jax.default_backend() != "cpu":
        raise Unserved(f"torch is measured on the CPU only, and JAX runs on {jax.devices()[0]}")
    import torch

    torch.set_num_threads(cores())
    return torch


def contender(module: Any, weights: dict[str, Any], case: Case, data: Data) -> Contender:
    """A module with `weights`, arrays by the names of its parameters."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    x = torch.from_numpy(np.array(data.x_BTD)).requires_grad_(case.gradient)
    differentiated = [*module.parameters(), x]

    def forward(training: bool) -> Any:
        module.train(training)
        with torch.no_grad():
            return module(x)

    def gradients(training: bool) -> Any:
        module.train(training)
        return torch.autograd.grad(module(x).square().sum(), differentiated)

    def exact() -> list[np.ndarray]:
        results = gradients(False) if case.gradient else [forward(False)]
        return [result.numpy() for result in results]

    # Outside training torch may take a fast path; a gradient is always training.
    timed = gradients if case.gradient else forward
    return Contender(
        run=lambda: timed(case.gradient or bool(case.dropout)),
        exact=exact,
        own_layout=lambda expected: _own_layout(module, case, expected),
        noisy=lambda: forward(True).numpy(),
    )


def _own_layout(module: Any, case: Case, expected: Expected) -> list[np.ndarray]:
    if not case.gradient:
        return [expected.output_BTE]
    weights = module.layout(expected.params_gradient)
    names = [name for name, _ in module.named_parameters()]
    return [*(weights[name] for name in names), expected.x_gradient_BTD]


def stacked(params: Any, leaf: str) -> np.ndarray:
    """Query, key and value as one `[3 N H, D]` or `[3 N H]`."""
    arrays = [np.asarray(params[name][leaf]) for name in ("query", "key", "value")]
    if leaf == "bias":
        return np.concatenate([array.reshape(-1) for array in arrays])
    return np.concatenate([array.reshape(len(array), -1).T for array in arrays])


def output(params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weight `[E, N H]` and bias `[E]` of the last projection."""
    projection = params["attention_output"]
    kernel, bias = np.asarray(projection["kernel"]), np.asarray(projection["bias"])
    return np.ascontiguousarray(kernel.reshape(-1, kernel.shape[-1]).T), bias.copy()


def mask(case: AnyCase) -> Any:
    """Booleans `[T, S]`, True = may attend, or None. Made once, before any time is taken."""
    import torch

    allowed_TS = allowed(case)
    return None if allowed_TS is None else torch.from_numpy(np.array(allowed_TS))
