"""Parameters for PyTorch's layouts; the installed torch's module as NumPy sees it.

What asks for torch skips where it is absent.
"""

import contextlib

import jax
import numpy as np
import pytest
from helpers import H, N, random_params

from flax_mha import param_shapes

NAMES = {"query": "q_lin", "key": "k_lin", "value": "v_lin", "attention_output": "out_lin"}
E = N * H  # torch's embed_dim


def params_of(config, query=E, value=None, key=None, dtype="float32"):
    shapes = param_shapes(config, (1, query), (1, value or query), (1, key or value or query))
    return random_params(shapes, dtype=dtype)


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


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
