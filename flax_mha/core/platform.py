"""Where a program runs: known when it is lowered, and not while it is traced."""

import math
from typing import Any, NamedTuple

import jax

PLATFORMS = ("cpu", "gpu", "tpu")


class Place(NamedTuple):
    """One of `PLATFORMS` or "any", and over how many devices XLA may spread what is computed.

    Attributes:
        platform: where the program runs.
        devices: those of the mesh axes that are left to XLA.
        by_hand: whether no axis is left to XLA, not even one of a single device.
    """

    platform: str
    devices: int = 1
    by_hand: bool = True

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
            return cls(platform, axes.num_devices, axes.num_devices == 1)
        if not hasattr(axes, "manual_axes"):  # the pmap of jax 0.7: every replica is a program
            return cls(platform)
        free = [size for name, size in axes.mesh.shape.items() if name not in axes.manual_axes]
        return cls(platform, math.prod(free), not free)

    @property
    def cpu(self) -> bool:
        return self.platform == "cpu"

    @property
    def takes_kernels(self) -> bool:
        """Whether XLA has nothing to cut there: it cannot cut a kernel."""
        return self.by_hand and self.devices == 1

    @property
    def is_shared(self) -> bool:
        """Whether XLA may cut an array's axes, so that a loop must not."""
        return self.devices > 1
