"""What a checkpoint's folder holds, from its config.json and the headers of its files."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.interop.huggingface.find import find
from flax_mha.interop.huggingface.folder import open_folder


class AttentionRecord(NamedTuple):
    """What is known of a layer before its arrays are read.

    Attributes:
        name: its module's path.
        config: the layer's config.
        call: what each call must pass.
        shapes: the shape of each array in the file, by its name below the module's path.
        remark: what a caller must know besides; "" where there is nothing.

    Example:
        >>> from flax_mha import MultiHeadAttentionConfig
        >>> from flax_mha.interop.huggingface import AttentionRecord
        >>> config = MultiHeadAttentionConfig(4, 16, num_kv_heads=2, sliding_window=128)
        >>> print(AttentionRecord("layers.0.self_attn", config, {"use_causal_mask": True}, {}))
        layers.0.self_attn  4 heads of 16, 2 of keys  window 128  causal
    """

    name: str
    config: MultiHeadAttentionConfig
    call: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    remark: str = ""

    def __str__(self) -> str:
        return "  ".join(x for x in _cells(self) if x)


class AttentionList(tuple[AttentionRecord, ...]):
    """The records of a folder; printed, a table.

    `left_out` names the modules that `load_attention` does not give, each with the reason.

    Args:
        iterable: the records.

    Example:
        >>> from flax_mha import MultiHeadAttentionConfig
        >>> from flax_mha.interop.huggingface import AttentionList, AttentionRecord
        >>> record = AttentionRecord("layers.0.attn", MultiHeadAttentionConfig(4, 16), {}, {})
        >>> print(AttentionList([record, record._replace(name="layers.1.attn")]))
        layers.0.attn  4 heads of 16
        layers.1.attn  4 heads of 16
    """

    left_out: Mapping[str, str] = {}

    def __str__(self) -> str:
        rows = [_cells(record) for record in self]
        rows += [[name, f"left out: {reason}"] for name, reason in self.left_out.items()]
        columns = range(max((len(row) for row in rows), default=0))
        used = [i for i in columns if any(row[i] for row in rows if i < len(row))]
        table = [[row[i] if i < len(row) else "" for i in used] for row in rows]
        widths = [max(len(row[i]) for row in table if len(row) > 1) for i in range(len(used))]
        lines = ["  ".join(x.ljust(width) for x, width in zip(row, widths)) for row in table]
        return "\n".join(line.rstrip() for line in lines)


def list_attention(
    directory: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    ignore: Sequence[str] = (),
) -> AttentionList:
    """The attention layers of a checkpoint's folder, before an array is read.

    Memory: the headers of the files.

    Args:
        directory: as in `load_attention`.
        max_length: as in `load_attention`.
        ignore: as in `load_attention`.

    Returns:
        `AttentionRecord(name, config, call, shapes, remark)` for each layer; `print` shows a table.

    Raises:
        ValueError: as `load_attention`, but for shapes, which are checked when arrays are read.
        TypeError: arrays that are not floats.
        ImportError: without the safetensors package.

    Example:
        >>> import json, pathlib, tempfile, numpy as np, safetensors.numpy
        >>> from flax_mha.interop.huggingface import list_attention
        >>> config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4,
        ...           "num_key_value_heads": 2, "num_hidden_layers": 1}
        >>> shapes = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16)}
        >>> arrays = {f"model.layers.0.self_attn.{x}_proj.weight": np.ones(shapes[x], "float32")
        ...           for x in shapes}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(config))
        ...     safetensors.numpy.save_file(arrays, folder + "/model.safetensors")
        ...     print(list_attention(folder))
        model.layers.0.self_attn  4 heads of 4, 2 of keys  Rotary(base=10000.0)  causal
    """
    folder = open_folder(directory)
    found = find(folder, max_length, ignore)
    records = AttentionList(
        AttentionRecord(
            layer.name,
            layer.config,
            layer.call,
            {name: folder.headers[full].shape for name, full in layer.sources.items()},
            layer.remark,
        )
        for layer in found.layers
    )
    records.left_out = found.left_out
    return records


def _cells(record: AttentionRecord) -> list[str]:
    """The columns of a row: heads, position, window, what else is set, and the call."""
    config, call = record.config, record.call
    N, K, H, V = config.dims
    heads = f"{N} heads of {H}" + (f", {K} of keys" if K != N else "")
    heads += f", values of {V}" if V != H else ""
    window = "" if config.sliding_window is None else f"window {config.sliding_window}"
    window = window if config.chunk_size is None else f"chunks of {config.chunk_size}"
    given = ["causal" if name == "use_causal_mask" else name for name in call]
    cells = [record.name, heads, _position(config.position), window, _others(config)]
    return [*cells, ", ".join(given), record.remark]


def _others(config: MultiHeadAttentionConfig) -> str:
    """What changes the numbers besides heads, position and window."""
    norms = {"qk": config.qk_norm, "v": config.value_norm}
    said = [f"{what} {type(norm).__name__}" for what, norm in norms.items() if norm is not None]
    if config.latent is not None:
        said.append(f"latents of {config.latent.rank}")
    numbers = {"scale": config.scale, "cap": config.soft_cap, "clip": config.clip_qkv}
    said += [f"{what} {number:.4g}" for what, number in numbers.items() if number is not None]
    flags = {"sinks": config.use_sinks, "gate": config.use_gate}
    return ", ".join([*said, *(what for what, is_set in flags.items() if is_set)])


def _position(position: Any) -> str:
    """An object of `flax_mha.positions`, without the arguments that it has by default."""
    if position is None:
        return ""
    plain = {name: field.default for name, field in type(position).__dataclass_fields__.items()}
    given = {x: getattr(position, x) for x in plain}
    shown = [f"{x}={y!r}" for x, y in given.items() if x == "base" or y != plain[x]]
    return f"{type(position).__name__}({', '.join(shown)})"
