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
from twotower.engine.workspace import Workspace
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
        """Whether there is a denoiser: a tower, or adapters."""

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


def block_rule(model: Towers) -> BlockRule:
    """The rule of the model's blocks."""
    return BlockRule.of(model.config.denoiser) if model.has_denoiser else RELEASED
