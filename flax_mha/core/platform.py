"""Where a program will run, as far as that is known while it is traced."""

import jax


def on_cpu() -> bool:
    """Whether JAX's default backend is a CPU: what was measured there does not hold elsewhere."""
    return jax.default_backend() == "cpu"
