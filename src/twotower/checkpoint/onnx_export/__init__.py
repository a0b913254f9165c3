"""ONNX graphs of the passes of a small model, with explicit state."""
