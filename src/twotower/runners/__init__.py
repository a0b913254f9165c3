"""Runners execute a whole pass of a tower at once: fused on a CPU, as a CUDA graph on a GPU."""
