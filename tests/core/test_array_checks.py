"""Masks of integers: 0 and 1 are taken for False and True, any other number is refused."""

import numpy as np
import pytest

from flax_mha import Mask


def test_a_mask_of_integers_is_the_boolean_one():
    numbers = np.array([[0, 1, 1], [1, 0, 1]])
    found = Mask.dense(numbers[:, None, None]).as_array(1, 3)
    np.testing.assert_array_equal(found[:, 0, 0], numbers == 1)
    assert found.dtype == bool


@pytest.mark.parametrize("number", [-1, 2, -10000])
def test_a_mask_of_another_integer_is_refused(number):
    with pytest.raises(ValueError, match="must be boolean"):
        Mask.dense(np.array([0, 1, number])[None, None, None])
