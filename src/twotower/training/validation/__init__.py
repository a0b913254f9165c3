"""Validation during training: likelihoods on held-out text, and a generated sample.

Instances of these classes are a trainer's `validate`. Every process calls them, with the objective sharded or not. All
processes get the same numbers, and the same weights give the same numbers.
"""

from twotower.training.validation.adapters import AdapterValidation
from twotower.training.validation.autoregressive import AutoregressiveValidation
from twotower.training.validation.denoising import DenoisingValidation

__all__ = ["AdapterValidation", "AutoregressiveValidation", "DenoisingValidation"]
