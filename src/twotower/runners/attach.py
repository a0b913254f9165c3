"""Gives a tower its runners."""

from __future__ import annotations

from twotower.model.tower import Tower
from twotower.runners.cuda_graph import CUDAGraphRunner
from twotower.runners.fused_cpu import FusedCPURunner


def attach_runners(tower: Tower) -> None:
    """Sets new runners for a tower, in order of preference. Each returns None for a pass that it does not support."""
    tower.runners = (CUDAGraphRunner(), FusedCPURunner())
