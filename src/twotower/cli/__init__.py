"""One verb per file; heavy imports happen inside the commands, so `--help` is quick."""
