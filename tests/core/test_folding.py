"""A padding mask that is passed as a mask over scores is told where it belongs, of any rank."""

import jax.numpy as jnp
import pytest

from flax_mha.core.folding import Folding

N = 3
HINT = r"A \[B, S\] padding mask is passed as `value_mask=`\."
ONE_AXIS = Folding.of((2, 5, 3, 4), (2, 5, 6, 4), (2,))  # B = 2 x 5, T = 3, S = 6
TWO_AXES = Folding.of((2, 3, 4, 5), (2, 6, 7, 5), (1, 2))  # B = 2, T = 3 x 4, S = 6 x 7


@pytest.mark.parametrize(
    ("folding", "shape"),
    [
        (ONE_AXIS, (2, 5, 6)),
        (ONE_AXIS, (2, 6)),
        (ONE_AXIS, (6,)),
        (TWO_AXES, (2, 6, 7)),
        (TWO_AXES, (6, 7)),
    ],
    ids=str,
)
def test_a_padding_mask_of_any_rank_is_told_where_it_belongs(folding, shape):
    with pytest.raises(ValueError, match=HINT):
        folding.fold_scores("attention_mask", jnp.ones(shape, bool), N)
    with pytest.raises(ValueError, match="Received: shape") as failure:
        folding.fold_scores("bias", jnp.ones(shape), N)
    assert "value_mask" not in str(failure.value)  # a bias is not one


@pytest.mark.parametrize(
    ("folding", "shape"),
    [
        (ONE_AXIS, (2, 5, 7)),
        (ONE_AXIS, (5, 6)),
        (ONE_AXIS, (3,)),
        (TWO_AXES, (2, 3, 4)),
        (TWO_AXES, (7, 6)),
        (TWO_AXES, (7,)),
    ],
    ids=str,
)
def test_what_is_no_padding_mask_is_not_called_one(folding, shape):
    with pytest.raises(ValueError, match="Received: shape") as failure:
        folding.fold_scores("attention_mask", jnp.ones(shape, bool), N)
    assert "value_mask" not in str(failure.value)
