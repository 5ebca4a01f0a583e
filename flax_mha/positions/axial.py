"""Rotary embedding where a token stands at several numbers: time, row and column of a picture.

Each pair of features turns by the position along one of the axes. Models differ in which pairs
belong to which axis, and in where each axis's frequencies begin: that is the `layout`.

Reference: Wang et al., "Qwen2-VL", https://arxiv.org/abs/2409.12191 (M-RoPE).
"""

import dataclasses
from typing import Annotated, ClassVar

import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.frozen import Positive, choice
from flax_mha.core.typing import Array
from flax_mha.positions import rules
from flax_mha.positions.rotary import Rotary

LAYOUTS = ("whole", "in_turns", "restarted", "dealt")


@dataclasses.dataclass(frozen=True)
class AxialRotary(Rotary):
    """Rotary embedding by positions of several axes, such as rows and columns.

        (a, b) of pair i  ->  (a cos - b sin, b cos + a sin),   angle = unit p[axis of i] w_i

    A call takes `positions=` of `[axes, B, T]`, integers or floats; one array `[B, T]`, or None for
    0, 1, 2, ..., stands for all axes: text. A token at 0 on every axis is not turned: so class and
    register tokens are given. Integers are exact at any size, floats have the precision of float32.

    Args:
        base: as in `Rotary`; of each section alone where `layout="restarted"`.
        dim: as in `Rotary`; the sections are half of it.
        interleaved: as in `Rotary`: how features pair, not how axes take turns.
        scaling: as in `Rotary`.
        sections: pairs of each axis, as many as half of the features that turn.
        layout: "whole" (Qwen2-VL, GLM-4V): sections one after the other, w_i falls over all of
            them. "in_turns" (Qwen3-VL): w_i likewise, pairs 0, 1, 2, 3, ... belong to axes 0, 1, 2,
            0, ..., and those that are left over to axis 0. "restarted" (DINOv3; the vision towers
            of Qwen2-VL and Llama 4): sections one after the other, w_i begins at 1 in each of n
            pairs and is base^(-i / n). "dealt" (Pixtral): sections one after the other, of which
            each has every second (third, ...) of the w_i.
        unit: the angle of position 1 at w = 1, in radians; 2 pi for DINOv3, whose coordinates are
            floats in [-1, 1].

    Raises:
        ValueError: sections that are not half of the features, or not those of the layout.

    Reference: Wang et al., "Qwen2-VL", https://arxiv.org/abs/2409.12191; Simeoni et al., "DINOv3",
    https://arxiv.org/abs/2508.10104.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_mha.positions import AxialRotary
        >>> rows_and_columns = AxialRotary(sections=(2, 2), layout="restarted", base=100.0)
        >>> rows_and_columns.frequencies(8).tolist(), rows_and_columns.axes
        ([1.0, 0.1, 1.0, 0.1], 2)
        >>> at_ABT = jnp.array([[[0, 0, 1, 1]], [[0, 1, 0, 1]]])  # a picture of 2 x 2 patches
        >>> turned = rows_and_columns(jnp.ones((1, 4, 1, 8)), at_ABT)
        >>> bool((turned[0, 0] == 1).all()), [round(float(x), 4) for x in turned[0, 1, 0, :4]]
        (True, [1.0, 1.0, -0.3012, 0.8952])
        >>> AxialRotary(sections=(3, 2, 2), layout="in_turns").pair_axes.tolist()
        [0, 1, 2, 0, 1, 2, 0]
    """

    takes_floats: ClassVar[bool] = True
    _ranks: ClassVar[tuple[int, ...]] = (2, 3)

    sections: Annotated[tuple[int, ...], rules.sections] = dataclasses.field(kw_only=True)
    layout: Annotated[str, choice(*LAYOUTS)] = "whole"
    unit: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        A, pairs = self.axes, sum(self.sections)
        fits = {
            "in_turns": tuple(np.bincount(self.pair_axes, minlength=A).tolist()),
            "dealt": tuple(len(range(axis, pairs, A)) for axis in range(A)),
        }
        if fits.get(self.layout, self.sections) != self.sections:
            rule = f"`sections` of layout={self.layout!r} must be as many as come out in turns."
            evidence = f"sections={self.sections}, of which {fits[self.layout]} come out"
            checks.fail(ValueError, rule, evidence)

    @property
    def axes(self) -> int:
        return len(self.sections)

    @property
    def pair_axes(self) -> np.ndarray:
        """The axis to which each pair belongs, integers `[dim / 2]`."""
        A = self.axes
        if self.layout != "in_turns":
            return np.repeat(np.arange(A), self.sections)
        axis_i = np.zeros(sum(self.sections), int)
        for axis in range(1, A):
            axis_i[axis : A * self.sections[axis] : A] = axis
        return axis_i

    def frequencies(self, H: int) -> np.ndarray:
        dim, A = self._dim_of(H), self.axes
        if 2 * sum(self.sections) != dim:
            rule = "`sections` must sum to half of the features that turn."
            evidence = f"sections={self.sections}, {dim} features"
            remedy = f"Set `dim={2 * sum(self.sections)}` to leave the others as they are."
            checks.fail(ValueError, rule, evidence, remedy if dim > 2 * sum(self.sections) else "")
        if self.layout == "restarted":
            return self.unit * np.concatenate([self._scaled(2 * n) for n in self.sections])
        whole = self.unit * self._scaled(dim)
        if self.layout == "dealt":
            return np.concatenate([whole[axis::A] for axis in range(A)])
        return whole

    def _of_pairs(self, position_bT: Array) -> Array:
        """`[b, T, i]` of positions `[axes, b, T]`; of `[b, T]`, one for all pairs."""
        if position_bT.ndim == 2:
            return position_bT[..., None]
        if len(position_bT) != self.axes:
            rule = f"Positions must be [axes, B, T] with {self.axes} axes, or [B, T]."
            checks.fail(ValueError, rule, f"shape {position_bT.shape}")
        first, *others = position_bT[..., None]
        axis_11i = self.pair_axes[None, None]
        for axis, other in enumerate(others, start=1):
            first = jnp.where(axis_11i == axis, other, first)
        return first
