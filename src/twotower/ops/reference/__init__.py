"""The reference of each operation in plain torch: differentiable, any device and dtype."""
