"""The pages of `python -m flax_mha guide`, one a topic."""

from flax_mha.guides.pages import show as show
from flax_mha.guides.pages import text as text
from flax_mha.guides.pages import topics as topics
