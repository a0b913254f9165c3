"""Lets transformers' AutoModelForCausalLM load this directory; needs `pip install twotower`."""

from twotower import GenericTwoTowerConfig, TwoTowerConfig, TwoTowerForCausalLM

__all__ = ["GenericTwoTowerConfig", "TwoTowerConfig", "TwoTowerForCausalLM"]
