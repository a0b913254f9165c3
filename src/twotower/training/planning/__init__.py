"""Plans a training run: FLOPs, memory and time."""
