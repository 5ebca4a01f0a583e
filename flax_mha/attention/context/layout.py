"""The zigzag order of a sequence, in which the causal order gives all devices the same work.

Of 2 n parts device i has the i-th and the (2 n - 1 - i)-th: of the queries of the two, the first
sees i + 1 parts and the second 2 n - i, together 2 n + 1 for every i. In the contiguous order the
last device has 2 n - 1 times the work of the first.
"""

import numpy as np

from flax_mha.core import checks


def zigzag_order(T: int, n: int) -> np.ndarray:
    """The positions `[T]` of a sequence in the order in which `n` devices hold it.

        stored = tokens[:, zigzag_order(T, n)]      position of stored[:, i] = zigzag_order(T, n)[i]

    Args:
        T: the length, a multiple of 2 n.
        n: the devices on the context axis.

    Returns:
        NumPy integers `[T]`.

    Raises:
        ValueError: a length that 2 n does not divide.

    Example:
        >>> from flax_mha import zigzag_order
        >>> zigzag_order(8, 2).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
    """
    if checks.integer("T", T, minimum=0) % (2 * checks.integer("n", n, minimum=1)):
        rule = f"In zigzag order a length must be a multiple of 2 n = {2 * n}."
        checks.fail(ValueError, rule, f"T = {T}, n = {n}", "Pad the tokens, with a mask for them.")
    parts = np.arange(T, dtype=np.int32).reshape(2 * n, -1)
    return np.concatenate([parts[[i, 2 * n - 1 - i]].reshape(-1) for i in range(n)])


def zigzag_inverse(T: int, n: int) -> np.ndarray:
    """The order `[T]` that puts what is stored in zigzag order back: outputs, or their losses.

    Args:
        T: the length, a multiple of 2 n.
        n: the devices on the context axis.

    Returns:
        NumPy integers `[T]`.

    Raises:
        ValueError: a length that 2 n does not divide.

    Example:
        >>> from flax_mha import zigzag_inverse, zigzag_order
        >>> zigzag_order(8, 2)[zigzag_inverse(8, 2)].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return np.argsort(zigzag_order(T, n)).astype(np.int32)
