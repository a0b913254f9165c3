"""Inference state: the hybrid cache, its slots, its replica on a second device, cached prompt prefixes."""
