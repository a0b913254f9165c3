"""Tiny models with several denoisers over one context tower, and the models with one of these each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from tiny_backbones import hf_config, two_tower

from twotower import GenericTwoTowerConfig, TwoTowerForCausalLM
from twotower.checkpoint import names
from twotower.denoiser_fields import DenoiserConfig, DraftHeadConfig
from twotower.named_denoisers import NamedDenoiser

MASKS = DenoiserConfig.with_adapters(3)
CHOICES: dict[str, DenoiserConfig] = {
    "full": DenoiserConfig(),
    "shift": DenoiserConfig(prediction_shift=1),
    "short": DenoiserConfig(denoiser_layers=(0, 1)),
    "masks": MASKS,
    "masks5": DenoiserConfig.with_adapters(5),
    "head": replace(MASKS, draft_head=DraftHeadConfig(4)),
    "tower-head": DenoiserConfig(prediction_shift=1, draft_head=DraftHeadConfig(4)),
    "everywhere": DenoiserConfig.with_adapters(3, "everywhere"),
}
FOR_MODE = ("diffusion", "verified", "mock_ar")


def with_one_each(
    name: str, choices: Mapping[str, str], dtype: torch.dtype = torch.float64
) -> dict[str, TwoTowerForCausalLM]:
    """Models of a family with the same context tower, each with a denoiser of `CHOICES`, by its name."""
    made = {
        own: two_tower(name, dtype, seed=1 + place, denoiser=CHOICES[choice])
        for place, (own, choice) in enumerate(choices.items())
    }
    first, *others = made.values()
    context = {key: tensor for key, tensor in first.state_dict().items() if is_of_context(key)}
    for model in others:
        model.load_state_dict(context, strict=False)
        model.config = generic(model.config, name)
    first.config = generic(first.config, name)
    return made


def generic(config: object, name: str) -> GenericTwoTowerConfig:
    """A configuration in the generic layout; a released one is converted."""
    if isinstance(config, GenericTwoTowerConfig):
        return config
    return GenericTwoTowerConfig(backbone=hf_config(name).to_dict(), mask_token_id=3)


def is_of_context(key: str) -> bool:
    """Whether a tensor belongs to the context tower itself."""
    return key.startswith("context.") and not names.of_adapters(key)


def joined(made: Mapping[str, TwoTowerForCausalLM], modes: Mapping[str, str] | None = None) -> TwoTowerForCausalLM:
    """The model with the denoisers of several models by name. modes: the denoiser of a mode; the others: the first."""
    first = next(iter(made.values()))
    assert isinstance(first.config, GenericTwoTowerConfig)
    config = GenericTwoTowerConfig(
        backbone=first.config.backbone,
        mask_token_id=3,
        denoisers={name: NamedDenoiser(model.config.denoiser).to_json() for name, model in made.items()},
        denoiser_for=dict.fromkeys(FOR_MODE, next(iter(made))) | dict(modes or {}),
    )
    model = TwoTowerForCausalLM(config).to(first.dtype)
    state = {key: tensor for key, tensor in first.state_dict().items() if is_of_context(key)}
    for place, name in enumerate(sorted(made)):
        own = made[name].state_dict()
        state |= {f"denoisers.{place}.{key}": tensor for key, tensor in own.items() if not is_of_context(key)}
    model.load_state_dict(state)
    return model.eval()
