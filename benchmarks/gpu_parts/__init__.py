"""The parts of `gpu.py`. Each runs in a process of its own and appends every measurement to one file."""
