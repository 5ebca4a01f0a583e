"""Multi-head attention as loops over float64 numbers: slow, and short enough to verify by eye.

Nothing here is shared with the package. `attention` is one example and one head; `layer` walks
over every example, query, head and key by index. A mask is asked one entry at a time, so that no
broadcast can hide a wrong alignment, and a key that may not be attended is never read: a NaN
there cannot arrive by accident.
"""

import itertools
import math

import numpy as np
from head_oracles import Extras, places

PLAIN = Extras()


def attention(query, key, value, allowed, bias, scale, keep, rate, soft_cap=None, sink=None):
    """One example, one head: `query` TH, `key` SH, `value` SV, the other arrays TS.

    `soft_cap` squeezes the scaled products; `sink` is one more logit, whose value is zero.

    Returns the context TV and the weights TS (before dropout).
    """
    weights = np.zeros((len(query), len(key)))
    context = np.zeros((len(query), value.shape[1]))
    for t in range(len(query)):
        attended = [s for s in range(len(key)) if allowed[t, s]]
        if not attended:
            continue
        products = {s: scale * math.fsum(query[t] * key[s]) for s in attended}
        if soft_cap is not None:
            products = {s: soft_cap * math.tanh(x / soft_cap) for s, x in products.items()}
        logits = {s: products[s] + bias[t, s] for s in attended}
        largest = max([*logits.values(), *([] if sink is None else [sink])])
        powers = {s: math.exp(logits[s] - largest) for s in attended}
        total = math.fsum([*powers.values(), 0 if sink is None else math.exp(sink - largest)])
        for s in attended:
            weights[t, s] = powers[s] / total
            if keep[t, s] and rate < 1:
                context[t] += weights[t, s] / (1 - rate) * value[s]
    return context, weights


def positions(sizes):
    """Every index into axes of these sizes, in raster order (row by row)."""
    return list(itertools.product(*(range(size) for size in sizes)))


def raster(index, sizes):
    """The place of `index` in raster order: row * (length of a row) + column."""
    place = 0
    for i, size in zip(index, sizes, strict=True):
        place = place * size + i
    return place


def attended_axes(attention_axes, rank):
    """The attended axes of an input of this rank, counted from its front."""
    if attention_axes is None:
        return tuple(range(1, rank - 1)) if rank > 2 else (0,)
    if isinstance(attention_axes, int):
        attention_axes = (attention_axes,)
    return tuple(axis if axis >= 0 else rank + axis for axis in attention_axes)


def split_sizes(array, axes):
    """(sizes of the batch axes, sizes of the attended axes) of an input; features are last."""
    batch_axes = [axis for axis in range(array.ndim - 1) if axis not in axes]
    return [array.shape[a] for a in batch_axes], [array.shape[a] for a in axes]


def whole_index(batch, attended, axes):
    """The index into an input: `attended` stands at `axes`, `batch` fills the rest in order."""
    index = [None] * (len(batch) + len(attended))
    for axis, i in zip(axes, attended, strict=True):
        index[axis] = i
    rest = iter(batch)
    return tuple(next(rest) if i is None else i for i in index)


def entry(array, leading, trailing):
    """The entry of a mask or bias: leading axes align left, trailing right, size 1 serves all."""
    index = tuple(leading)[: array.ndim - len(trailing)] + tuple(trailing)
    return array[tuple(0 if size == 1 else i for i, size in zip(index, array.shape, strict=True))]


def project(vector, projection):
    """One input vector through one linear map: sum over d of vector[d] kernel[d] + bias."""
    kernel = projection["kernel"]
    result = np.zeros(kernel.shape[1:])
    for d in range(len(vector)):
        result += vector[d] * kernel[d]
    return result + projection.get("bias", 0.0)


def project_out(context, projection):
    """The context NV of one query through the output map: sum over n, v."""
    kernel = projection["kernel"]
    result = np.zeros(kernel.shape[2:])
    for n in range(kernel.shape[0]):
        for v in range(kernel.shape[1]):
            result += context[n, v] * kernel[n, v]
    return result + projection.get("bias", 0.0)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def may_attend(b, n, t, s, T_sizes, S_sizes, masks):
    """Whether query `t` of example `b` may attend key `s` in head `n`, rule by rule."""
    row, column = raster(t, T_sizes), raster(s, S_sizes)
    window = masks.get("sliding_window")
    if masks.get("use_causal_mask") and column > row:
        return False
    if window is not None and abs(row - column) >= window:
        return False
    if masks.get("query_mask") is not None and not entry(masks["query_mask"], b, t):
        return False
    for name in ("value_mask", "key_mask"):
        if masks.get(name) is not None and not entry(masks[name], b, s):
            return False
    if masks.get("segment_ids") is not None:
        ids = masks["segment_ids"]
        query_ids, key_ids = ids if isinstance(ids, tuple) else (ids, ids)
        if entry(query_ids, b, t) != entry(key_ids, b, s):
            return False
    mask = masks.get("attention_mask")
    return mask is None or bool(entry(mask, (*b, n), (*t, *s)))


def float64(tree):
    """The tree with float64 leaves."""
    if isinstance(tree, dict):
        return {name: float64(leaf) for name, leaf in tree.items()}
    return None if tree is None else np.asarray(tree).astype(np.float64)


def plain(mask):
    """A mask as a numpy array; a pair of segment ids as a pair; flags and sizes as they are."""
    if isinstance(mask, tuple):
        return tuple(map(np.asarray, mask))
    return np.asarray(mask) if hasattr(mask, "shape") else mask


def heads_of(array, axes, batch, tokens, params, name, extras, stand):
    """The projected vectors [token, head, feature] of one example, whose tokens `stand` there."""
    rows = [project(array[whole_index(batch, i, axes)], params[name]) for i in tokens]
    heads = np.array(rows).reshape(len(tokens), *params[name]["kernel"].shape[1:])
    for i, n in np.ndindex(heads.shape[:2]):
        heads[i, n] = extras.head(heads[i, n], name, params, stand[i])
    return heads


def stands(side, b, tokens, masks):
    """The positions of one example's queries (`side` 0) or keys (1), in raster order."""
    pair = lambda x: x if isinstance(x, tuple) else (x, x)
    told, ids = (pair(masks.get(name))[side] for name in ("positions", "segment_ids"))
    of = lambda x: None if x is None else [int(entry(x, b, i)) for i in tokens]
    return places(of(told), of(ids)) or list(range(len(tokens)))


def table(rows, T_all, S_all):
    """A list of rows as an array TS; the lengths are said because either may be zero."""
    return np.array(rows).reshape(len(T_all), len(S_all))


def layer(
    params, query, value, key=None, *, attention_axes=None, bias=None, keep=None, rate=0.0,
    extras=PLAIN, **masks
):  # fmt: skip
    """The layer: (output, attention_scores), float64.

    `masks` are the layer's own arguments (`query_mask` ... `segment_ids`, `use_causal_mask`,
    `positions`) and `sliding_window`. `keep` has the shape of the scores: False is a weight that
    dropout removes. `extras` are the config's fields beyond Keras's.
    """
    params, query, value, key = map(float64, (params, query, value, value if key is None else key))
    masks = {name: plain(mask) for name, mask in masks.items()}
    axes = attended_axes(attention_axes, query.ndim)
    batch_sizes, T_sizes = split_sizes(query, axes)
    _, S_sizes = split_sizes(value, axes)
    T_all, S_all = positions(T_sizes), positions(S_sizes)
    num_heads, value_dim, *features = params["attention_output"]["kernel"].shape
    key_heads, key_dim = params["key"]["kernel"].shape[1:]

    output = np.zeros((*query.shape[:-1], *features))
    scores = np.zeros((*batch_sizes, num_heads, *T_sizes, *S_sizes))
    for b in positions(batch_sizes):
        rows, columns = stands(0, b, T_all, masks), stands(1, b, S_all, masks)
        queries = heads_of(query, axes, b, T_all, params, "query", extras, rows)
        keys = heads_of(key, axes, b, S_all, params, "key", extras, columns)
        values = heads_of(value, axes, b, S_all, params, "value", extras, columns)
        context = np.zeros((len(T_all), num_heads, value_dim))
        for n in range(num_heads):
            k = n // (num_heads // key_heads)
            allowed = [
                [
                    may_attend(b, n, t, s, T_sizes, S_sizes, masks) and extras.share_a_chunk(p, q)
                    for s, q in zip(S_all, columns)
                ]
                for t, p in zip(T_all, rows)
            ]
            added = [
                [
                    extras.bias(n, num_heads, i, j)
                    + (0.0 if bias is None else entry(bias, (*b, n), (*t, *s)))
                    for j, s in enumerate(S_all)
                ]
                for i, t in enumerate(T_all)
            ]
            kept = [[keep is None or keep[(*b, n, *t, *s)] for s in S_all] for t in T_all]
            context[:, n], weights = attention(
                queries[:, n],
                keys[:, k],
                values[:, k],
                allowed=table(allowed, T_all, S_all),
                bias=table(added, T_all, S_all).astype(np.float64),
                scale=1 / math.sqrt(key_dim) if extras.scale is None else extras.scale,
                keep=table(kept, T_all, S_all),
                rate=rate,
                soft_cap=extras.soft_cap,
                sink=params["sinks"]["logits"][n] if "sinks" in params else None,
            )
            for (i, t), (j, s) in itertools.product(enumerate(T_all), enumerate(S_all)):
                scores[(*b, n, *t, *s)] = weights[i, j]
        for i, t in enumerate(T_all):
            where = whole_index(b, t, axes)
            gate = sigmoid(project(query[where], params["gate"])) if "gate" in params else 1.0
            output[where] = project_out(context[i] * gate, params["attention_output"])
    return output, scores


def slope(loss, tree, direction, step=1e-5):
    """The derivative of loss(tree) along `direction`, by central differences in float64."""
    ahead = loss(moved(tree, direction, step))
    behind = loss(moved(tree, direction, -step))
    return (ahead - behind) / (2 * step)


def moved(tree, direction, step):
    """tree + step * direction; what `direction` does not name stays where it is."""
    if direction is None:
        return tree
    if isinstance(tree, dict):
        return {name: moved(leaf, direction.get(name), step) for name, leaf in tree.items()}
    return np.asarray(tree).astype(np.float64) + step * direction
