"""Checkpoints on disk and on the hub: tensor names, reading, writing, conversion, quantization."""
