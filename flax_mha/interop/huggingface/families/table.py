"""All rows, by model type."""

from flax_mha.interop.huggingface.families.decoders import LLAMAS
from flax_mha.interop.huggingface.families.defaults import DEFAULTS
from flax_mha.interop.huggingface.families.encoders import IMAGES, TEXTS
from flax_mha.interop.huggingface.families.gemma4 import GEMMA4
from flax_mha.interop.huggingface.families.gpts import GPTS
from flax_mha.interop.huggingface.families.grids import GRIDS
from flax_mha.interop.huggingface.families.latents import LATENTS
from flax_mha.interop.huggingface.families.pairs import PAIRS
from flax_mha.interop.huggingface.families.wholes import WHOLES
from flax_mha.interop.huggingface.family import Family

_ROWS: tuple[Family, ...] = (
    *LLAMAS,
    *TEXTS,
    *IMAGES,
    *GPTS,
    *PAIRS,
    *GRIDS,
    *WHOLES,
    *GEMMA4,
    *LATENTS,
)
FAMILIES: dict[str, Family] = {
    name: family._replace(defaults={**DEFAULTS.get(name, {}), **family.defaults})
    for family in _ROWS
    for name in family.types
}

# Model types whose attention no config can say, and why.
_DISENTANGLED = "it has a bias that depends on query and key, through projections of the distance"
UNSAYABLE: dict[str, str] = {
    "deberta": _DISENTANGLED,
    "deberta-v2": _DISENTANGLED,
}
