"""The settings of a run: the sections of a TOML file as frozen dataclasses.

`[attention]` is `flax_mha.MultiHeadAttentionConfig` itself, so every option of the layer can be
tried from the file or with `--set attention.NAME=VALUE`. What `[data]`, `[model]` and `[train]`
hold is the task's to say; every task has `TrainSettings` and `[mesh]`. `config_file.py` reads them.
"""

import dataclasses
from typing import Any

from flax_mha import MultiHeadAttentionConfig


class DemoError(Exception):
    """A mistake of the user's: printed as `error: ...`, without a traceback."""


def number(default: float, **limits: float) -> Any:
    """A numeric field with limits of its own: `least`, `above`, `below`.

    Without any, the least is 1 for whole numbers and 0 for fractions.
    """
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The optimizer (AdamW, linear warmup, cosine decay), and how often what is done."""

    seed: int = number(0, least=0)
    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = number(3e-3, above=0)
    warmup_steps: int = number(50, least=0)
    weight_decay: float = 0.1
    beta2: float = number(0.98, below=1)
    clip_norm: float = number(1.0, above=0)
    log_every: int = 10  # steps between two records of the loss
    eval_every: int = 200  # ... between two looks at data that are not trained on
    checkpoint_every: int = 200  # ... between two states from which `resume` can go on


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How many devices cut what; `mesh.py` makes them a mesh, with axes of these names."""

    data: int = 1  # the batch
    heads: int = 1  # the heads of the attention layers
    context: int = 1  # the sequence, inside the attention


SECTIONS = ("data", "model", "train", "mesh")

# The data have their axes, the residual stream fixes the output's size, and `mesh.context` says
# whether the sequence is cut: not the user's to set here.
FIXED_ATTENTION = ("output_shape", "attention_axes", "context_axis")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run, one field per section of the file."""

    task: str
    data: Any
    model: Any
    attention: MultiHeadAttentionConfig
    train: Any
    mesh: MeshSettings = MeshSettings()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The settings as plain tables, as `settings.json` holds them; `settings_from` reads them.

        Example:
            >>> from flax_mha.demo.config_file import settings_from
            >>> settings_from({"task": {"name": "language"}}).to_dict()["task"]
            {'name': 'language'}
        """
        attention = self.attention.to_dict()
        return {
            "task": {"name": self.task},
            **{name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS},
            "attention": {k: attention[k] for k in attention if k not in FIXED_ATTENTION},
        }
