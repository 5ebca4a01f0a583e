"""Nothing is timed that computes something else: a contender's numbers against the textbook's."""

from collections.abc import Sequence

import jax
import numpy as np

from flax_mha.bench.cases import Case
from flax_mha.bench.peers.contract import Contender
from flax_mha.bench.textbook import Expected

# float32 on a CPU rounds to about 1e-6 here. Accelerators multiply float32 in 10 or 8 bits of
# mantissa by default, and that is what their users run.
LIMITS = {"cpu": 1e-4}
OTHER_LIMIT = 5e-2
# The size of a random deviation, measured on one draw: half or double is another rate.
NOISE_FACTOR = 2.0
# The key bias's gradient is zero by the equation, for it shifts a whole row of logits: what is
# computed is rounding, about 1e-7 of the largest gradient, and is measured by that one's size.
# Any other array that is wrong as a whole stays above the limit down to 1e-5 of the largest.
FLOOR = 0.1


class Wrong(Exception):
    """A contender does not compute what it is timed for."""


def check(contender: Contender, case: Case, expected: Expected) -> float:
    """The largest error of a layer's results, relative to each array's largest entry.

    Raises:
        Wrong: the error is above the limit, or dropout does not act as it should.
    """
    error = check_numbers(contender.exact(), contender.own_layout(expected))
    if case.dropout:
        check_noise(contender.noisy() - expected.output_BTE, expected.noise)
    return error


def check_numbers(
    actual: Sequence[np.ndarray], expected: Sequence[np.ndarray], dtype: str = "float32"
) -> float:
    """The relative error of what was computed in this dtype.

    Raises:
        Wrong: it is above the limit.
    """
    error = relative_error(actual, expected)
    limit = LIMITS.get(jax.default_backend(), OTHER_LIMIT) if dtype == "float32" else OTHER_LIMIT
    if not error <= limit:  # so that NaN is refused too
        raise Wrong(f"its numbers are wrong: error {error:.2g}, at most {limit:.0e} is rounding")
    return error


def relative_error(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest deviation of an array, relative to its largest entry or 10% of all arrays'."""
    shapes = [[array.shape for array in arrays] for arrays in (actual, expected)]
    if shapes[0] != shapes[1]:
        raise Wrong(f"its results have the shapes {shapes[0]}, not {shapes[1]}")
    sizes = [float(np.abs(array).max()) for array in expected]
    least = FLOOR * max(sizes)
    deviations = (np.abs(a - b).max() for a, b in zip(actual, expected))
    errors = [float(d) / max(size, least) for d, size in zip(deviations, sizes)]
    return float(np.max(errors))  # np.max, unlike max, lets no NaN through


def check_noise(deviation: np.ndarray, expected: float) -> float:
    """How far dropout moves the output, over how far it should.

    Raises:
        Wrong: another rate would move it so far.
    """
    noise = float(np.sqrt(np.square(deviation).mean()))
    if not expected / NOISE_FACTOR <= noise <= expected * NOISE_FACTOR:
        raise Wrong(f"its dropout moves the output by {noise:.2g}, not by about {expected:.2g}")
    return noise / expected
