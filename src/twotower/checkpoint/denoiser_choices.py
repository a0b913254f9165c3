"""What `twotower init` is asked to choose of a new denoiser, and what follows where it is not asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from twotower.checkpoint.peft_adapters import AdapterFolder
from twotower.denoiser_fields import AdapterGate, BlockAttention, DenoiserConfig, DraftHeadConfig
from twotower.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class DenoiserChoices:
    """Fields of `DenoiserConfig` that a new denoiser gets. None: what suits the other choices.

    Without adapters these are the released ones. Adapters act at masks, with shift 1 and prefix-causal attention.
    draft_head: the rank of a draft head.
    """

    prediction_shift: int | None = None
    block_attention: BlockAttention | None = None
    adapter_gate: AdapterGate | None = None
    first_from_ar: bool = False
    draft_head: int | None = None

    @classmethod
    def of_options(cls, options: Mapping[str, object]) -> DenoiserChoices:
        """The values of the options of `twotower init`, which has checked them."""
        shift, head = options["prediction_shift"], options["draft_head"]
        return cls(
            prediction_shift=None if shift is None else int(str(shift)),
            block_attention=cast(BlockAttention | None, options["block_attention"]),
            adapter_gate=cast(AdapterGate | None, options["adapter_gate"]),
            first_from_ar=bool(options["first_from_ar"]),
            draft_head=None if head is None else int(str(head)),
        )

    @property
    def given(self) -> list[str]:
        """The options that are not left out."""
        names = ("prediction_shift", "block_attention", "adapter_gate", "first_from_ar", "draft_head")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) not in (None, False)]

    def config(self, rank: int | None) -> DenoiserConfig:
        """The denoiser with new adapters of a rank, or a second tower.

        Raises:
            ArgumentError: a gate without adapters, or choices that do not go with the gate.
            ConfigError: the choices exclude each other.
        """
        if rank is None:
            self._check_tower()
        elif self.adapter_gate != "everywhere":
            self._check_masks()
        usual = DenoiserConfig() if rank is None else DenoiserConfig.with_adapters(rank, self.adapter_gate or "masks")
        return replace(
            usual,
            prediction_shift=usual.prediction_shift if self.prediction_shift is None else self.prediction_shift,
            block_attention=self.block_attention or usual.block_attention,
            first_from_ar=self.first_from_ar,
            draft_head=None if self.draft_head is None else DraftHeadConfig(self.draft_head),
        )

    def _check_tower(self) -> None:
        if self.adapter_gate is not None:
            raise ArgumentError(
                f"adapter_gate is {self.adapter_gate!r}, and the denoiser is a second tower; leave out --adapter-gate, "
                "or the options of a second tower (--denoiser tower, --denoiser-layers, --denoiser-feed-forward)",
                param="adapter_gate",
            )

    def _check_masks(self) -> None:
        refused = {
            "--first-from-ar": self.first_from_ar,
            "--prediction-shift 0": self.prediction_shift == 0,
            "--block-attention full": self.block_attention == "full",
        }
        for option, given in refused.items():
            if given:
                raise ArgumentError(
                    f"{option} does not go with adapters at masks, whose shift is 1 and whose attention is "
                    f"prefix_causal; leave it out, or give --adapter-gate everywhere or --denoiser tower"
                )


NO_CHOICES = DenoiserChoices()


def given_adapters(
    adapters: str | Path | None, mask_token: int | str | None, denoiser_lora: int | None, choices: Sequence[str]
) -> AdapterFolder | None:
    """The adapters that `twotower init` gets, if any.

    Raises:
        CheckpointError, ConfigError: see `AdapterFolder.read`.
        ArgumentError: another mask token, a rank or other choices are given too.
    """
    if adapters is None:
        return None
    if denoiser_lora is not None:
        choices = ["--denoiser-lora", *choices]
    if choices:
        raise ArgumentError(f"--adapters and {choices[0]} exclude each other: the given adapters bring their own")
    stored = AdapterFolder.read(adapters)
    if mask_token is not None and str(mask_token) != str(stored.mask_token_id):
        raise ArgumentError(
            f"--mask-token is {mask_token!r}, and the mask token of {adapters} has id {stored.mask_token_id}; leave "
            "out --mask-token"
        )
    return stored
