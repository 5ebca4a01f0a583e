"""The settings of a run: the sections of a TOML file as frozen dataclasses.

`[attention]` is `flax_mha.MultiHeadAttentionConfig` itself, so every option of the layer can be
tried from the file or with `--set attention.NAME=VALUE`. `read_settings` is in `config_file.py`.
"""

import dataclasses
from typing import Any

from flax_mha import MultiHeadAttentionConfig


class DemoError(Exception):
    """A mistake of the user's: printed as `error: ...`, without a traceback."""


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What is read, and how much of it is held out."""

    max_bytes: int = 12_000_000  # read at most
    held_out_bytes: int = 65_536  # compressed and predicted, never trained on
    held_out_every: int = 20  # of the files, every so many-th is held out


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The Transformer around the attention."""

    layers: int = 4
    features: int = 128
    context: int = 128
    mlp_ratio: int = 4
    dropout: float = 0.0
    tied_head: bool = True


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The optimizer (AdamW, linear warmup, cosine decay), and what is reported."""

    seed: int = 0
    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta2: float = 0.98
    clip_norm: float = 1.0
    log_every: int = 10
    eval_every: int = 200
    sample_bytes: int = 400
    prompt: str = "def "
    temperature: float = 0.7


SECTIONS = {"data": DataSettings, "model": ModelSettings, "train": TrainSettings}

# The demo's text has one axis, and the residual stream fixes the output's size.
FIXED_ATTENTION = ("output_shape", "attention_axes")

# The least value of a number, where it is not 1 for whole numbers and 0 for fractions.
LEAST = {"seed": 0, "warmup_steps": 0, "sample_bytes": 0, "held_out_bytes": 2, "held_out_every": 2}
FRACTIONS_BELOW_ONE = ("dropout", "beta2")
POSITIVE = ("learning_rate", "clip_norm", "temperature")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run, one field per section of the file."""

    data: DataSettings
    model: ModelSettings
    attention: MultiHeadAttentionConfig
    train: TrainSettings

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The settings as plain tables, as `settings.json` holds them; `settings_from` reads them.

        Example:
            >>> from flax_mha.demo.config_file import settings_from
            >>> settings_from({"attention": {"num_heads": 2, "key_dim": 8}}).to_dict()["data"]
            {'max_bytes': 12000000, 'held_out_bytes': 65536, 'held_out_every': 20}
        """
        tables = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        attention = self.attention.to_dict()
        return {
            **tables,
            "attention": {k: attention[k] for k in attention if k not in FIXED_ATTENTION},
        }
