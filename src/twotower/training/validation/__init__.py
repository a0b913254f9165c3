"""Validation of a training run every N steps: likelihoods on held-out text, and a sample of what the model writes.

Both classes are a trainer's `validate`. Every process calls them, with the objective sharded or not. All processes get
the same plain numbers, and the same weights give the same numbers.
"""

from twotower.training.validation.autoregressive import AutoregressiveValidation
from twotower.training.validation.denoising import DenoisingValidation

__all__ = ["AutoregressiveValidation", "DenoisingValidation"]
