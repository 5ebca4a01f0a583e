"""What a training step adds to the layer: penalties of its arrays, constraints of its weights.

Guide: `python -m flax_mha guide losses`.
"""

from flax_mha.training.losses import activity_loss as activity_loss
from flax_mha.training.losses import regularization_loss as regularization_loss
from flax_mha.training.updates import apply_constraints as apply_constraints
from flax_mha.training.updates import constrain as constrain
