"""Ray, for more than one machine: `TwoTowerPredictor` for Ray Data, and `app` for Ray Serve. See docs/ray.md.

The import loads neither ray nor torch.
"""

from twotower.ray.builder import app
from twotower.ray.cluster import actor_options
from twotower.ray.predictor import TwoTowerPredictor

__all__ = ["TwoTowerPredictor", "actor_options", "app"]
