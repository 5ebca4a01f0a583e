"""What `implementation=None` chooses, and the figures behind the rule."""

from collections.abc import Sequence

from flax_mha.attention._contract import Inputs

SMALLEST_BLOCKWISE = 128 * 128
RULE = "blockwise from T x S = 128 x 128 on, reference below"


def preferred(able: Sequence[str], inputs: Inputs) -> str:
    """The name to run among those that can serve the call."""
    T, S = inputs.query_BTNH.shape[1], inputs.key_BSKH.shape[1]
    favourite = "blockwise" if T * S >= SMALLEST_BLOCKWISE else "reference"
    return favourite if favourite in able else able[0]
