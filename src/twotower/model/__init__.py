"""The network: mixers, towers, conditioning, and the Hugging Face model that holds both towers."""
