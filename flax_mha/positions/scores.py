"""Score functions of a layer: what becomes of each logit, perhaps by parameters of their own."""

import inspect
import re
import zlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.core import checks, tree_checks
from flax_mha.core.frozen import Frozen
from flax_mha.core.typing import Array, PRNGKey, Shape

# The arguments of every score; and the names by which regularizers and constraints go.
_TAKEN = ("logits", "b", "n", "t", "s", "kernel", "bias")


class Score(Frozen):
    """What becomes of the logit of one query and one key: any rule, and its own parameters.

        logits[b, n, t, s] = score(logits[b, n, t, s], b, n, t, s, **params)

    The logits come scaled, soft-capped, with the caller's `bias=` and that of the config's
    `position` added; the mask comes after. A subclass is a frozen dataclass, equal by its fields:
    see `register`. Its function is that of `dot_product_attention(..., score=)`: of numbers, traced
    once. b counts all batch axes as one, t and s are places in raster order of the attended axes;
    with a cache they are positions in the whole sequence.

    Parameters are `param_sizes`; the layer's tree holds them as `{"score": {name: array}}`, and
    hands them in by name, in the dtype of the logits. No regularizer or constraint touches them.

    Memory: O(T + S): nothing is made for each pair.

    Example:
        >>> import dataclasses
        >>> import jax, jax.numpy as jnp, flax_mha
        >>> from flax_mha.positions import Score
        >>> class Alibi(Score):
        ...     def __call__(self, logits, b, n, t, s):
        ...         return logits - 2.0 ** -(n + 1) * abs(t - s)
        >>> @dataclasses.dataclass(frozen=True)
        ... class ByDistance(Score):
        ...     reach: int = 8
        ...
        ...     def param_sizes(self, num_heads):
        ...         return {"table": {"X": 2 * self.reach + 1, "N": num_heads}}
        ...
        ...     def __call__(self, logits, b, n, t, s, table):
        ...         return logits + table[jnp.clip(s - t, -self.reach, self.reach) + self.reach, n]
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=16, score=ByDistance())
        >>> x = jax.random.normal(jax.random.key(0), (4, 10, 32))
        >>> params = flax_mha.init_params(jax.random.key(1), config, x.shape)
        >>> params["score"]["table"].shape
        (17, 2)
        >>> flax_mha.multi_head_attention(params, x, x, config=config).shape
        (4, 10, 32)
        >>> Alibi().param_sizes(num_heads=2), ByDistance().param_sizes(num_heads=2)
        ({}, {'table': {'X': 17, 'N': 2}})
        >>> ByDistance().initial("table", jax.random.key(0), (17, 2), "float32").any()
        Array(False, dtype=bool)
    """

    def param_sizes(self, num_heads: int) -> Mapping[str, Mapping[str, int]]:
        """The sizes of each parameter's axes by their letters, of a layer of `num_heads` heads.

        `{"table": {"X": 32, "N": num_heads}}` is one array `[X, N]`; by the letters the axes are
        named for a mesh, "N" as the heads. `{}` is a single number.
        """
        return {}

    def initial(self, name: str, init_key: PRNGKey, shape: Shape, dtype: Any) -> Array:
        """The first value of the parameter `name`, of this `shape` and `dtype`: zeros.

        `init_key` is a key of this parameter alone, of a layer's.
        """
        return jnp.zeros(shape, dtype)

    @abstractmethod
    def __call__(
        self, logits: Array, b: Array, n: Array, t: Array, s: Array, /, *args: Any, **params: Any
    ) -> Array:
        """The new logit of the old one, `logits`, and the indices of the pair; all are numbers."""


def sizes_of_params(score: Score | None, num_heads: int) -> dict[str, dict[str, int]]:
    """The parameters of a score, `{name: {letter: size}}`, found to be such."""
    if score is None:
        return {}
    owner, sizes = type(score).__name__, score.param_sizes(num_heads)
    rule = f"`{owner}.param_sizes` must be {{name: {{letter: size}}}}."
    remedy = 'For example `{"table": {"X": 32, "N": num_heads}}`.'
    if not isinstance(sizes, Mapping) or not all(isinstance(x, Mapping) for x in sizes.values()):
        checks.fail(TypeError, rule, repr(sizes), remedy)
    for name, axes in sizes.items():
        if not isinstance(name, str) or not name.isidentifier() or name in _TAKEN:
            named = f"A parameter of `{owner}` needs a name of its own, an argument of `__call__`."
            checks.fail(ValueError, named, repr(name), f"Not among {', '.join(_TAKEN)}.")
        if not all(isinstance(x, str) and re.fullmatch("[A-Z]", x) for x in axes):
            checks.fail(ValueError, rule, f"axes {list(axes)} of {name!r}", remedy)
    return {
        name: {x: checks.integer(f"{name}.{x}", n, minimum=1) for x, n in axes.items()}
        for name, axes in sizes.items()
    }


def check_score(score: Score | None, num_heads: int) -> None:
    """The function takes its parameters, and what it is can be a static argument."""
    if score is None:
        return
    names, owner = sizes_of_params(score, num_heads), type(score).__name__
    signature = inspect.signature(score)
    try:
        signature.bind(*range(5), **dict.fromkeys(names))
    except TypeError:
        form = ", ".join(["logits", "b", "n", "t", "s", *names])
        rule = f"`{owner}.__call__` must take ({form}), its parameters by name."
        checks.fail(TypeError, rule, f"{signature}")
    try:
        hash(score)
    except TypeError as error:
        rule = f"The fields of `{owner}` must be hashable, for they are static."
        remedy = "An array is a parameter (`param_sizes`), or one that `__call__` closes over."
        checks.fail(TypeError, rule, str(error), remedy)


def letters_of_params(score: Score | None, num_heads: int) -> dict[str, str]:
    """The letters of each parameter's axes."""
    return {name: "".join(axes) for name, axes in sizes_of_params(score, num_heads).items()}


def init_params_of(score: Score, init_key: PRNGKey, shapes: Mapping[str, Any]) -> dict[str, Array]:
    """The first values, each by a key that depends on its own name alone."""
    values = {
        name: score.initial(
            name, jax.random.fold_in(init_key, zlib.crc32(name.encode())), like.shape, like.dtype
        )
        for name, like in shapes.items()
    }
    for name, like in shapes.items():
        tree_checks.initial_values(values[name], like)
    return values
