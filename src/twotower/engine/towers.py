"""`Towers`: the interface of a model for the engine. `TwoTowerForCausalLM` implements it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.pools import ContextView
from twotower.cache.replica import ContextReader
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.config import TwoTowerConfig
from twotower.decoding.block_rule import RELEASED, BlockRule
from twotower.decoding.params import GenerationParams
from twotower.engine.workspace import Workspace
from twotower.errors import ArgumentError
from twotower.specs import TowerSpec
from twotower.tokenizer import Tokenizer

if TYPE_CHECKING:
    from twotower.model.draft_head import DraftHead
    from twotower.model.tower import Tower


class Towers(Protocol):
    """Two towers with their passes (see `model.towers`).

    denoiser: None if only the context tower is loaded. workspace: draft controllers, measured costs and a reusable
    state, shared by all calls. generation_defaults: contents of `generation_config.json`.
    """

    workspace: Workspace
    generation_defaults: GenerationDefaults

    @property
    def config(self) -> TwoTowerConfig: ...

    @property
    def spec(self) -> TowerSpec:
        """The layers of a tower and their options."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def device(self) -> torch.device:
        """The context tower's device."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def denoiser(self) -> Tower | None: ...

    @property
    def has_denoiser(self) -> bool:
        """Whether there is a denoiser: a tower, adapters, or several."""

    @property
    def denoiser_device(self) -> torch.device:
        """The device of the denoiser towers."""

    def with_denoiser(self, name: str) -> Towers:
        """The model with one of several denoisers alone, which shares the weights."""

    @property
    def has_adapters(self) -> bool:
        """Whether the denoiser is the context tower with adapters."""

    @property
    def draft_head(self) -> DraftHead | None:
        """The draft head of the denoiser, if it has one."""

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a prompt that one pass reads best."""

    def new_state(
        self, rows: int, capacity: int, shared_kv_slots: int | None = None, longest_pass: int | None = None
    ) -> TowerState: ...

    def reader(self, state: TowerState) -> ContextReader: ...

    def synchronize(self) -> None: ...

    def prefill(self, tokens: Tensor, lengths: Tensor, state: TowerState, rows: Tensor | None = None) -> Tensor: ...

    def extend(
        self,
        tokens: Tensor,
        state: TowerState,
        lengths: Tensor | None = None,
        rows: Tensor | None = None,
        logits: bool | Tensor = True,
        upcast_logits: bool = True,
        prefix: Tensor | None = None,
    ) -> Tensor | None: ...

    def denoise(
        self,
        block: Tensor,
        t: Tensor | None,
        view: ContextView,
        causal: bool = False,
        lengths: Tensor | None = None,
        upcast_logits: bool = True,
        prefix: Tensor | None = None,
    ) -> Tensor: ...


def denoiser_name(model: Towers, params: GenerationParams) -> str | None:
    """The name of the denoiser that a request uses: the one it names, else that of its mode.

    None: the model has a single one, or the mode uses none.

    Raises:
        ArgumentError: the model has no denoiser of this name, or a single one.
    """
    several, name = model.config.denoisers, params.denoiser
    if several is None:
        if name is not None:
            raise ArgumentError(
                f"denoiser is {name!r}, and this model has one denoiser, without a name; leave it out", param="denoiser"
            )
        return None
    if name is not None:
        several.check_known(name)
    return None if params.mode == "ar" else name or several.of_mode(params.mode)


def model_for(model: Towers, params: GenerationParams) -> Towers:
    """The model with the one denoiser that a request uses; see `denoiser_name`."""
    name = denoiser_name(model, params)
    return model if name is None or not model.has_denoiser else model.with_denoiser(name)


def model_of_mode(model: Towers, mode: str, denoiser: str | None = None) -> Towers:
    """The model with the one denoiser of this name, else of a mode."""
    return model_for(model, GenerationParams.of(mode=mode, denoiser=denoiser))


def block_rule(model: Towers) -> BlockRule:
    """The rule of the blocks of a model with one denoiser; as released if the denoiser is not known, or not there."""
    known = model.has_denoiser and model.config.denoisers is None
    return BlockRule.of(model.config.denoiser) if known else RELEASED
