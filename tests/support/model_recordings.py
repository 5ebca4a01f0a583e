"""A tiny model of a family, saved in a folder, and what went in and out of its attention modules.

transformers runs it in torch, float32: what comes out there is what a layer must give.
"""

import contextlib
import hashlib
import inspect
import itertools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from decoder_families import DECODERS
from model_families import ENCODERS, IMAGES, PAIRS, TOKENS, Family, T
from safetensors.numpy import load_file

ABSENT = "torch or transformers is not installed: pip install -e '.[test-models]'"
torch = pytest.importorskip("torch", reason=ABSENT)
transformers = pytest.importorskip("transformers", reason=ABSENT)
StrictDataclassError = pytest.importorskip("huggingface_hub.errors").StrictDataclassError

FAMILIES: dict[str, Family] = {**ENCODERS, **IMAGES, **DECODERS, **PAIRS}
_SOURCES = ("key_value_states", "encoder_hidden_states", "key")
CONFIG_ERRORS = (StrictDataclassError,)  # what transformers raises of a config
torch.set_num_threads(1)  # tiny models, and a process on each core
SOURCE = 90  # an encoder's tokens, some of them padding
SHARDED = "qwen3"  # saved in several files with an index


class Call(NamedTuple):
    """One call of one attention module, as arrays.

    Attributes:
        query: what came in, [B, T, D].
        value: what the keys and values are made of, [B, S, M]; in self-attention the query.
        output: what came out of the output projection, [B, T, E].
        positions: what the model's rotary embedding was given, or None; of several axes, those
            come first.
        mask: floats added to the logits, of the model's own, or None.
        is_cross: whether the keys come from an encoder.
    """

    query: np.ndarray
    value: np.ndarray
    output: np.ndarray
    positions: np.ndarray | None
    mask: np.ndarray | None
    is_cross: bool


def recorded(name: str, folders: Path) -> tuple[Path, dict[str, Call]]:
    """The folder of a family's model, and the calls of its attention modules by their names there.

    Made once for all processes that share `folders`.
    """
    folder = folders / name
    if not folder.exists():
        made = Path(tempfile.mkdtemp(dir=folders))
        calls = build(FAMILIES[name], made / "model")
        np.savez(made / "calls.npz", **_flat(calls))
        with contextlib.suppress(OSError):  # another process was first: its bytes are the same
            made.rename(folder)
    with np.load(folder / "calls.npz") as arrays:
        return folder / "model", _calls(arrays)


def _flat(calls: dict[str, Call]) -> dict[str, np.ndarray]:
    return {
        f"{module}/{field}": value
        for module, call in calls.items()
        for field, value in call._asdict().items()
        if value is not None
    }


def _calls(arrays: Any) -> dict[str, Call]:
    fields: dict[str, dict[str, Any]] = {}
    for place in arrays:
        module, field = place.split("/")
        fields.setdefault(module, dict.fromkeys(Call._fields))[field] = arrays[place]
    return {module: Call(**call) for module, call in fields.items()}


def save_in(dtype: str, family: Family, folder: Path, to: Path) -> None:
    """The model of `folder` in another dtype."""
    model = model_class(family).from_pretrained(folder, dtype=getattr(torch, dtype))
    model.save_pretrained(to)


def build(family: Family, folder: Path) -> dict[str, Call]:
    """Saves the model in `folder`, and gives the calls of its attention modules by their names."""
    model = random_model(family)
    calls = record(model, family)
    sharded = family == FAMILIES[SHARDED]
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    names = names_in_file(model, list(calls), folder)
    return {names[module]: call for module, call in calls.items()}


def model_class(family: Family) -> Any:
    return getattr(transformers, family.model)


def attention_of(family: Family) -> str:
    """Eager, but for Falcon with ALiBi: there transformers' eager code adds it twice."""
    return "sdpa" if family.config.get("alibi") else "eager"


def random_model(family: Family) -> Any:
    """Every array random: initial ones and zeros hide faults."""
    cls = model_class(family)
    config = cls.config_class(**family.config, attn_implementation=attention_of(family))
    torch.manual_seed(0)
    model = cls(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            randomise(parameter, family.gain)
    return model


def randomise(parameter: torch.Tensor, gain: float) -> None:
    """Kernels normal; of biases of zeros and scales of ones, noise around them."""
    if not parameter.requires_grad or not parameter.numel():
        return  # a table of sines, or none
    noise = torch.randn_like(parameter)
    start = torch.nan_to_num(parameter).clamp(-1, 1).round()
    if parameter.ndim < 2 or start.min() == parameter.min() == parameter.max():
        parameter.copy_(start + 0.4 * noise)
    else:
        parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)


def model_inputs(model: Any, family: Family) -> dict[str, torch.Tensor]:
    """Two examples of the model's full length."""
    random = np.random.default_rng(1)
    tokens = torch.tensor(random.integers(7, TOKENS, (2, T)))
    if family.inputs == "tokens":
        return {"input_ids": tokens}
    if family.inputs == "tokens beside an encoder":
        source = torch.tensor(random.normal(size=(2, 33, 48)), dtype=torch.float32)
        return {"input_ids": tokens, "encoder_hidden_states": source}
    if family.inputs == "pairs":
        mask = torch.ones(2, SOURCE, dtype=torch.int64)
        mask[1, 71:] = 0
        source = {"input_ids": tokens[:, :SOURCE], "attention_mask": mask}
        return {**source, "decoder_input_ids": tokens}
    if family.inputs == "sound":
        sound = torch.tensor(random.normal(size=(2, 8, 100)), dtype=torch.float32)
        return {"input_features": sound, "decoder_input_ids": tokens}
    if family.inputs == "text with images":
        return text_with_images(tokens, random)
    pixels = {"pixel_values": images(model.config, random)}
    return {"input_ids": tokens, **pixels} if family.inputs == "text and images" else pixels


def images(config: Any, random: np.random.Generator) -> torch.Tensor:
    size = getattr(config, "vision_config", config).image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.tensor(random.normal(size=(2, 3, height, width)), dtype=torch.float32)


def text_with_images(tokens: torch.Tensor, random: np.random.Generator) -> dict[str, torch.Tensor]:
    """Qwen2-VL: an image of 6 x 8 patches, 12 tokens, in each sequence, not at the same place."""
    for row, start in enumerate((20, 50)):
        tokens[row, start - 1] = 5
        tokens[row, start : start + 12] = 3
        tokens[row, start + 12] = 6
    pixels = torch.tensor(random.normal(size=(2 * 48, 3 * 2 * 4 * 4)), dtype=torch.float32)
    grid = torch.tensor([[1, 6, 8], [1, 6, 8]])
    kinds = (tokens == 3).long()
    return {
        "input_ids": tokens,
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "mm_token_type_ids": kinds,
    }


def attention_modules(model: Any, family: Family) -> dict[str, Any]:
    """By name: those of the family's classes; no other module that says attention is missed."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    found = [name for name, kind in kinds.items() if kind in family.attends]
    for name, kind in kinds.items():
        near = any((f"{name}.").startswith(f"{x}.") or x.startswith(f"{name}.") for x in found)
        assert near or "attention" not in kind.lower(), f"{name} of class {kind} is not recorded"
    return {name: model.get_submodule(name) for name in found}


def record(model: Any, family: Family) -> dict[str, Call]:
    """One run of the model, and what each attention module saw; of a shared one, its first call."""
    positions: list[Any] = [None]
    hooks = [
        module.register_forward_pre_hook(_keep_positions(positions), with_kwargs=True)
        for module in model.modules()
        if "Rotary" in type(module).__name__
    ]
    seen: dict[str, dict[str, Any]] = {}
    for name, module in attention_modules(model, family).items():
        arrays = seen.setdefault(name, {})
        source, output = module.get_submodule(family.source), _output_module(module, family)
        into = _keep_input(arrays, positions)
        hooks.append(source.register_forward_pre_hook(into, with_kwargs=True))
        hooks.append(output.register_forward_hook(_keep_output(arrays)))
    with torch.no_grad():
        model(**model_inputs(model, family))
    for hook in hooks:
        hook.remove()
    return {name: _batched(Call(**arrays)) for name, arrays in seen.items()}


def _batched(call: Call) -> Call:
    """Qwen2-VL's two images come as one row of patches, with positions [patches, axes]."""
    if call.query.ndim == 3:
        return call
    query, output = (x.reshape(2, -1, x.shape[-1]) for x in (call.query, call.output))
    positions = call.positions.T.reshape(call.positions.shape[1], *query.shape[:2])
    return call._replace(query=query, value=query, output=output, positions=positions)


def _output_module(module: Any, family: Family) -> Any:
    """The first of the names `a|b` that it has."""
    names = [name for name, _ in module.named_modules()]
    return module.get_submodule(next(x for x in family.output.split("|") if x in names))


def _keep_positions(positions: list[Any]) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if torch.is_tensor(given) and not given.is_floating_point():
            positions[0] = given

    return hook


def _keep_input(arrays: dict[str, Any], positions: list[Any]) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        query, source = _first(given, "hidden_states", "query"), _first(given, *_SOURCES)
        arrays.setdefault("query", _numpy(query))
        arrays.setdefault("value", _numpy(query if source is None else source))
        arrays.setdefault("positions", _numpy(positions[0]))
        arrays.setdefault("mask", _numpy(_first(given, "attention_mask", "mask")))
        arrays.setdefault("is_cross", source is not None)

    return hook


def _first(given: dict[str, Any], *names: str) -> Any:
    return next((given[name] for name in names if torch.is_tensor(given.get(name))), None)


def _keep_output(arrays: dict[str, Any]) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        arrays.setdefault("output", _numpy(output[0] if isinstance(output, tuple) else output))

    return hook


def _numpy(tensor: Any) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().numpy().copy()


def names_in_file(model: Any, modules: list[str], folder: Path) -> dict[str, str]:
    """How the saved file names each module: what its arrays' names there have in common.

    Arrays are found by their contents: transformers may save them under names of old.
    """
    places: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, array in load_file(file).items():
            places.setdefault(_digest(array), []).append(name)
    return {module: _common_name(model.get_submodule(module), places) for module in modules}


def _common_name(module: Any, places: dict[str, list[str]]) -> str:
    arrays = [_digest(array.detach().numpy()) for array in module.parameters()]
    # A table that layers share has several names there.
    found = [places[array][0].split(".") for array in arrays if len(places[array]) == 1]
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*found))
    return ".".join(parts[0] for parts in common)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def passed(family: Family, call: Call) -> dict[str, np.ndarray]:
    """What the model gives its attention beside the hidden states."""
    given = {}
    if family.inputs == "pairs" and call.value.shape[1] == SOURCE:
        given["value_mask"] = call.mask[:, 0, -1] == 0
    if family.attends == ("SwinAttention",) and call.mask is not None:
        images = len(call.query) // len(call.mask)
        given["attention_mask"] = np.tile(call.mask == 0, (images, 1, 1))
    if family.inputs == "text with images":
        given["positions"] = call.positions
    return given
