"""Which digit is it? Real handwriting, read by attention along both axes of the image."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_mha.core.typing import Array
from flax_mha.demo.data.digits import (
    CLASSES,
    SIDE,
    Digits,
    DigitSettings,
    Split,
    batch_of,
    drawing,
    load_split,
)
from flax_mha.demo.models.pixels import Pixels, PixelsSettings
from flax_mha.demo.page import AttentionMap
from flax_mha.demo.settings import DemoError, TrainSettings
from flax_mha.demo.tasks.contract import Records, Task, count_parameters
from flax_mha.demo.terminal import Screen

_SHOWN = 4


class DigitsTask(Task):
    """p(digit | image)."""

    sections: ClassVar = {"data": DigitSettings, "model": PixelsSettings, "train": TrainSettings}
    unit = "digits"

    @functools.cached_property
    def model(self) -> Pixels:
        """A Transformer over pixels."""
        return Pixels(self.settings.model, self.settings.attention, CLASSES)

    @functools.cached_property
    def split(self) -> Split:
        """The images, read when they are first needed."""
        return load_split(self.settings.data)

    @property
    def units_a_step(self) -> int:
        """Images."""
        return self.settings.train.batch_size

    def example(self) -> Digits:
        """One image."""
        return Digits(np.zeros((1, SIDE, SIDE), np.float32), np.zeros(1, np.int32))

    def about(self) -> str:
        """How many images."""
        train, validation, held_out = (len(part.labels_B) for part in self.split)
        parts = f"{train} to learn from, {validation} to look at, {held_out} held out"
        return f"Digits: scikit-learn's, {parts}."

    def batches(self, done: int) -> Iterator[Digits]:
        """Random images."""
        train = self.settings.train
        for step in itertools.count(done + 1):
            yield batch_of(self.split.train, train.batch_size, (train.seed, step))

    def inputs(self, batch: Digits) -> tuple[Array, ...]:
        """The images."""
        return (jnp.asarray(batch.images_BXY),)

    def nats(self, logits: Array, batch: Digits) -> Array:
        """Of the labels."""
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels_B).mean()

    def measures(self, nats: float) -> dict[str, float]:
        """As it is."""
        return {"cross_entropy": nats}

    def glance(self, params: Any) -> dict[str, float]:
        """The share of the validation images that are read rightly."""
        return {"accuracy": self._accuracy(params, self.split.validation)}

    def judge(self, params: Any, screen: Screen) -> Records:
        """Held-out accuracy, and which digits are taken for which."""
        guessed_B = self._probabilities(params, self.split.held_out).argmax(-1)
        labels_B = self.split.held_out.labels_B
        right, size = int((guessed_B == labels_B).sum()), count_parameters(params)
        screen.table(
            "Held-out digits",
            ["digit", "images", "right", "taken for"],
            [_row(digit, guessed_B[labels_B == digit]) for digit in range(CLASSES)],
        )
        screen.say(
            f"Held-out accuracy: {right} of {len(labels_B)}, {right / len(labels_B):.1%}; "
            f"{size:,} parameters."
        )
        accuracy = right / len(labels_B)
        return [{"images": len(labels_B), "right": right, "accuracy": accuracy, "parameters": size}]

    def predict(self, params: Any, inputs: Sequence[str], screen: Screen) -> None:
        """Of held-out images, by number: each drawn, read, and the truth told."""
        chosen = [self._number(text) for text in inputs] or list(range(_SHOWN))
        digits = Digits(*(part[chosen] for part in self.split.held_out))
        for i, image, label, probability in zip(
            chosen, *digits, self._probabilities(params, digits), strict=True
        ):
            guessed = int(probability.argmax())
            screen.say("\n".join(drawing(image)))
            verdict = "right" if guessed == label else "wrong"
            screen.say(
                f"held-out {i}: read as {guessed} (probability {probability[guessed]:.3f}), "
                f"is {label}: {verdict}\n"
            )

    def maps(self, params: Any, text: str | None = None) -> list[AttentionMap]:
        """One map a layer, of a held-out image; its pixels in a row."""
        image_XY = self.split.held_out.images_BXY[0 if text is None else self._number(text)]
        labels = [f"{x},{y}" for x, y in np.ndindex(image_XY.shape)]
        return [
            AttentionMap(
                f"layer {i} attention over both axes",
                scores.reshape(len(scores), len(labels), len(labels)),
                labels,
                labels,
                image_XY,
            )
            for i, scores in enumerate(self.scores(params, jnp.asarray(image_XY[None])))
        ]

    def _number(self, text: str) -> int:
        """Of a held-out image."""
        count = len(self.split.held_out.labels_B)
        if not text.isdecimal() or int(text) >= count:
            rule = f"a held-out digit is named by a number from 0 to {count - 1}"
            raise DemoError(f"{rule}. Received: {text!r}.")
        return int(text)

    def _accuracy(self, params: Any, digits: Digits) -> float:
        guessed_B = self._probabilities(params, digits).argmax(-1)
        return float((guessed_B == digits.labels_B).mean())

    def _probabilities(self, params: Any, digits: Digits) -> np.ndarray:
        return np.asarray(_probabilities(self.model, params, digits.images_BXY))


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(model: Pixels, params: Any, image_BXY: Array) -> Array:
    logits_BY: Any = model.apply({"params": params}, image_BXY)
    return jax.nn.softmax(logits_BY)


def _row(digit: int, guessed: np.ndarray) -> list[str]:
    """One line of the table: what images of a digit were taken for."""
    wrong = [str(other) for other in guessed.tolist() if other != digit]
    right = len(guessed) - len(wrong)
    return [str(digit), str(len(guessed)), str(right), ", ".join(sorted(wrong))]
