"""What day is it? Dates in many spellings to ISO 8601, by an encoder-decoder with cross-attention.

Judged by exact match of greedy decoding, on days that were trained on in no spelling.
"""

import datetime
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import optax

from flax_mha.core.typing import Array
from flax_mha.demo.data import dates
from flax_mha.demo.data.dates import Dates, DateSettings
from flax_mha.demo.data.spellings import LONGEST, STYLES, Spelling
from flax_mha.demo.models.translator import Tokens, Translator, TranslatorSettings
from flax_mha.demo.page import AttentionMap
from flax_mha.demo.settings import TrainSettings
from flax_mha.demo.tasks.contract import Records, Task, count_parameters
from flax_mha.demo.terminal import Screen
from flax_mha.demo.translate import translate

_TOKENS = Tokens(dates.SOURCE_TOKENS, LONGEST, len(dates.ISO_CHARACTERS), dates.ISO_LENGTH)
_ATTENTIONS = [
    ("encoder", "attention"),
    ("decoder", "self_attention"),
    ("decoder", "cross_attention"),
]
_AT_ONCE = 500
_SPELLING_SEED = 1  # of the held-out days' spellings
_SHOWN = 8


class DatesTask(Task):
    """p(ISO date | a spelling of it), character by character."""

    sections: ClassVar = {"data": DateSettings, "model": TranslatorSettings, "train": TrainSettings}
    unit = "dates"

    @functools.cached_property
    def model(self) -> Translator:
        """An encoder-decoder Transformer."""
        return Translator(self.settings.model, self.settings.attention, _TOKENS)

    @functools.cached_property
    def split(self) -> dates.Split:
        """The days."""
        return dates.split_days(self.settings.data)

    @property
    def attention_paths(self) -> list[tuple[str, ...]]:
        """One layer a block of the encoder, two a block of the decoder."""
        layers = range(self.settings.model.layers)
        return [(f"{half}_{i}", name) for half, name in _ATTENTIONS for i in layers]

    @property
    def units_a_step(self) -> int:
        """Pairs of a spelling and its ISO date."""
        return self.settings.train.batch_size

    def example(self) -> Dates:
        """One pair."""
        lengths = (_TOKENS.source_length, _TOKENS.target_length)
        return Dates(*(np.ones((1, length), np.int32) for length in lengths))

    def about(self) -> str:
        """How many days, and spellings of each."""
        train, validation, held_out = (len(part) for part in self.split)
        parts = f"{train} to learn from, {validation} to look at, {held_out} held out"
        return f"Days: {parts}; each in {len(dates.SPELLINGS)} spellings."

    def batches(self, done: int) -> Iterator[Dates]:
        """Random days in random spellings."""
        train = self.settings.train
        for step in itertools.count(done + 1):
            yield dates.batch_of(self.split.train, train.batch_size, (train.seed, step))

    def inputs(self, batch: Dates) -> tuple[Array, ...]:
        """The source, and the target one place later: what stands before each token."""
        start_B1 = jnp.full((len(batch.target_BT), 1), dates.START, jnp.int32)
        target_BT = jnp.asarray(batch.target_BT)
        return jnp.asarray(batch.source_BS), jnp.concatenate([start_B1, target_BT[:, :-1]], 1)

    def nats(self, logits: Array, batch: Dates) -> Array:
        """Of the characters of the ISO date."""
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.target_BT).mean()

    def measures(self, nats: float) -> dict[str, float]:
        """A character."""
        return {"cross_entropy": nats}

    def glance(self, params: Any) -> dict[str, float]:
        """The share of the validation days that are written without a mistake."""
        written = _spelled(self.split.validation)
        return {"exact_match": float(np.mean(self._is_right(params, written)))}

    def judge(self, params: Any, screen: Screen) -> Records:
        """Exact match on the held-out days, in all and by style."""
        written = _spelled(self.split.held_out)
        right_B, size = self._is_right(params, written), count_parameters(params)
        styles = np.array([w.style for w in written])
        rows = []
        for style in STYLES:
            of_style = right_B[styles == style]
            rows.append([style, str(len(of_style)), str(int(of_style.sum()))])
        screen.table("Held-out days, by style of spelling", ["as", "days", "right"], rows)
        right, count = int(right_B.sum()), len(right_B)
        screen.say(f"Exact match: {right} of {count}, {right / count:.2%}; {size:,} parameters.")
        return [{"days": count, "right": right, "exact_match": right / count, "parameters": size}]

    def predict(self, params: Any, inputs: Sequence[str], screen: Screen) -> None:
        """A line for each input; without any, held-out days with the truth beside them."""
        written = _spelled(self.split.held_out[:_SHOWN])
        texts = list(inputs) or [w.text for w in written]
        truths = [""] * len(texts) if inputs else [f"  is {w.day}" for w in written]
        width = max(map(len, texts))
        for text, iso, truth in zip(texts, self._translated(params, texts), truths):
            note = "" if _is_date(iso) else "  (no such date)"
            screen.say(f"{text:<{width}}  {iso}{note}{truth}")

    def maps(self, params: Any, text: str | None = None) -> list[AttentionMap]:
        """The encoder's, the decoder's own, and the alignment of output and input characters."""
        text = self._example_text() if text is None else text
        source_BS = dates.encode([text])
        (iso,) = self._decoded(params, source_BS)
        pair = Dates(source_BS, dates.encode_iso([iso]))
        written, read, before = list(iso), list(text), ["start", *iso[:-1]]
        sides = {
            "attention": ("encoder layer {} self-attention", read, read),
            "self_attention": ("decoder layer {} self-attention", written, before),
            "cross_attention": ("decoder layer {} cross-attention", written, read),
        }
        found = []
        for (half, name), scores in zip(
            self.attention_paths, self.scores(params, *self.inputs(pair)), strict=True
        ):
            title, queries, keys = sides[name]
            shown = scores[:, : len(queries), : len(keys)]  # what follows is padding
            found.append(AttentionMap(title.format(half.split("_")[1]), shown, queries, keys))
        return found

    def _example_text(self) -> str:
        """A held-out day in a long spelling."""
        day = dates.date_of(self.split.held_out[0])
        return Spelling("the 21st of March 1987", "Tuesday, ").write(day)

    def _is_right(self, params: Any, written: Sequence[dates.Written]) -> np.ndarray:
        translated = self._translated(params, [w.text for w in written])
        return np.array([iso == w.day.isoformat() for iso, w in zip(translated, written)])

    def _translated(self, params: Any, texts: Sequence[str]) -> list[str]:
        """ISO dates by greedy decoding, many at once, in programs of few shapes."""
        source_BS = dates.encode(texts)
        parts = [source_BS[i : i + _AT_ONCE] for i in range(0, len(texts), _AT_ONCE)]
        return [iso for part in parts for iso in self._decoded(params, part)]

    def _decoded(self, params: Any, source_BS: np.ndarray) -> list[str]:
        return dates.decode_iso(np.asarray(translate(self.model, params, source_BS)))


def _spelled(days: np.ndarray) -> list[dates.Written]:
    """Each day in one spelling, the same every time."""
    return dates.write(days, np.random.default_rng(_SPELLING_SEED))


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True
