"""The public names, written out: nothing becomes public, or vanishes, unseen."""

import ast
import importlib
import pathlib
import re

import pytest
from docstring_rules import public_names

import flax_mha
from flax_mha import __main__ as overview

ROOT = pathlib.Path(__file__).parents[1]
PUBLIC = {
    "flax_mha": """
        Activations BlockMask ContextAxis CrossCache KVCache Latent Lora Mask MultiHeadAttention
        MultiHeadAttentionConfig Neighborhood activity_loss apply_constraints attention_scores
        block_mask constrain
        context_parallel_attention dot_product_attention explain forward init_cache
        init_cross_cache init_params lora_params merge_lora multi_head_attention param_axes
        param_shapes param_specs dequantize_params quantize_params
        regularization_loss split_lora zigzag_inverse zigzag_order
    """,
    "flax_mha.attention": "DistanceBias Residuals merge",
    "flax_mha.interop.equinox": "from_equinox to_equinox",
    "flax_mha.interop.flax": """
        attention_fn from_flax_params from_linen_module from_nnx_module to_flax_params to_nnx_state
    """,
    "flax_mha.interop.huggingface": """
        AttentionAdapter AttentionLayer AttentionList AttentionRecord list_attention load_adapter
        load_attention save_adapter save_attention
    """,
    "flax_mha.interop.jax_nn": "dot_product_attention",
    "flax_mha.interop.keras": """
        KerasLayer from_keras_adapters from_keras_layer from_keras_weights
        list_keras_layers load_attention load_keras_file
        read_keras_arrays save_keras_weights to_keras_weights
    """,
    "flax_mha.interop.torch": """
        from_linear_layers from_torch_module from_torch_state_dict load_safetensors mask_from_torch
        mask_to_torch to_linear_layers to_torch_state_dict
    """,
    "flax_mha.keras.constraints": "Constraint MaxNorm MinMaxNorm NonNeg UnitNorm",
    "flax_mha.keras.initializers": """
        Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity Initializer LecunNormal
        LecunUniform Ones Orthogonal RandomNormal RandomUniform TruncatedNormal VarianceScaling
        Zeros compute_fans
    """,
    "flax_mha.keras.regularizers": "L1 L1L2 L2 OrthogonalRegularizer Regularizer",
    "flax_mha.nnx": "MultiHeadAttention",
    "flax_mha.norms": "L2Norm LayerNorm Norm RMSNorm register",
    "flax_mha.plots": "plot_attention plot_bands plot_mask",
    "flax_mha.positions": """
        Alibi AxialRotary DenseBias DistanceFunction DynamicScaling GridBias LinearScaling
        Llama3Scaling LongRopeScaling PositionFunction ProportionalScaling QueryGrowth RelativeBias
        Rotary Scaling Score YarnScaling alibi_slopes register
    """,
}
# Handed on at the top too, where people find them first.
ALSO = {
    "flax_mha.layer": "Activations CrossCache KVCache",
    "flax_mha.params": "dequantize_params init_params lora_params merge_lora param_shapes"
    " quantize_params split_lora",
    "flax_mha.sharding": "param_axes param_specs",
    "flax_mha.training": "activity_loss apply_constraints constrain regularization_loss",
}
# Public, and neither functions nor classes.
TABLES = {"flax_mha.IMPLEMENTATIONS", "flax_mha.attention.IMPLEMENTATIONS", "flax_mha.__version__"}


def listed(table):
    return {f"{module}.{name}" for module, names in table.items() for name in names.split()}


ALL = listed(PUBLIC) | listed(ALSO) | TABLES


def test_the_public_names_are_these():
    found = {public.name for public in public_names() if public.owner is None}
    assert found == listed(PUBLIC)


@pytest.mark.parametrize("folder", ALSO)
def test_a_folder_that_the_top_hands_on_has_no_name_more(folder):
    assert set(overview.handed_on(folder)) == set(ALSO[folder].split())
    for name in overview.handed_on(folder):
        assert getattr(importlib.import_module(folder), name) is getattr(flax_mha, name)


# --- what the pages and the docstrings teach ----------------------------------------------------


def imports(code):
    """The full names that Python code imports from this package."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flax_mha":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def code_of(page):
    """The Python that a page of Markdown, or a docstring, shows."""
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^ *>>> (from flax_mha.*)$", page, flags=re.MULTILINE)
    return "\n".join([*blocks, *lines])


def is_public(name):
    """A public name, or a module that leads to some."""
    return name in ALL or any(other.startswith(f"{name}.") for other in ALL)


def private_in(page):
    return sorted(name for name in imports(code_of(page)) if not is_public(name))


def test_the_pages_import_public_names_alone():
    pages = [ROOT / "README.md", *(ROOT / "flax_mha").rglob("*.md")]
    assert {page.name: private_in(page.read_text()) for page in pages} == {
        page.name: [] for page in pages
    }


def test_the_docstrings_import_public_names_alone():
    docs = {public.name: public.doc for public in public_names()}
    assert {name for name, doc in docs.items() if private_in(doc)} == set()
    assert sum(bool(imports(code_of(doc))) for doc in docs.values()) > 10


def test_a_private_name_in_a_page_is_found():
    page = "```python\nfrom flax_mha.layer.caches import extend\nfrom flax_mha import Mask\n```\n"
    assert private_in(page) == ["flax_mha.layer.caches.extend"]
    assert private_in(">>> from flax_mha.attention.merge import merge\n") == [
        "flax_mha.attention.merge.merge"
    ]


def test_every_public_module_stands_in_a_page():
    pages = [ROOT / "README.md", *(ROOT / "flax_mha").rglob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    assert [module for module in PUBLIC if not re.search(rf"\b{module}\b", text)] == []
