"""The network: mixers, towers, conditioning, and the model that couples both towers."""
