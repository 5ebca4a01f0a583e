"""Adapters out: the folder that PEFT's `save_pretrained` writes, made without that library."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from flax_mha.core import checks, file_checks
from flax_mha.interop.adapters import AttentionAdapter
from flax_mha.interop.huggingface.adapter_arrays import Linear, from_pairs, kernels_of, linears_of
from flax_mha.interop.huggingface.adapter_fields import CONFIG, written
from flax_mha.interop.huggingface.adapter_names import PREFIX, renamed
from flax_mha.interop.huggingface.adapters import WEIGHTS
from flax_mha.interop.huggingface.find import Found, find
from flax_mha.interop.huggingface.folder import Folder, open_folder
from flax_mha.interop.huggingface.new_folder import expect_free, new_folder
from flax_mha.params.lora import check_lora, check_scale


class _Written(NamedTuple):
    """What goes into the files.

    Attributes:
        arrays: by module and side, "A" or "B".
        places: (rank, scale) of each module.
        turned: whether each module is a Conv1D, which keeps [in, out].
    """

    arrays: dict[tuple[str, str], np.ndarray]
    places: dict[str, tuple[int, float]]
    turned: set[bool]


def save_adapter(
    directory: str | os.PathLike[str],
    adapters: Mapping[str, AttentionAdapter],
    *,
    like: str | os.PathLike[str],
    prefix: str = "",
    max_length: int | None = None,
    ignore: Sequence[str] = (),
) -> None:
    """A folder that PEFT loads: `PeftModel.from_pretrained(base, directory)`.

    Modules are named as the newest transformers names them, which is as the files do but for ViT,
    BEiT, DINOv2 and v3, Swin, Qwen2-VL, LLaVA and Gemma 3 with images.

    Memory: the adapter's arrays once more.

    Args:
        directory: where to write; nothing may stand there, or an empty folder.
        adapters: what `load_adapter` returned, or `AttentionAdapter`s of your own, by the names of
            `load_attention`.
        like: the folder of the base.
        prefix: what the model that PEFT wraps has before the paths of `like`: "model." of a
            LlamaForCausalLM, where `like` is a LlamaModel's.
        max_length: as in `load_attention`.
        ignore: as in `load_attention`.

    Raises:
        ValueError: a layer that `like` does not have, adapters that do not fit it, a scale that is
            not finite, a folder that is not empty; otherwise as `load_attention`.
        TypeError: adapters that are no arrays of floats, or of several dtypes in one module.

    Example:
        >>> import jax, json, pathlib, tempfile, numpy as np, safetensors.numpy
        >>> from flax_mha import lora_params
        >>> from flax_mha.interop.huggingface import AttentionAdapter, load_adapter
        >>> from flax_mha.interop.huggingface import load_attention, save_adapter
        >>> config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4,
        ...           "num_hidden_layers": 1}
        >>> path = "model.layers.0.self_attn"
        >>> arrays = {f"{path}.{x}_proj.weight": np.ones((16, 16), "float32") for x in "qkvo"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base = pathlib.Path(folder)
        ...     _ = (base / "config.json").write_text(json.dumps(config))
        ...     safetensors.numpy.save_file(arrays, base / "model.safetensors")
        ...     layer = load_attention(base)[path]
        ...     lora = lora_params(jax.random.key(0), layer.config, (1, 16), rank=2)
        ...     save_adapter(base / "tuned", {path: AttentionAdapter(lora, 8 / 2)}, like=base)
        ...     again = load_adapter(base / "tuned", like=base)[path]
        >>> again.scale, bool((again.lora["value"]["a"] == lora["value"]["a"]).all())
        (4.0, True)
    """
    target, folder = file_checks.path("directory", directory), open_folder(like, "like")
    checks.mapping("adapters", adapters)
    checks.instance("prefix", prefix, str)
    expect_free(target)
    there = {layer.name: layer for layer in find(folder, max_length, ignore).layers}
    checks.known_names("A layer in `adapters`", adapters, there)
    made = _collected(folder, [there[name] for name in adapters], adapters)
    model_type = str(folder.fields.get("model_type"))
    named = {module: prefix + renamed(module, model_type) for module in made.places}
    fields = written(
        {named[module]: place for module, place in made.places.items()},
        made.turned == {True},
        folder.fields.get("_name_or_path") or None,
    )
    whole = {
        f"{PREFIX}{named[module]}.lora_{side}.weight": array
        for (module, side), array in made.arrays.items()
    }
    _write(target, fields, whole)


def _collected(
    folder: Folder, layers: Sequence[Found], adapters: Mapping[str, AttentionAdapter]
) -> _Written:
    made = _Written({}, {}, set())
    for layer in layers:
        adapter, linears = adapters[layer.name], linears_of(layer, folder.headers)
        scale = _check_adapter(layer.name, adapter, linears)
        for linear in linears:
            if set(linear.kernels) & set(adapter.lora):
                _add(made, linear, adapter, scale)
            elif (linear.module, "A") in made.arrays:
                _disagree(linear)
    if not made.places:
        checks.fail(ValueError, "`adapters` must hold an adapter.", f"{list(adapters)}")
    return made


def _add(made: _Written, linear: Linear, adapter: AttentionAdapter, scale: float) -> None:
    pair = from_pairs(linear, adapter.lora)
    made.turned.add(linear.is_turned)
    for side, array in zip("AB", pair):
        before = made.arrays.setdefault((linear.module, side), array)
        if before.shape != array.shape or before.tobytes() != array.tobytes():
            _disagree(linear)
    made.places[linear.module] = (len(pair[0]), scale)


def _check_adapter(name: str, adapter: AttentionAdapter, linears: list[Linear]) -> float:
    if not isinstance(adapter, AttentionAdapter):
        rule, evidence = "`adapters` must hold AttentionAdapters.", type(adapter).__name__
        checks.fail(
            TypeError, rule, f"{evidence} at {name!r}", "Write `AttentionAdapter(lora, 1.0)`."
        )
    if not linears:
        rule = f"The layer {name!r} must have Linears of its own: PEFT adapts modules."
        checks.fail(ValueError, rule, "arrays of a torch.nn.MultiheadAttention")
    check_lora(adapter.lora, kernels_of(linears))
    check_scale(adapter.scale)
    return float(adapter.scale)


def _disagree(linear: Linear) -> NoReturn:
    rule = f"`{linear.module}` serves the layer twice: its adapters must agree."
    remedy = "Give key and value the same a and b."
    checks.fail(ValueError, rule, f"others for {list(linear.kernels)}", remedy)


def _write(target: pathlib.Path, fields: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    with new_folder(target) as made:
        (made / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        save_file(arrays, made / WEIGHTS, metadata={"format": "pt"})
