"""Which look-ups of a function of pairs are held against the number of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import Mask

TABLE = np.arange(4)


def looked_up(index, **how):
    return jax.lax.dynamic_index_in_dim(jnp.asarray(TABLE), index, keepdims=False, **how)


@pytest.mark.parametrize("how", [{}, {"allow_negative_indices": False}])
def test_the_place_of_a_query_is_looked_up_in_as_many_entries(how):
    mask = Mask.function(lambda b, n, t, s: looked_up(t, **how) <= s)
    np.testing.assert_array_equal(mask.as_array(4, 5)[0, 0], TABLE[:, None] <= np.arange(5))
    with pytest.raises(ValueError, match=r"by `t` needs T entries\. .*\(4,\).* T = 7"):
        mask.as_array(7, 5)


@pytest.mark.parametrize("how", [{}, {"allow_negative_indices": False}])
@pytest.mark.parametrize("otherwise", [lambda t, s: t * 0, lambda t, s: s * 0 + 1])
def test_a_place_that_is_computed_is_not_judged(otherwise, how):
    """One of them is chosen where JAX would wrap a negative number, and is no such sum."""
    index = lambda t, s, where: where(t > 3, otherwise(t, s), t)
    mask = Mask.function(lambda b, n, t, s: looked_up(index(t, s, jnp.where), **how) <= s)
    t, s = np.indices((7, 5))
    np.testing.assert_array_equal(mask.as_array(7, 5)[0, 0], TABLE[index(t, s, np.where)] <= s)
