"""Whether a function of pairs looks up an array beyond its end, where JAX gives the last entry."""

from flax_mha.core import checks
from flax_mha.core.pairs.expression import Atom, Constant, Expression, Step

LETTERS = "bnts"


def check_lookups(expression: Expression, letters: dict[int, str], sizes: dict[str, int]) -> None:
    """Refuses `array[t]` of fewer entries than there are queries, and so for every index.

    An index that is computed may stay within the array for reasons of its own: it is not judged.

    Raises:
        ValueError: with the array's shape and the index.
    """
    made = {x: step for step in expression.steps for x in step.outputs}
    for step in expression.steps:
        if step.primitive.name != "dynamic_slice":
            continue
        array, *places = step.inputs
        shape = expression.shape(array) if isinstance(array, int) else ()
        for axis, (size, taken, place) in enumerate(zip(shape, step.params["slice_sizes"], places)):
            letter = letters.get(_bare(made, place))
            if letter is not None and taken == 1 and sizes[letter] > size:
                _fail(letter, sizes[letter], shape, axis)


def _bare(made: dict[int, Step], place: Atom) -> int:
    """The index itself, of what JAX makes of `array[index]`: where(index < 0, index + n, index)."""
    step = made.get(place) if isinstance(place, int) else None
    if step is None:
        return place if isinstance(place, int) else -1
    if step.primitive.name != "select_n" or len(step.inputs) != 3:
        return -1
    index, other = step.inputs[1:]
    added = made.get(other) if isinstance(other, int) else None
    is_wrap = added is not None and added.primitive.name == "add" and added.inputs[0] == index
    return index if is_wrap and isinstance(index, int) and not isinstance(index, Constant) else -1


def _fail(letter: str, size: int, shape: tuple[int, ...], axis: int) -> None:
    capital = letter.upper()
    rule = f"A function of pairs that looks up an array by `{letter}` needs {capital} entries."
    evidence = f"an array of shape {shape}, whose axis {axis} is looked up, and {capital} = {size}"
    last = f"jnp.minimum({letter}, {shape[axis] - 1})"
    remedy = f"JAX would give the last entry, silently; if that is meant, write `{last}`."
    checks.fail(ValueError, rule, evidence, remedy)
