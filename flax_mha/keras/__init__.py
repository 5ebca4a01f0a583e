"""Keras's initializers, regularizers and constraints, as frozen pure functions of one array."""

from flax_mha.keras import constraints as constraints
from flax_mha.keras import initializers as initializers
from flax_mha.keras import regularizers as regularizers
