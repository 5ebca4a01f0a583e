"""`generate RUN`: text from a trained run, and how fast it comes with the cache and without."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization
from rich.console import Console
from rich.text import Text

from flax_mha.demo import train
from flax_mha.demo.config_file import settings_from
from flax_mha.demo.generate import Sampling, generate, generate_without_cache
from flax_mha.demo.model import Transformer
from flax_mha.demo.run import printable
from flax_mha.demo.settings import DemoError, Settings

CHOSEN_FILES = ("settings.json", "params.msgpack")


def load_run(directory: Path) -> tuple[Settings, Transformer, Any]:
    """Settings, model and trained parameters of a run.

    Raises:
        DemoError: the directory is no run, or its files do not belong together.
    """
    missing = [name for name in CHOSEN_FILES if not (directory / name).is_file()]
    if missing:
        remedy = "Train one: python -m flax_mha.demo train configs/python_lm.toml"
        raise DemoError(f"{directory} is not a trained run: it has no {missing[0]}. {remedy}")
    try:
        settings = settings_from(json.loads((directory / "settings.json").read_text()))
        model = train.make_model(settings)
        tokens = jnp.zeros((1, settings.model.context), jnp.int32)
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])
        encoded = (directory / "params.msgpack").read_bytes()
        params = serialization.from_bytes(shapes, encoded)
    except (ValueError, KeyError) as error:
        raise DemoError(f"{directory} holds no usable run: {error}") from error
    return settings, model, params


def sample(directory: Path, prompt: str, count: int, how: Sampling) -> None:
    """Prints the text and both speeds, measured on a second call: the first one compiles."""
    _, model, params = load_run(directory)
    console = Console()
    arguments = (model, params, prompt.encode(), count, how)
    sampled, seconds = _timed(generate, *arguments)
    text = (prompt.encode() + sampled).decode("utf-8", errors="replace")
    console.print(Text(printable(text)))
    _, seconds_without = _timed(generate_without_cache, *arguments)
    console.rule()
    console.print(
        f"{count / seconds:,.0f} bytes per second with the cache, "
        f"{count / seconds_without:,.0f} without: {seconds_without / seconds:.1f} times as fast.",
        highlight=False,
    )


def _timed(function: Callable[..., bytes], *arguments: Any) -> tuple[bytes, float]:
    function(*arguments)
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started
