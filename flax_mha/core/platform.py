"""Where a program runs: known when it is lowered, and not while it is traced."""

import math
from typing import Any, NamedTuple

import jax

PLATFORMS = ("cpu", "gpu", "tpu")


class Place(NamedTuple):
    """One of `PLATFORMS` or "any", and over how many devices XLA may spread what is computed."""

    platform: str
    devices: int = 1

    @classmethod
    def here(cls) -> "Place":
        """One device of the machine that asks."""
        return cls(jax.default_backend())

    @classmethod
    def anywhere(cls) -> "Place":
        """No place: of a program that is looked at for the types of its outputs alone."""
        return cls("any")

    @classmethod
    def lowered_for(cls, context: Any, platform: str) -> "Place":
        """From a lowering rule's context: the devices that no `shard_map` has divided by hand."""
        axes = context.module_context.axis_context
        if hasattr(axes, "num_devices"):
            return cls(platform, axes.num_devices)
        if not hasattr(axes, "manual_axes"):  # the pmap of jax 0.7: every replica is a program
            return cls(platform)
        free = [size for name, size in axes.mesh.shape.items() if name not in axes.manual_axes]
        return cls(platform, math.prod(free))

    @property
    def cpu(self) -> bool:
        return self.platform == "cpu"

    @property
    def is_shared(self) -> bool:
        """Whether XLA may cut an array's axes, so that a loop must not."""
        return self.devices > 1
