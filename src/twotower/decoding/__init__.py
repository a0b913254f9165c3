"""Decoding rules as pure functions, without a model: sampling, commit policies, acceptance, draft depth, stopping."""
