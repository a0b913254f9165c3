"""Deprecated: `twotower.decoding.unmasking`."""

import warnings

from twotower.decoding.unmasking import POLICIES, Pass, Policy, Verdict, register_policy

__all__ = ["POLICIES", "Pass", "Policy", "Verdict", "register_policy"]

warnings.warn(
    "twotower.generation.unmasking is deprecated; import from twotower.decoding.unmasking",
    DeprecationWarning,
    stacklevel=2,
)
