"""Position in attention: rotary embedding, ALiBi, learned biases by distance, row and column.

`Rotary` turns queries and keys, `AxialRotary` by positions of several axes; `QueryGrowth` makes
queries longer; `Alibi` and `RelativeBias` add to the logits a number that depends on head and
distance alone, so that no `[T, S]` array is made; `GridBias` adds one of rows and columns, which is
made. `Score` is any function of a logit and its pair. `register` makes own subclasses known to
saved configs.
"""

from flax_mha.positions.alibi import Alibi as Alibi
from flax_mha.positions.alibi import alibi_slopes as alibi_slopes
from flax_mha.positions.axial import AxialRotary as AxialRotary
from flax_mha.positions.bias import DenseBias as DenseBias
from flax_mha.positions.bias import DistanceFunction as DistanceFunction
from flax_mha.positions.function import PositionFunction as PositionFunction
from flax_mha.positions.grid_bias import GridBias as GridBias
from flax_mha.positions.growth import QueryGrowth as QueryGrowth
from flax_mha.positions.long_scalings import DynamicScaling as DynamicScaling
from flax_mha.positions.long_scalings import LongRopeScaling as LongRopeScaling
from flax_mha.positions.long_scalings import ProportionalScaling as ProportionalScaling
from flax_mha.positions.registry import register as register
from flax_mha.positions.relative_bias import RelativeBias as RelativeBias
from flax_mha.positions.rotary import Rotary as Rotary
from flax_mha.positions.scalings import LinearScaling as LinearScaling
from flax_mha.positions.scalings import Llama3Scaling as Llama3Scaling
from flax_mha.positions.scalings import Scaling as Scaling
from flax_mha.positions.scalings import YarnScaling as YarnScaling
from flax_mha.positions.scores import Score as Score
