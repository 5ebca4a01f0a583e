"""scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels from 0 to 16, of 43 writers.

The images are split once, by a seed of their own: held-out ones are for the last judgement alone,
validation ones for looks while training.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from flax_mha.demo.extras import require
from flax_mha.demo.settings import DemoError

SIDE, INK, CLASSES = 8, 16, 10
_SPLIT_SEED = 0


@dataclasses.dataclass(frozen=True)
class DigitSettings:
    """How many images are not learned from."""

    held_out: int = 360
    validation: int = 180


class Digits(NamedTuple):
    """Images and what they show."""

    images_BXY: np.ndarray  # float32, 0 to 1
    labels_B: np.ndarray  # int32


class Split(NamedTuple):
    """Three disjoint parts."""

    train: Digits
    validation: Digits
    held_out: Digits


def load_split(settings: DigitSettings) -> Split:
    """The images in a random order that is always the same, cut in three.

    Raises:
        DemoError: scikit-learn is not installed, or no image is left to learn from.
    """
    require("sklearn", "the digits")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    judged = settings.held_out + settings.validation
    if judged >= len(images):
        rule = f"data.held_out + data.validation must be below the number of images, {len(images)}"
        raise DemoError(f"{rule}. Received: {settings.held_out} + {settings.validation}.")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    pixels = (images / INK).astype(np.float32).reshape(-1, SIDE, SIDE)
    parts = np.split(order, [settings.held_out, judged])
    held_out, validation, train = (Digits(pixels[i], labels[i].astype(np.int32)) for i in parts)
    return Split(train, validation, held_out)


def batch_of(digits: Digits, size: int, seed: tuple[int, int]) -> Digits:
    """Random images."""
    chosen_B = np.random.default_rng(seed).integers(len(digits.labels_B), size=size)
    return Digits(digits.images_BXY[chosen_B], digits.labels_B[chosen_B])


def drawing(image_XY: np.ndarray) -> list[str]:
    """The image as characters, two a pixel.

    Example:
        >>> drawing(np.array([[0.0, 0.5], [1.0, 0.25]]))
        ['  ==', '@@::']
    """
    shades = " .:-=+*#@"
    level_XY = np.rint(image_XY * (len(shades) - 1)).astype(int)
    return ["".join(2 * shades[level] for level in row) for row in level_XY]
