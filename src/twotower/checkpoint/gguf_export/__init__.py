"""Writes the context tower of a checkpoint as a GGUF file, which llama.cpp, Ollama and LM Studio run."""
