"""Training: an autoregressive backbone, then the denoiser of its frozen copy (spec §4)."""
