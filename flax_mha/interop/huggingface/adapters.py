"""PEFT's LoRA adapters of a checkpoint, by their folder; that library is not needed."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from flax_mha.core import checks, file_checks
from flax_mha.interop.adapters import AttentionAdapter, with_one_scale
from flax_mha.interop.huggingface.adapter_arrays import (
    Linear,
    check_headers,
    kernels_of,
    linears_of,
    to_pairs,
)
from flax_mha.interop.huggingface.adapter_fields import (
    CONFIG,
    Ranks,
    check_target,
    read_fields,
)
from flax_mha.interop.huggingface.adapter_names import (
    expect_known,
    expect_pairs,
    parse,
    placed,
    renamed,
)
from flax_mha.interop.huggingface.find import Found, find
from flax_mha.interop.huggingface.folder import Folder, open_folder, within
from flax_mha.interop.torch.safetensors import Header, load_safetensors, read_headers
from flax_mha.params.lora import check_lora

WEIGHTS = "adapter_model.safetensors"
Places = dict[str, list[Linear]]  # by the path of the module; a kernel may serve twice


def load_adapter(
    directory: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str],
    max_length: int | None = None,
    ignore: Sequence[str] = (),
    ignore_modules: Sequence[str] = (),
) -> dict[str, AttentionAdapter]:
    """A LoRA adapter that PEFT saved, layer by layer, beside the attention layers of its base.

    Nothing is downloaded, no pickle is loaded, and neither torch nor peft is needed.

    Guide: `python -m flax_mha guide lora`.

    Memory: the adapter's arrays. Of `like` no array is read.

    Args:
        directory: the folder, with adapter_config.json and adapter_model.safetensors.
        like: the folder of the base, as `load_attention` takes it.
        max_length: as in `load_attention`.
        ignore: fields of the base's config.json, as in `load_attention`.
        ignore_modules: parts of paths, such as "mlp" or "lm_head": adapters of such modules, which
            are no attention, are left out. They are the caller's, for nothing here adds them.

    Returns:
        `{"model.layers.0.self_attn": AttentionAdapter(lora, scale), ...}` under the names of
        `load_attention`, of the layers that have one. Arrays keep their dtype. Where query, key
        and value stand in one module they have one a; where alphas differ in a layer, b holds the
        ratio of a module's scale to the layer's largest.

    Raises:
        ValueError: what changes the numbers and is no LoRA of a Linear (DoRA, trained biases, other
            methods, a base that was changed); arrays of other modules that are not in
            `ignore_modules`; a field that is set and not known; a half of a pair; shapes that the
            base or the rank denies; a file that is cut short, missing, or a pickle.
        TypeError: arrays that are not floats; `ignore_modules` that is one string.
        ImportError: without the safetensors package.

    Example:
        >>> import json, pathlib, tempfile, numpy as np, safetensors.numpy
        >>> from flax_mha.interop.huggingface import load_adapter
        >>> config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4,
        ...           "num_hidden_layers": 1}
        >>> path = "model.layers.0.self_attn"
        >>> arrays = {f"{path}.{x}_proj.weight": np.ones((16, 16), "float32") for x in "qkvo"}
        >>> pair = {"lora_A": np.ones((2, 16), "float32"), "lora_B": np.ones((16, 2), "float32")}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base = pathlib.Path(folder)
        ...     _ = (base / "config.json").write_text(json.dumps(config))
        ...     safetensors.numpy.save_file(arrays, base / "model.safetensors")
        ...     (base / "tuned").mkdir()
        ...     fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
        ...     _ = (base / "tuned" / "adapter_config.json").write_text(json.dumps(fields))
        ...     named = {f"base_model.model.{path}.q_proj.{x}.weight": pair[x] for x in pair}
        ...     safetensors.numpy.save_file(named, base / "tuned" / "adapter_model.safetensors")
        ...     adapters = load_adapter(base / "tuned", like=base)
        >>> adapter = adapters[path]
        >>> adapter.scale, {name: x["b"].shape for name, x in adapter.lora.items()}
        (4.0, {'query': (2, 4, 4)})
    """
    ignore_modules = checks.names("ignore_modules", ignore_modules)
    path = _opened(directory)
    ranks = read_fields(path, ignore_modules)
    headers = read_headers(within(path, WEIGHTS))
    folder = open_folder(like, "like")
    layers = find(folder, max_length, ignore).layers
    there = _places(folder, layers)
    names = parse(headers)
    model_type = str(folder.fields.get("model_type"))
    known = {module: {module, renamed(module, model_type)} for module in there}
    found = placed(list(names.pairs), known)
    expect_known(names, found, [layer.name for layer in layers], ignore_modules)
    expect_pairs({module: names.pairs[module] for module in found})
    if not found:
        rule = "The adapter must hold arrays of attention layers."
        checks.fail(ValueError, rule, f"names such as {sorted(headers)[:3]}")
    _check(ranks, found, there, names.pairs, headers)
    read = _read(path, ranks, found, there, names.pairs)
    return {layer.name: _adapter(layer, read[layer.name]) for layer in layers if layer.name in read}


def _places(folder: Folder, layers: Sequence[Found]) -> Places:
    """Every Linear of attention, by its path in the checkpoint."""
    there: Places = {}
    for layer in layers:
        for linear in linears_of(layer, folder.headers):
            there.setdefault(linear.module, []).append(linear)
    return there


# --- in -----------------------------------------------------------------------------------------


def _opened(directory: str | os.PathLike[str]) -> pathlib.Path:
    path = file_checks.path("directory", directory)
    if not path.is_dir():
        rule = f"`directory` must be the folder of an adapter, with its {CONFIG}."
        remedy = "Nothing is downloaded: `huggingface-cli download NAME` gives a folder."
        checks.fail(ValueError, rule, f"{str(directory)!r}, which is none", remedy)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).exists():
            _missing(path, name)
    return path


def _missing(path: pathlib.Path, name: str) -> NoReturn:
    names = sorted(entry.name for entry in path.iterdir())
    if name == WEIGHTS and any(x.startswith("adapter_model.bin") for x in names):
        remedy = (
            "A .bin file is a pickle: to load it is to run the code in it. Where it is trusted, "
            "PEFT's `PeftModel.from_pretrained(base, directory).save_pretrained(other)` writes "
            ".safetensors."
        )
    elif "config.json" in names:
        remedy = "It is a whole checkpoint: `load_attention` reads it."
    else:
        remedy = "Is it the folder above, or below?"
    rule = f"The folder {path.name!r} must hold {name}."
    checks.fail(ValueError, rule, f"{names[:8]}", remedy)


def _check(
    ranks: Ranks,
    found: Mapping[str, str],
    there: Places,
    pairs: Mapping[str, Mapping[str, str]],
    headers: Mapping[str, Header],
) -> None:
    """All shapes, before any data are read."""
    for module, place in found.items():
        check_target(ranks, module)
        for linear in there[place]:
            check_headers(linear, ranks.of(module)[0], pairs[module], headers)


def _read(
    path: pathlib.Path,
    ranks: Ranks,
    found: Mapping[str, str],
    there: Places,
    pairs: Mapping[str, Mapping[str, str]],
) -> dict[str, dict[str, tuple[Any, float]]]:
    """(adapter, scale) by layer and projection."""
    names = [pairs[module][side] for module in found for side in "AB"]
    arrays = load_safetensors(within(path, WEIGHTS), names)
    read: dict[str, dict[str, tuple[Any, float]]] = {}
    for module, place in found.items():
        A, B = (arrays[pairs[module][side]] for side in "AB")
        scale = ranks.of(module)[1]
        for linear in there[place]:
            of_layer = read.setdefault(linear.layer.name, {})
            of_layer |= {x: (pair, scale) for x, pair in to_pairs(linear, A, B).items()}
            check_lora({x: of_layer[x][0] for x in linear.kernels}, kernels_of([linear]))
    return read


def _adapter(layer: Found, read: Mapping[str, tuple[Any, float]]) -> AttentionAdapter:
    """In the order of the layer's parameters."""
    names = [name for name in layer.config.projections if name in read]
    lora, scales = {x: read[x][0] for x in names}, {x: read[x][1] for x in names}
    lora, scale = with_one_scale(layer.name, lora, scales)
    return AttentionAdapter(lora, scale)
