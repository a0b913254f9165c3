"""The model card of the served model."""

from __future__ import annotations

from twotower.server.response_schemas import ModelCard
from twotower.server.service import Service


def model_card(service: Service, name: str) -> ModelCard:
    """The model card of the served model under one of its names."""
    several = service.model.config.denoisers if service.model.has_denoiser else None
    modes = ["diffusion", "verified", "ar", "auto", "mock_ar"] if service.model.has_denoiser else ["ar"]
    return ModelCard(
        id=name,
        created=service.started,
        owned_by="twotower",
        max_model_len=service.engine.stats.max_seq_len,
        modes=modes,
        default_mode=str(service.settings.decoding["mode"]),
        block_size=service.engine.stats.max_block_size,
        mask_token_id=service.model.config.mask_token,
        denoisers={} if several is None else {name: several.modes_of(name) for name in several.names},
    )
