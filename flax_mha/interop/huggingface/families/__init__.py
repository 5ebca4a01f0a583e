"""The table of model types: a row a family, in files by their kind."""

from flax_mha.interop.huggingface.families.table import FAMILIES as FAMILIES
from flax_mha.interop.huggingface.families.table import UNSAYABLE as UNSAYABLE
