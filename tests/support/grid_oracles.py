"""Neighbourhood attention by loops, from the words of NATTEN's definition.

Along each axis a token belongs to one of `dilation` groups: the places with its remainder. Within
its group a query sees `window` places: itself in the middle, of an even window one more before it
than behind, and moved inwards, none less, where that would reach over a border. A causal axis has
itself and the window - 1 places of the group before it, as far as there are any.
"""

import itertools
import math

import numpy as np

# name: (shape, window, dilation, is_causal), each but the shape for one axis or a tuple for all.
GRIDS = {
    "1-D": ((11,), (3,), 1, False),
    "1-D, even": ((11,), (4,), 1, False),
    "1-D, dilated": ((13,), (3,), 4, False),
    "1-D, dilated, even": ((13,), (4,), 3, False),
    "1-D, causal": ((11,), (3,), 1, True),
    "1-D, causal, dilated": ((13,), (3,), 4, True),
    "2-D": ((5, 7), (3, 3), 1, False),
    "2-D, even": ((5, 7), (2, 4), 1, False),
    "2-D, whole": ((5, 7), (5, 7), 1, False),
    "2-D, whole rows": ((5, 7), (3, 7), 1, False),
    "2-D, dilated": ((7, 8), (3, 2), (2, 3), False),
    "2-D, as wide as can be": ((7, 8), (3, 4), 2, False),
    "2-D, causal rows": ((5, 7), (3, 3), 1, (True, False)),
    "2-D, causal columns, dilated": ((7, 8), (2, 3), 2, (False, True)),
    "3-D": ((3, 4, 5), (2, 3, 3), 1, False),
    "3-D, a video": ((5, 4, 6), (2, 3, 2), (2, 1, 3), (True, False, False)),
    "4-D": ((2, 3, 2, 4), (2, 3, 1, 3), 1, False),
}
# Not NATTEN's own: it begins at windows of 2 and ends at 3 axes.
BEYOND_NATTEN = ("4-D",)


def per_axis(value, axes):
    return value if isinstance(value, tuple) else (value,) * axes


def seen_along(place, length, window, dilation, is_causal):
    """The places that a query at `place` of one axis sees."""
    group = [other for other in range(length) if other % dilation == place % dilation]
    at = group.index(place)
    if is_causal:
        return group[max(at - (window - 1), 0) : at + 1]
    first = at - window // 2
    while first < 0:
        first += 1
    while first + window > len(group):
        first -= 1
    return group[first : first + window]


def neighbors(shape, window, dilation=1, is_causal=False):
    """Who sees whom, booleans [T, S] of tokens in raster order."""
    rules = [per_axis(rule, len(shape)) for rule in (window, dilation, is_causal)]
    tokens = list(itertools.product(*map(range, shape)))
    number = {token: i for i, token in enumerate(tokens)}
    allowed_TS = np.zeros((math.prod(shape),) * 2, bool)
    for token in tokens:
        seen = [seen_along(*axis) for axis in zip(token, shape, *rules, strict=True)]
        for other in itertools.product(*seen):
            allowed_TS[number[token], number[other]] = True
    return allowed_TS


def attention(query, key, value, allowed_TS):
    """Softmax attention over the keys that each query sees, in float64, `[B, T, N, V]`."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    context = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, t, n in np.ndindex(*query.shape[:3]):
        seen = np.flatnonzero(allowed_TS[t])
        logits = key[b, seen, n] @ query[b, t, n] / math.sqrt(query.shape[-1])
        powers = np.exp(logits - logits.max())
        context[b, t, n] = powers @ value[b, seen, n] / powers.sum()
    return context
