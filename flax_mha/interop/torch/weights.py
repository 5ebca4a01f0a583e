"""A state dict, separate Linear layers or a live module of PyTorch: its weights, in and out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import boxes, checks
from flax_mha.core.typing import Params, ParamsLike
from flax_mha.interop.torch.layouts import PARTS, from_layout, to_layout
from flax_mha.interop.torch.models import EXTRAS, MODELS, PACKED, SEPARATE, Layout, linear_layers
from flax_mha.params.tree import features_of, places

LAYOUTS = ("torch", *MODELS)


def from_torch_state_dict(
    state: Mapping[str, Any],
    config: MultiHeadAttentionConfig,
    *,
    layout: str = "torch",
    prefix: str = "",
) -> Params:
    """The parameters of one attention layer from a PyTorch model's `state_dict()`.

    Args:
        state: arrays by name: NumPy's, torch's, or whatever `np.asarray` takes. A whole model's
            will do: only the layer's own arrays are read.
        config: the layer. Its heads must be the model's: weights do not tell 4 heads of 8 from 8
            of 4. `use_bias` says which biases there are: one that it has and the model lacks is
            made of zeros, and after training has no place there; so name those of the model.
            Dtypes stay those of the arrays.
        layout: how the arrays are named and laid out, one of `LAYOUTS`:
            "torch"   `torch.nn.MultiheadAttention`, packed or with kdim and vdim
            "bert"    `attention.self.query.weight` and so on; RoBERTa and ELECTRA too
            "llama"   `self_attn.q_proj.weight` and so on, grouped heads; Mistral too, and with
                      `use_sinks` gpt-oss
            "qwen2"   as "llama", `use_bias=("query", "key", "value")`
            "qwen3"   as "llama", with the scales of `qk_norm="rms"`
            "gpt2"    `attn.c_attn.weight`, transposed and packed (Conv1D)
        prefix: what stands before these names, such as "encoder.layer.0.".

    Returns:
        The tree of `init_params`; `multi_head_attention` with it gives the model's numbers.

    Raises:
        ValueError: an array is missing, does not fit (with its letters, its shape and the likely
            cause), or belongs to the layer and has no place here (`bias_k`, `q_norm`, adapters).
        TypeError: arrays that are not floats.

    Differs from torch: (1) inputs have the batch first; (2) `num_kv_heads` says how heads are
    grouped.

    Example:
        >>> import numpy as np
        >>> from flax_mha import MultiHeadAttentionConfig
        >>> from flax_mha.interop.torch import from_torch_state_dict
        >>> shapes = {"q": (32, 24), "k": (16, 24), "v": (16, 24), "o": (24, 32)}
        >>> state = {f"self_attn.{x}_proj.weight": np.ones(shapes[x], "float32") for x in shapes}
        >>> config = MultiHeadAttentionConfig(4, 8, num_kv_heads=2, use_bias=False)
        >>> from_torch_state_dict(state, config, layout="llama")["key"]["kernel"].shape
        (24, 2, 8)
    """
    checks.one_of("layout", layout, LAYOUTS)
    packed = isinstance(state, Mapping) and f"{prefix}in_proj_weight" in state
    return from_layout(_layout(layout, packed), state, config, prefix)


def to_torch_state_dict(
    params: ParamsLike,
    config: MultiHeadAttentionConfig,
    *,
    layout: str = "torch",
    prefix: str = "",
) -> dict[str, np.ndarray]:
    """The inverse of `from_torch_state_dict`, bit for bit.

    Args:
        params: what `init_params` returns.
        config: the layer.
        layout: one of `LAYOUTS`; "torch" packs the input projections where torch does.
        prefix: what to put before the names.

    Returns:
        NumPy arrays by name. For torch, `torch.from_numpy(array)`; of a bfloat16 array,
        `torch.from_numpy(array.view("int16")).view(torch.bfloat16)`.

    Raises:
        ValueError: sizes that such a model cannot have, or a bias for which it has no place.

    Example:
        >>> import jax
        >>> from flax_mha import MultiHeadAttentionConfig, init_params
        >>> from flax_mha.interop.torch import to_torch_state_dict
        >>> config = MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> params = init_params(jax.random.key(0), config, (8, 32))
        >>> for name, array in to_torch_state_dict(params, config).items():
        ...     print(name, array.shape)
        in_proj_weight (96, 32)
        in_proj_bias (96,)
        out_proj.weight (32, 32)
        out_proj.bias (32,)
    """
    checks.one_of("layout", layout, LAYOUTS)
    checks.mapping("params", params)
    boxes.refuse(params, "params")
    D, M, C = features_of(params).values()
    return to_layout(_layout(layout, packed=D == C == M), params, config, prefix)


def from_linear_layers(
    state: Mapping[str, Any],
    config: MultiHeadAttentionConfig,
    *,
    names: Mapping[str, str],
    without_bias: Sequence[str] = (),
    ignore: Sequence[str] = (),
    prefix: str = "",
) -> Params:
    """The parameters of a layer that keeps each projection in a `Linear` of its own.

    Args:
        state: arrays by name, as in `from_torch_state_dict`.
        config: the layer.
        names: the name of each Linear: `{"query": "q_lin", "key": ..., "value": ...,
            "attention_output": ...}`, and "gate" where the config has one. Where the config has
            them, also "query_norm" and "key_norm", modules whose `weight` is the scale itself (not
            w - 1, as in Gemma 3), "relative_bias", an Embedding, and "sinks", an array.
        without_bias: the projections that have no bias though the config has one; theirs are
            zeros. A config whose `use_bias` names the others has none, and can be trained.
        ignore: names of modules or arrays beside the Linears that are not of the attention, such
            as a norm of the block.
        prefix: what stands before these names.

    Returns:
        The tree of `init_params`.

    Raises:
        ValueError: as `from_torch_state_dict`. Whatever else stands under a Linear's name (an
            adapter, a scale), or beside the Linears of query, key, value and gate in their module
            (a norm, a table of distances, sinks), is refused by name.

    Example:
        >>> import numpy as np
        >>> from flax_mha import MultiHeadAttentionConfig
        >>> from flax_mha.interop.torch import from_linear_layers
        >>> names = {"query": "q", "key": "k", "value": "v", "attention_output": "out_lin"}
        >>> state = {f"{name}.weight": np.ones((8, 8), "float32") for name in names.values()}
        >>> state |= {f"{name}.bias": np.ones(8, "float32") for name in ("q", "v", "out_lin")}
        >>> biases = ("query", "value", "attention_output")  # a Whisper's
        >>> config = MultiHeadAttentionConfig(num_heads=2, key_dim=4, use_bias=biases)
        >>> params = from_linear_layers(state, config, names=names)
        >>> list(params["key"]), list(params["value"])
        (['kernel'], ['kernel', 'bias'])
    """
    return from_layout(_linear(names, without_bias, ignore, config), state, config, prefix)


def to_linear_layers(
    params: ParamsLike,
    config: MultiHeadAttentionConfig,
    *,
    names: Mapping[str, str],
    without_bias: Sequence[str] = (),
    prefix: str = "",
) -> dict[str, np.ndarray]:
    """The inverse of `from_linear_layers`, bit for bit.

    Args:
        params: what `init_params` returns.
        config: the layer.
        names: the name of each Linear, as in `from_linear_layers`.
        without_bias: the projections without a bias; theirs must be zero.
        prefix: what to put before the names.

    Returns:
        NumPy arrays by name; see `to_torch_state_dict`.

    Raises:
        ValueError: a bias that has no place and is not zero.

    Example:
        >>> import jax
        >>> from flax_mha import MultiHeadAttentionConfig, init_params
        >>> from flax_mha.interop.torch import to_linear_layers
        >>> config = MultiHeadAttentionConfig(num_heads=2, key_dim=16, use_bias=False)
        >>> params = init_params(jax.random.key(0), config, (8, 32))
        >>> names = {"query": "q", "key": "k", "value": "v", "attention_output": "o"}
        >>> sorted(to_linear_layers(params, config, names=names))
        ['k.weight', 'o.weight', 'q.weight', 'v.weight']
    """
    return to_layout(_linear(names, without_bias, (), config), params, config, prefix)


def from_torch_module(module: Any) -> tuple[MultiHeadAttentionConfig, Params]:
    """The config and the parameters of a `torch.nn.MultiheadAttention`.

    Args:
        module: the module; `batch_first` concerns its inputs alone.

    Returns:
        `(config, params)`, with the module's dropout rate and dtype.

    Raises:
        TypeError: another kind of module.
        ValueError: `add_bias_kv` or `add_zero_attn`, which lengthen every sequence.

    Example:
        >>> import numpy as np, types
        >>> from flax_mha.interop.torch import from_torch_module
        >>> state = {"in_proj_weight": np.ones((24, 8), "float32")}
        >>> state["out_proj.weight"] = np.ones((8, 8), "float32")
        >>> module = types.SimpleNamespace(  # in earnest, torch.nn.MultiheadAttention(8, 2)
        ...     embed_dim=8, num_heads=2, dropout=0.1, add_zero_attn=False, in_proj_bias=None,
        ...     state_dict=lambda: state,
        ... )
        >>> config, params = from_torch_module(module)
        >>> config.dims, config.use_bias, params["query"]["kernel"].shape
        (HeadDims(N=2, K=2, H=4, V=4), False, (8, 2, 4))
    """
    wanted = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "in_proj_bias", "state_dict")
    if not all(hasattr(module, name) for name in wanted):
        remedy = "For the layer of a model, pass its weights to `from_torch_state_dict`."
        rule = "`module` must be a torch.nn.MultiheadAttention."
        checks.fail(TypeError, rule, f"{type(module).__name__}", remedy)
    if module.add_zero_attn:
        rule = "`add_zero_attn=True` is not supported: it appends a zero key to every sequence."
        checks.fail(ValueError, rule, "add_zero_attn=True")
    state = module.state_dict()
    output = ("attention_output",) if "out_proj.bias" in state else ()
    config = MultiHeadAttentionConfig(
        num_heads=module.num_heads,
        key_dim=module.embed_dim // module.num_heads,
        dropout=module.dropout,
        use_bias=(*(() if module.in_proj_bias is None else PARTS), *output),
    )
    params = from_torch_state_dict(state, config)
    dtype = params["attention_output"]["kernel"].dtype
    return config.replace(param_dtype=dtype), params


def _layout(name: str, packed: bool) -> Layout:
    if name == "torch":
        return PACKED if packed else SEPARATE
    return MODELS[name]


def _linear(
    names: Mapping[str, str],
    without_bias: Sequence[str],
    ignore: Sequence[str],
    config: MultiHeadAttentionConfig,
) -> Layout:
    checks.instance("config", config, MultiHeadAttentionConfig)
    checks.mapping("names", names)
    extras = [name for name, entry in EXTRAS.items() if entry.place in places(config)]
    expected = [*PARTS, *(["gate"] if config.use_gate else []), "attention_output", *extras]
    if sorted(names) != sorted(expected):
        rule = f"`names` must name the Linear of each of {expected}."
        checks.fail(ValueError, rule, f"names of {list(names)}")
    for name in names.values():
        if not isinstance(name, str):
            rule = "`names` must name Linears by strings."
            checks.fail(TypeError, rule, f"{name!r} of type {type(name).__name__}")
    without_bias = checks.names("without_bias", without_bias)
    checks.known_names("An entry of `without_bias`", without_bias, config.projections)
    if without_bias and not config.use_bias:
        rule = "`without_bias` names exceptions, where the config has biases."
        checks.fail(ValueError, rule, f"use_bias=False, without_bias={list(without_bias)}")
    return linear_layers(names, without_bias, checks.names("ignore", ignore))
