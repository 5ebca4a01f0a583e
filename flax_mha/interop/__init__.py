"""Weights and functions of other frameworks, one room each; none of them needs to be installed."""

from flax_mha.interop import equinox as equinox
from flax_mha.interop import flax as flax
from flax_mha.interop import huggingface as huggingface
from flax_mha.interop import jax_nn as jax_nn
from flax_mha.interop import keras as keras
from flax_mha.interop import torch as torch
