"""Lets transformers' AutoModelForCausalLM load this directory; needs `pip install twotower`."""

from twotower import TwoTowerConfig, TwoTowerForCausalLM

__all__ = ["TwoTowerConfig", "TwoTowerForCausalLM"]
