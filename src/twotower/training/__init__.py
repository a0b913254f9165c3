"""Training: first an autoregressive backbone, then the denoiser beside a frozen copy of the backbone."""
