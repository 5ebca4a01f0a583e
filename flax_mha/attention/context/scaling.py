"""Scaling on paper: what a device of a ring computes, sends and holds, against T and n.

A device has t = T / n tokens, of N heads of queries and K of keys and values of H features, in 16
bits. A hop is attention to t keys; n hops are all of it. Causal in zigzag order is half of it, the
same on every device.

                      operations            bytes sent          of all n hops, operations / bytes
    forward           2 x 2 t^2 N H         2 t K H x 2         4 T^2 N H / n   4 T K H
    backward          5 x 2 t^2 N H         2 t K H x (2 + 4)   10 T^2 N H / n  12 T K H

Forward are 2 products, backward 5. Backward the gradients of keys and values travel too, in 32
bits, and once more to where they belong, which nothing hides. So what a device sends does not
depend on n, and what it computes falls with n: the ratio is t, and H is in neither. A hop's
sending is hidden behind its computing from

    t >= c (K / N) (operations a second) / (bytes a second),    c = 1 forward, 1.2 backward

on, from twice that where causal. Published figures: v5e, 197 TFLOP/s in bfloat16 and 1,600 Gbit/s
over four links, of which a ring uses one, 50 GB/s in its direction (cloud.google.com/tpu/docs/v5e);
H100 SXM, 989 TFLOP/s in bfloat16 without sparsity and NVLink of 900 GB/s, 450 in a direction
(nvidia.com/en-us/data-center/h100). T from which a causal ring hides what it sends, forward and
backward, with as many heads of keys as of queries:

             n = 4            n = 8            n = 16
    v5e      31,520  37,824   63,040  75,648   126,080  151,296
    H100     17,583  21,099   35,165  42,198    70,330   84,395

With K heads for N heads of queries it is K / N of that: 4,728 on four v5e at 8 for one. It is
computing at its peak that these lengths hide behind: a kernel that reaches half of it hides as much
from half of the length on. 16 H100 need NVLink between the hosts; over InfiniBand of 400 Gbit/s it
is 9 times as long. Nothing of this was measured.

Memory: a ring holds 2 t K H numbers of the keys at hand and as many that arrive; backward, of one
group of heads at a time, their gradients likewise. An all-gather holds all 2 S K H numbers, n / 2
times as many, and their gradient; it sends as much, and hides none of it behind its own attention.
An all-to-all holds all T queries of N / n heads, as many numbers as it had, and sends 2 (N + K) t H
numbers forward, fewer than the 2 T K H of the others where n > (N + K) / K.
"""

import math
from typing import NamedTuple


class Chip(NamedTuple):
    """Operations a second in 16 bits, and bytes a second from a device to the next of its ring."""

    operations: float
    bytes: float


class Work(NamedTuple):
    """Of one hop of a device."""

    operations: float
    bytes: float


CHIPS = {"v5e": Chip(197e12, 50e9), "H100": Chip(989e12, 450e9)}


def hop_work(
    t: float, N: int, K: int, H: int, *, is_causal: bool = True, backward: bool = False
) -> Work:
    """What a device computes and sends in a hop of t queries and t keys.

    Example:
        >>> work = hop_work(8192, 8, 8, 128)
        >>> f"{work.operations:.3g} operations, {int(work.bytes) >> 20} MiB"
        '1.37e+11 operations, 32 MiB'
    """
    products, width = (5, 2 + 4) if backward else (2, 2)
    operations = products * 2 * t**2 * N * H
    return Work(operations / 2 if is_causal else operations, 2 * t * K * H * width)


def hiding_length(
    chip: Chip, n: int, *, N: int = 8, K: int = 8, is_causal: bool = True, backward: bool = False
) -> int:
    """The length T of the whole sequence from which a hop computes for as long as it sends.

    Example:
        >>> for name, chip in CHIPS.items():
        ...     print(name, [hiding_length(chip, n) for n in (4, 8, 16)])
        ...     print(name, [hiding_length(chip, n, backward=True) for n in (4, 8, 16)])
        v5e [31520, 63040, 126080]
        v5e [37824, 75648, 151296]
        H100 [17583, 35165, 70329]
        H100 [21099, 42198, 84395]
        >>> hiding_length(CHIPS["v5e"], 4, K=1, backward=True)
        4728
    """
    one = hop_work(1, N, K, 1, is_causal=is_causal, backward=backward)
    t = (one.bytes / chip.bytes) / (one.operations / chip.operations)
    return math.ceil(round(n * t, 6))
