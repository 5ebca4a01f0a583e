"""The static description of one layer, checked and hashable."""

from flax_mha.config.config import MultiHeadAttentionConfig as MultiHeadAttentionConfig
from flax_mha.config.latent import Latent as Latent
from flax_mha.config.lora import Lora as Lora
