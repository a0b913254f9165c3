"""Command line: one verb per file. Verbs import torch only when they run, so that `--help` is quick."""
