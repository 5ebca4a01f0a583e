"""The contenders by name: ours, ours by implementation, and one file for each peer.

To add a peer: a file with `build(case, data) -> Contender`, and a line in `PEERS`.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

from flax_mha import IMPLEMENTATIONS
from flax_mha.bench.cases import Case
from flax_mha.bench.data import Data
from flax_mha.bench.peers import contract, ours
from flax_mha.bench.peers.contract import Contender


class Peer(NamedTuple):
    """Where a contender comes from."""

    file: str
    package: str  # as it is imported
    distribution: str  # as it is installed
    family: str = "jax"  # ours, jax or torch


PEERS = {
    "keras": Peer("keras", "keras", "keras"),
    "linen": Peer("linen", "flax", "flax"),
    "nnx": Peer("nnx", "flax", "flax"),
    "equinox": Peer("equinox", "equinox", "equinox"),
    "haiku": Peer("haiku", "haiku", "dm-haiku"),
    "torch sdpa": Peer("torch_sdpa", "torch", "torch", "torch"),
    "torch MHA": Peer("torch_mha", "torch", "torch", "torch"),
}
OURS = Peer("ours", "flax_mha", "flax_mha", "ours")
CONTENDERS = {"ours": OURS, **{f"ours/{name}": OURS for name in IMPLEMENTATIONS}, **PEERS}


def require(name: str) -> None:
    """Looks for a contender's package.

    Raises:
        Absent: it is not installed.
    """
    contract.require(CONTENDERS[name].package, CONTENDERS[name].distribution)


def version(name: str) -> str:
    """The installed version of a contender's package."""
    return importlib.metadata.version(CONTENDERS[name].distribution)


def builder(name: str) -> Callable[[Case, Data], Contender]:
    """The function that builds a contender; a peer's framework is imported when it is called."""
    if name in PEERS:
        return importlib.import_module(f"flax_mha.bench.peers.{PEERS[name].file}").build
    return ours.builder(name.partition("/")[2] or None)
