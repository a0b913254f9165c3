"""Gives a tower its runners."""

from __future__ import annotations

from twotower.model.tower import Tower
from twotower.runners.cuda_graph import CUDAGraphRunner
from twotower.runners.fused_cpu import FusedCPURunner


def attach_runners(tower: Tower) -> None:
    """New runners for a tower, in order of preference. Each declines the passes that it does not serve."""
    tower.runners = (CUDAGraphRunner(), FusedCPURunner())
