"""The installed torch's MultiheadAttention as NumPy sees it; skips where torch is absent."""

import contextlib

import numpy as np
import pytest


def installed_torch():
    return pytest.importorskip("torch", reason="torch is not installed")


@contextlib.contextmanager
def torch_module(*args, seed=0, **kwargs):
    """A torch.nn.MultiheadAttention in eval mode whose biases are not zero."""
    torch = installed_torch()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = torch.nn.MultiheadAttention(*args, **{"batch_first": True, **kwargs}).eval()
        for name, parameter in module.named_parameters():
            if "bias" in name:
                torch.nn.init.normal_(parameter)
        yield torch, module


def run(torch, module, *arrays, masks=()):
    """(output, weights of each head) of the module, as NumPy arrays."""
    masks = {name: torch.from_numpy(np.array(mask)) for name, mask in dict(masks).items()}
    tensors = [torch.from_numpy(np.array(array)) for array in arrays]
    tensors = [tensors[0]] * 3 if len(tensors) == 1 else tensors
    with torch.no_grad():
        output, scores = module(*tensors, average_attn_weights=False, **masks)
    return output.numpy(), scores.numpy()
