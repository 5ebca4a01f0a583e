"""What an nnx layer draws from: the streams of `nnx.Rngs`, one of its own, or one key."""

from typing import Any

import jax
from flax import nnx

from flax_mha.core import checks
from flax_mha.core.typing import PRNGKey


def stream(name: str, rngs: Any) -> nnx.RngStream:
    """The named stream, or the default one in its place."""
    streams = _streams(rngs)
    if not {name, "default"} & streams:
        rule = f"`rngs` must have the stream {name!r} or a default one."
        checks.fail(ValueError, rule, f"the streams {sorted(streams)}", "Pass `rngs=nnx.Rngs(0)`.")
    return rngs[name]


def _streams(rngs: Any) -> set[str]:
    if not isinstance(rngs, nnx.Rngs):
        evidence = f"rngs of type {type(rngs).__name__}"
        checks.fail(TypeError, "`rngs` must be an nnx.Rngs.", evidence, "Pass `rngs=nnx.Rngs(0)`.")
    return set(rngs)


def dropout_stream(rate: float, seed: int | None, rngs: nnx.Rngs | None) -> nnx.RngStream | None:
    """The stream that a layer holds; none where there is no dropout, or nothing to fork."""
    if rate == 0:
        return None
    if seed is not None:
        return nnx.RngStream(seed, tag="dropout")
    if rngs is None or not {"dropout", "default"} & _streams(rngs):
        return None
    return stream("dropout", rngs).fork()


def dropout_key(rate: float, rngs: Any) -> PRNGKey | None:
    """The next key of `rngs`; None where nothing drops."""
    if rate == 0:
        return None
    if rngs is None:
        rule = "Training with dropout > 0 needs a PRNG key."
        remedy = "Pass `rngs=nnx.Rngs(dropout=0)` at construction or in the call, or set `seed`."
        checks.fail(ValueError, rule, f"dropout={rate}, no `rngs`", remedy)
    if isinstance(rngs, jax.Array):
        return rngs
    return rngs() if isinstance(rngs, nnx.RngStream) else stream("dropout", rngs)()
