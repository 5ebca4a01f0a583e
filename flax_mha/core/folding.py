"""Any rank and any attended axes, folded to `[B, T, ...]` and unfolded again.

    [*batch and attended axes, D]  <->  [B, T, D]

The attended axes, in the order given, become T (or S) in raster order; all other axes become B.
"""

import dataclasses
import itertools
import math

import jax.numpy as jnp

from flax_mha.core import checks
from flax_mha.core.typing import Array, Shape


def collapse(array: Array, groups: tuple[Shape, ...]) -> Array:
    """Merges each group of axes into one: size 1 where all of them are 1, else the full product.

    `array` has one axis for every size in `groups`, each 1 or that size.
    """
    stops = list(itertools.accumulate(len(group) for group in groups))
    parts = [array.shape[stop - len(group) : stop] for group, stop in zip(groups, stops)]
    full = [part if set(part) <= {1} else group for part, group in zip(parts, groups)]
    array = jnp.broadcast_to(array, tuple(itertools.chain(*full)))
    return array.reshape([math.prod(part) for part in full])


@dataclasses.dataclass(frozen=True)
class Folding:
    """How one call's arrays fold; static and hashable.

    Attributes:
        attended: the attended axes of the inputs, not negative, in the order given.
        batch: the sizes of the other leading axes, in order (B is their product).
        targets: the sizes of the query's attended axes (T is their product).
        sources: the sizes of the value's attended axes (S is their product).
    """

    attended: tuple[int, ...]
    batch: Shape
    targets: Shape
    sources: Shape

    @classmethod
    def of(cls, query_shape: Shape, value_shape: Shape, attention_axes: Shape | None) -> "Folding":
        """Resolves the axes against the shapes; raises ValueError where they do not fit."""
        attended = _resolve(attention_axes, len(query_shape))
        others = [axis for axis in range(len(query_shape) - 1) if axis not in attended]
        batch = tuple(_batch_size(axis, query_shape, value_shape) for axis in others)
        sizes = [tuple(shape[axis] for axis in attended) for shape in (query_shape, value_shape)]
        return cls(attended, batch, *sizes)

    @property
    def B(self) -> int:
        return math.prod(self.batch)

    @property
    def T(self) -> int:
        return math.prod(self.targets)

    @property
    def S(self) -> int:
        return math.prod(self.sources)

    @property
    def _order(self) -> list[int]:
        """The leading axes of an input: those of the batch, then the attended ones."""
        rank = len(self.batch) + len(self.attended)
        return [axis for axis in range(rank) if axis not in self.attended] + list(self.attended)

    def fold(self, x: Array) -> Array:
        """`[leading axes, D]` to `[B, T, D]` (or S); batch axes of size 1 are broadcast."""
        x = jnp.transpose(x, [*self._order, x.ndim - 1])
        lengths = x.shape[len(self.batch) : -1]
        x = jnp.broadcast_to(x, (*self.batch, *lengths, x.shape[-1]))
        return x.reshape(self.B, math.prod(lengths), x.shape[-1])

    def unfold(self, x: Array, lengths: Shape, trailing: Shape) -> Array:
        """`[B, T, ...]` to `[leading axes, *trailing]`, the inverse of `fold`."""
        x = x.reshape(*self.batch, *lengths, *trailing)
        rank = len(self._order)
        inverse = [self._order.index(axis) for axis in range(rank)]
        return jnp.transpose(x, inverse + list(range(rank, x.ndim)))

    def unfold_scores(self, scores_BNTS: Array) -> Array:
        """`[B, N, T, S]` to Keras's order `[*batch, N, *targets, *sources]`."""
        N = scores_BNTS.shape[1]
        return scores_BNTS.reshape(*self.batch, N, *self.targets, *self.sources)

    def fold_scores(self, name: str, array: Array, N: int) -> Array:
        """A mask or bias over scores to `[b, n, t, s]`, each size 1 or full.

        The last axes are `[*targets, *sources]`; those before are the first of `[*batch, N]`.
        """
        full = (*self.batch, N, *self.targets, *self.sources)
        attended = 2 * len(self.attended)
        leading = array.ndim - attended
        letters, shapes = self._letters(full, attended)
        if not 0 <= leading <= len(self.batch) + 1:
            rule = f"`{name}` must have one of the shapes {shapes}."
            checks.fail(ValueError, rule, f"shape {array.shape}", self._padding_hint(name, array))
        self._refuse_ambiguous(name, array)
        missing = (1,) * (len(self.batch) + 1 - leading)
        aligned = array.reshape(*array.shape[:leading], *missing, *array.shape[leading:])
        remedy = self._swap_hint(array) or self._padding_hint(name, array)
        checks.broadcastable(name, aligned.shape, full, letters, remedy, received=array.shape)
        return collapse(aligned, (self.batch, (N,), self.targets, self.sources))

    def fold_padding(self, name: str, array: Array, lengths: Shape, letter: str) -> Array:
        """A mask or ids over positions, `[*batch, *lengths]`, to `[b, T]` (or S)."""
        full = (*self.batch, *lengths)
        leading = array.ndim - len(lengths)
        rule = f"`{name}` must have the shape [*batch, {letter}] = {full}."
        if not 0 <= leading <= len(self.batch) or array.shape[leading:] != lengths:
            checks.fail(ValueError, rule, f"shape {array.shape}")
        missing = (1,) * (len(self.batch) - leading)
        aligned = array.reshape(*array.shape[:leading], *missing, *lengths)
        letters = f"[*batch, {letter}]"
        checks.broadcastable(name, aligned.shape, full, letters, received=array.shape)
        return collapse(aligned, (self.batch, lengths))

    def _letters(self, full: Shape, attended: int) -> tuple[str, list[Shape]]:
        shapes = [full[:leading] + full[-attended:] for leading in range(len(full) - attended + 1)]
        batch = ["B"] if len(self.batch) == 1 else [f"B{i}" for i in range(len(self.batch))]
        axes = [f"{x}{i}" if attended > 2 else x for x in "TS" for i in range(attended // 2)]
        return f"[{', '.join([*batch, 'N', *axes])}]", shapes

    def _refuse_ambiguous(self, name: str, array: Array) -> None:
        """`[T, S]` and `[B, S]` cannot be told apart where B == T."""
        sizes = array.shape
        if len(sizes) == 2 and sizes[0] == self.T and sizes[0] in self.batch and self.T > 1:
            rule = f"`{name}` of rank 2 is ambiguous where B == T: is it [T, S] or [B, S]?"
            remedy = f"Pass `{name}[None]` for [T, S], or `value_mask=` for a [B, S] padding mask."
            checks.fail(ValueError, rule, f"shape {sizes} with B = T = {self.T}", remedy)

    def _padding_hint(self, name: str, array: Array) -> str:
        padding = self.batch[: max(array.ndim - len(self.sources), 0)] + self.sources
        if name != "bias" and array.shape == padding:
            return "A [B, S] padding mask is passed as `value_mask=`."
        return ""

    def _swap_hint(self, array: Array) -> str:
        a = len(self.attended)
        swapped = array.shape[-2 * a :] == self.sources + self.targets
        return "Did you swap T and S?" if swapped and self.sources != self.targets else ""


def _resolve(attention_axes: Shape | None, rank: int) -> tuple[int, ...]:
    """Keras's default is every axis but the first and the last; of `[T, D]`, it is T."""
    if attention_axes is None:
        return (0,) if rank == 2 else tuple(range(1, rank - 1))
    resolved = tuple(axis + rank if axis < 0 else axis for axis in attention_axes)
    if any(not 0 <= axis < rank - 1 for axis in resolved) or len(set(resolved)) < len(resolved):
        rule = f"`attention_axes` must be different axes among 0..{rank - 2} of a rank-{rank} input"
        evidence = f"attention_axes={attention_axes}"
        checks.fail(ValueError, f"{rule} (the last axis holds features).", evidence)
    return resolved


def _batch_size(axis: int, query_shape: Shape, value_shape: Shape) -> int:
    n, m = query_shape[axis], value_shape[axis]
    if n != m and 1 not in (n, m):
        rule = f"query and value must agree (or have size 1) in batch axis {axis}."
        evidence = f"query {tuple(query_shape)}, value {tuple(value_shape)}"
        remedy = "Name `attention_axes` if this axis is attended."
        checks.fail(ValueError, rule, evidence, remedy)
    return m if n == 1 else n
