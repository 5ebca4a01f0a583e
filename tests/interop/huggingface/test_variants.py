"""What else models of a family say: it agrees with transformers, or is refused by name."""

import jax
import numpy as np
import pytest
from family_variants import AGREE, REFUSE

from flax_mha import multi_head_attention
from flax_mha.interop.huggingface import load_attention

model_recordings = pytest.importorskip(
    "model_recordings", reason="torch, transformers or safetensors is not installed: [test-models]"
)
pytestmark = [pytest.mark.models, pytest.mark.slow]


@pytest.mark.parametrize("variant", AGREE)
def test_it_agrees(variant, tmp_path):
    calls = model_recordings.build(AGREE[variant], tmp_path / "model")
    layers = load_attention(tmp_path / "model", max_length=130)
    assert sorted(layers) == sorted(calls)
    for module, call in calls.items():
        layer, given = layers[module], model_recordings.passed(AGREE[variant], call)
        config = layer.config.replace(implementation="reference")
        with jax.disable_jit():
            output = multi_head_attention(
                layer.params, call.query, call.value, config=config, **layer.call, **given
            )
        limit = 2e-5 * np.abs(call.output).max()
        np.testing.assert_allclose(output, call.output, rtol=0, atol=limit, err_msg=module)


@pytest.mark.parametrize("variant", REFUSE)
def test_it_is_refused_by_name(variant, tmp_path):
    family, field = REFUSE[variant]
    model_recordings.build(family, tmp_path / "model")
    with pytest.raises((ValueError, NotImplementedError), match=field):
        load_attention(tmp_path / "model", max_length=130)
