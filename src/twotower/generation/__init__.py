"""Deprecated names of decoding. `twotower.decoding` has the rules, `twotower.engine` the decoder."""
