"""Names of axes: which axis of which parameter lies along which axis of a mesh.

Guide: `python -m flax_mha guide sharding`.
"""

from flax_mha.sharding.specs import param_axes as param_axes
from flax_mha.sharding.specs import param_specs as param_specs
