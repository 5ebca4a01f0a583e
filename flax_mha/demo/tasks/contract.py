"""What a task is: settings, data, a model, a loss, a judgement, and what can be done with a run.

`train.py` and `run.py` know tasks by this contract alone. A new task is one file beside this one,
and one line in `TASKS`.
"""

import abc
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import linen as nn

from flax_mha.core.typing import Array
from flax_mha.demo.page import AttentionMap
from flax_mha.demo.settings import DemoError, Settings
from flax_mha.demo.terminal import Screen

Batch = Any  # a pytree of numpy arrays
Path = tuple[str, ...]  # the names that lead to a part of a tree
Records = list[dict[str, Any]]


class Task(abc.ABC):
    """One thing to learn, under the settings of one run.

    Attributes:
        sections: the dataclass of each of `[data]`, `[model]` and `[train]`.
        unit: what there is so much of a second, as "bytes".
    """

    sections: ClassVar[Mapping[str, type]]
    unit: ClassVar[str]

    def __init__(self, settings: Settings) -> None:
        """Reads no data yet: what only looks at a run needs none."""
        self.settings = settings

    @functools.cached_property
    @abc.abstractmethod
    def model(self) -> nn.Module:
        """The linen module; its fields `attention` and `sow_attention_scores` are the layers'."""

    @property
    def attention_paths(self) -> list[Path]:
        """Where in the parameters the attention layers are; here, one in each block."""
        return [(f"block_{i}", "attention") for i in range(self.settings.model.layers)]

    @property
    @abc.abstractmethod
    def units_a_step(self) -> int:
        """How much of `unit` one step learns from."""

    @abc.abstractmethod
    def example(self) -> Batch:
        """A batch of one with the shapes and dtypes of real ones."""

    @abc.abstractmethod
    def about(self) -> str:
        """One line about the data; reads them."""

    @abc.abstractmethod
    def batches(self, done: int) -> Iterator[Batch]:
        """The batches after the first `done`: a function of the seed and the step alone."""

    @abc.abstractmethod
    def inputs(self, batch: Batch) -> tuple[Array, ...]:
        """What the model is called with."""

    @abc.abstractmethod
    def nats(self, logits: Array, batch: Batch) -> Array:
        """The mean cross entropy of a batch."""

    @abc.abstractmethod
    def measures(self, nats: float) -> dict[str, float]:
        """The training loss by the name and in the unit in which it is shown: one entry."""

    @abc.abstractmethod
    def glance(self, params: Any) -> dict[str, float]:
        """A look at data that are not trained on, while training: one entry."""

    @abc.abstractmethod
    def judge(self, params: Any, screen: Screen) -> Records:
        """Prints what came of the training, on held-out data; returns the same as records."""

    @abc.abstractmethod
    def maps(self, params: Any, text: str | None = None) -> list[AttentionMap]:
        """What every attention layer looks at, for an input or for a held-out example.

        Raises:
            DemoError: the input is not the task's.
        """

    def scores(self, params: Any, *inputs: Array) -> list[np.ndarray]:
        """The attention weights of every layer of `attention_paths`, of the first example."""
        # Asked for by name: only the reference is bound to give them.
        attention = self.settings.attention.replace(implementation="reference")
        watched = self.model.clone(attention=attention, sow_attention_scores=True)
        _, sown = watched.apply({"params": params}, *inputs, mutable=["intermediates"])
        found = []
        for path in self.attention_paths:
            node = at(sown["intermediates"], path)
            found.append(np.asarray(node["attention_scores"][0][0], np.float32))
        return found

    def change_attention(self, params: Any, change: Callable[[Path, Any], Any]) -> Any:
        """The parameters with those of every attention layer changed: `change(path, of_layer)`."""
        for path in self.attention_paths:
            params = _replaced(params, path, change(path, at(params, path)))
        return params

    def yardsticks(self, results: Records) -> dict[str, float]:
        """What others reach, in the measure of `glance`: lines in the picture of the training."""
        return {}

    def show(self, params: Any, screen: Screen) -> str:
        """Prints what the model makes, and returns it; nothing, unless the task makes something."""
        return ""

    def predict(self, params: Any, inputs: Sequence[str], screen: Screen) -> None:
        """Prints predictions for the inputs, or for some held-out ones.

        Raises:
            DemoError: the inputs are not the task's, or it predicts nothing.
        """
        rule = f"the task {self.settings.task!r} does not predict"
        raise DemoError(f"{rule}. Use `generate RUN --prompt TEXT`.")

    def generate(
        self, params: Any, prompt: str, count: int, how: Any, screen: Screen, stored: Any = None
    ) -> None:
        """Prints text that continues the prompt; `stored` says what is in int8.

        Raises:
            DemoError: the task is not a language model.
        """
        rule = f"the task {self.settings.task!r} does not generate text"
        raise DemoError(f"{rule}. Use `predict RUN`.")


def at(tree: Any, path: Path) -> Any:
    """The part of a tree of dicts."""
    return functools.reduce(lambda found, name: found[name], path, tree)


def _replaced(tree: Any, path: Path, part: Any) -> Any:
    name, *rest = path
    return {**tree, name: _replaced(tree[name], tuple(rest), part) if rest else part}


def count_parameters(params: Any) -> int:
    """The number of trained numbers."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
