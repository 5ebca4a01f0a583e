"""Settings so small that a run takes seconds, and how such a run is started and read."""

import json
import pathlib

import numpy as np

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.toml"))
TINY = {
    "language": {
        "task": {"name": "language"},
        "model": {"layers": 1, "features": 16, "context": 16},
        "attention": {"num_heads": 2},
        "train": {
            "steps": 60,
            "batch_size": 4,
            "warmup_steps": 5,
            "learning_rate": 0.02,
            "sample_bytes": 24,
        },
    },
    "digits": {
        "task": {"name": "digits"},
        "data": {"held_out": 40, "validation": 20},
        "model": {"layers": 1, "features": 8, "mlp_ratio": 1},
        "attention": {"num_heads": 2},
        "train": {"steps": 40, "batch_size": 8, "learning_rate": 0.01},
    },
    "dates": {
        "task": {"name": "dates"},
        "data": {"held_out": 40, "validation": 20},
        "model": {"layers": 1, "features": 8, "mlp_ratio": 1},
        "attention": {"num_heads": 2},
        "train": {"steps": 40, "batch_size": 8, "learning_rate": 0.01},
    },
}


class Run:
    """A run's config and place, and how to start it."""

    def __init__(self, directory, task):
        self.config, self.out = directory / f"{task}.toml", directory / "run"
        self.text = directory / "text.txt"
        self.text.write_bytes(b"abcdefgh" * 400)
        self.config.write_text("\n".join(map(_toml, TINY[task].items())))
        self.data = ["--data", str(self.text)] if task == "language" else []

    def train(self, *changes):
        """The arguments of the command."""
        options = [*self.data, "--out", str(self.out), *changes]
        return ["train", str(self.config), *options]

    def records(self, event, out=None):
        lines = ((out or self.out) / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["event"] == event]


def _toml(section):
    name, table = section
    return f"[{name}]\n" + "".join(f"{key} = {json.dumps(table[key])}\n" for key in table)


def random_weights(N, T, S, seed=0):
    """Attention weights whose rows sum to 1, a few of them large."""
    weights_NTS = np.random.default_rng(seed).exponential(size=(N, T, S)) ** 3
    return weights_NTS / weights_NTS.sum(-1, keepdims=True)
