"""What a training run would need: FLOPs, memory, time."""
