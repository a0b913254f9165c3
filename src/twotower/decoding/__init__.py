"""Decoding rules as pure functions: parameters, sampling, unmasking, acceptance, draft length, stopping. No model."""
