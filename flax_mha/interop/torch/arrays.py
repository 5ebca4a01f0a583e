"""PyTorch's arrays as NumPy's, without importing torch unless a tensor of its own comes in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks


def as_numpy(name: str, value: Any) -> np.ndarray:
    """Anything that `np.asarray` takes, or a torch tensor; every bit stays as it is."""
    if hasattr(value, "detach"):
        return _from_tensor(name, value)
    if checks.is_array(value) and jnp.issubdtype(value.dtype, jax.dtypes.extended):
        checks.fail(TypeError, f"`{name}` must be an array of numbers.", f"dtype {value.dtype}")
    return np.asarray(value)


def writable(array: np.ndarray) -> np.ndarray:
    """An array that torch may share: writing into JAX's own memory would change the parameters."""
    return array if array.flags.writeable else array.copy()


def _from_tensor(name: str, tensor: Any) -> np.ndarray:
    """NumPy has no bfloat16 that torch knows of, so its bits travel as integers."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    try:
        return tensor.numpy()
    except TypeError as error:
        rule = f"`{name}` must be a dense tensor of a dtype that NumPy has, or bfloat16."
        remedy = "Dequantise it first, or cast it: `.float()`."
        checks.fail(TypeError, rule, f"dtype {tensor.dtype} ({error})", remedy)
