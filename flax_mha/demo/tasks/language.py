"""A byte-level language model: the next byte of Python's own standard library, or of a file.

Judged in bits per byte on text that it has not seen, beside general compressors.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import optax

from flax_mha.core.typing import Array
from flax_mha.demo import compressors, evaluate, int8
from flax_mha.demo.data.text import Split, TextSettings, load_split, windows
from flax_mha.demo.generate import Sampling, Storage, generate, generate_without_cache, timed
from flax_mha.demo.models.language import Transformer, TransformerSettings
from flax_mha.demo.page import AttentionMap
from flax_mha.demo.settings import DemoError, TrainSettings, number
from flax_mha.demo.tasks.contract import Records, Task, count_parameters
from flax_mha.demo.terminal import Screen

_HOW_TO_READ = """\
Every column compares on the same bytes. The compressors start each column from nothing; the model
has learned from the training text, and its {size:,} parameters are not counted."""


_SNIPPET_BYTES = 40


@dataclasses.dataclass(frozen=True)
class LanguageTrainSettings(TrainSettings):
    """And the sample that is printed at the end."""

    sample_bytes: int = number(400, least=0)
    prompt: str = "def "
    temperature: float = number(0.7, above=0)


class Language(Task):
    """p(next byte | the bytes before it)."""

    sections: ClassVar = {
        "data": TextSettings,
        "model": TransformerSettings,
        "train": LanguageTrainSettings,
    }
    unit = "bytes"

    @functools.cached_property
    def model(self) -> Transformer:
        """A decoder-only Transformer."""
        return Transformer(self.settings.model, self.settings.attention)

    @functools.cached_property
    def split(self) -> Split:
        """The text, read when it is first needed."""
        return load_split(self.settings.data)

    @property
    def units_a_step(self) -> int:
        """Bytes that are predicted."""
        return self.settings.train.batch_size * self.settings.model.context

    def example(self) -> np.ndarray:
        """A window, and the byte that follows it."""
        return np.zeros((1, self.settings.model.context + 1), np.uint8)

    def about(self) -> str:
        """Where the text is from."""
        return f"Text: {self.split.source}, {len(self.split.train):,} bytes to learn from."

    def batches(self, done: int) -> Iterator[np.ndarray]:
        """Windows `[B, context + 1]` at random places."""
        train, length = self.settings.train, self.settings.model.context + 1
        return windows(self.split.train, length, train.batch_size, train.seed, done)

    def inputs(self, batch: np.ndarray) -> tuple[Array, ...]:
        """All bytes but the last."""
        return (jnp.asarray(batch, jnp.int32)[:, :-1],)

    def nats(self, logits: Array, batch: np.ndarray) -> Array:
        """Of every byte but the first."""
        targets_BT = jnp.asarray(batch, jnp.int32)[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets_BT).mean()

    def measures(self, nats: float) -> dict[str, float]:
        """In bits."""
        return {"bits_per_byte": nats / math.log(2)}

    def glance(self, params: Any) -> dict[str, float]:
        """Bits per byte of the first quarter of the held-out text."""
        return {"bits_per_byte": self._bits_per_byte(params, self._prefixes[0])}

    def judge(self, params: Any, screen: Screen) -> Records:
        """Bits per byte beside the compressors', on a prefix and on all of the held-out text."""
        results = []
        for text in self._prefixes:
            result = {"model": self._bits_per_byte(params, text)}
            results.append(result | compressors.compressed_bits_per_byte(text.tobytes()))
        short, whole = (f"{len(text):,}" for text in self._prefixes)
        columns = ["", f"first {short} bytes", f"all {whole} bytes"]
        rows = [[name, *(f"{result[name]:.3f}" for result in results)] for name in results[0]]
        screen.table("Held-out text, bits per byte", columns, rows)
        size = count_parameters(params)
        screen.say(_HOW_TO_READ.format(size=size))
        pairs = zip(self._prefixes, results)
        return [{"bytes": len(text), "parameters": size, **result} for text, result in pairs]

    def maps(self, params: Any, text: str | None = None) -> list[AttentionMap]:
        """One map a layer, of a few bytes of held-out text or of the text that is given."""
        context = self.settings.model.context
        content = snippet(self.split.held_out, context) if text is None else text.encode()
        if not 0 < len(content) <= context:
            rule = f"the text must have 1 to model.context = {context} bytes"
            raise DemoError(f"{rule}. Received: {len(content)}.")
        labels = [chr(byte) if byte < 128 else f"{byte:02x}" for byte in content]
        found = self.scores(params, jnp.asarray([list(content)], jnp.int32))
        return [
            AttentionMap(f"layer {i} self-attention", scores_NTS, labels, labels)
            for i, scores_NTS in enumerate(found)
        ]

    def yardsticks(self, results: Records) -> dict[str, float]:
        """The compressors', on the bytes of `glance`."""
        others = {"bytes", "parameters", "model"}
        return {name: bits for name, bits in results[0].items() if name not in others}

    def show(self, params: Any, screen: Screen) -> str:
        """A sample."""
        train = self.settings.train
        if not train.sample_bytes:
            return ""
        how = Sampling(train.temperature, seed=train.seed)
        prompt = train.prompt.encode()
        text = _text(prompt + generate(self.model, params, prompt, train.sample_bytes, how))
        screen.rule(f"A sample, at temperature {train.temperature}")
        screen.say(text)
        screen.rule()
        return text

    def generate(
        self,
        params: Any,
        prompt: str,
        count: int,
        how: Sampling,
        screen: Screen,
        stored: Storage | None = None,
    ) -> None:
        """Also both speeds, or what int8 comes to beside the run's own numbers."""
        content, stored = prompt.encode(), stored or Storage()
        int8.check(stored, self.settings.attention)
        if stored.any_int8:
            given = (content, count, how), self._prefixes[0]
            own, small = (int8.measure(self, params, x, *given) for x in (Storage(), stored))
            screen.say(_text(content + small.sampled))
            int8.show(own, small, stored, self, screen)
            return
        arguments = (self.model, params, content, count, how)
        sampled, seconds = timed(generate, *arguments)
        screen.say(_text(content + sampled))
        _, seconds_without = timed(generate_without_cache, *arguments)
        screen.rule()
        speeds = f"{count / seconds:,.0f} bytes per second with the cache"
        speeds += f", {count / seconds_without:,.0f} without"
        screen.say(f"{speeds}: {seconds_without / seconds:.1f} times as fast.")

    @property
    def _prefixes(self) -> tuple[np.ndarray, np.ndarray]:
        """A quarter of the held-out text, and all: the more there is, the better compressors do."""
        held_out = self.split.held_out
        return held_out[: max(len(held_out) // 4, 2)], held_out

    def _bits_per_byte(self, params: Any, text: np.ndarray) -> float:
        return evaluate.bits_per_byte(self.model, params, text, self.settings.model.context)


def snippet(text: np.ndarray, limit: int) -> bytes:
    """A few bytes of code to look at: from the first method on, where there is one."""
    whole = text.tobytes()
    start = max(whole.find(b"    def "), 0)
    return whole[start : start + min(limit, _SNIPPET_BYTES)]


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="replace")
