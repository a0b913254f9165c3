"""Whole training runs, from text to a shipped model: programs that may use every other part."""
