"""Loops over a batch."""
