"""What `implementation=None` runs over tiles: a kernel or plain blocks, told when it is lowered."""

import dataclasses

from flax_mha.attention import pallas_tpu
from flax_mha.attention.blockwise.attend import attend_by
from flax_mha.attention.blockwise.engine import Blocks, Computation, Engine
from flax_mha.attention.contract import Inputs, Options, Output
from flax_mha.attention.pallas_tpu.engine import Kernels
from flax_mha.core.platform import Place


def engine(inputs: Inputs, options: Options) -> Engine:
    serves = pallas_tpu.unsupported(inputs, options, "tpu") is None
    return _ByPlatform((("tpu", Kernels()),) if serves else ())


def attend(inputs: Inputs, options: Options) -> Output:
    """The call by the engine of the platform that it is lowered for."""
    return attend_by(engine(inputs, options), inputs, options)


@dataclasses.dataclass(frozen=True)
class _ByPlatform:
    """The engine of each platform that has one of its own; blocks elsewhere.

    Blocks too where XLA may cut arrays over devices: it cannot cut a kernel.
    """

    own: tuple[tuple[str, Engine], ...]

    def at(self, place: Place) -> Computation:
        own = dict(self.own).get(place.platform, Blocks()) if place.takes_kernels else Blocks()
        return own.at(place)
