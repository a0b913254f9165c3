"""`TwoTowerModel`: both towers, and the three verbs that every decoder is built from.

The verbs take and return tensors and never synchronise the host: `prefill` and `extend` write a context state,
`denoise` reads one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Self

import torch
from torch import Tensor, nn

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.pools import ContextView
from twotower.cache.replica import ContextReader, DeviceTransfer, LocalReader, Replica
from twotower.config import BackboneConfig, TwoTowerConfig
from twotower.errors import TwoTowerError
from twotower.model.conditioning import TimeConditioning
from twotower.model.fp32_tensors import preserving_fp32
from twotower.model.layer_io import AttentionMetadata
from twotower.model.tower import Tower
from twotower.tokenizer import Tokenizer

TowerSet = Literal["both", "context"]
PREFILL_CHUNK = 512  # tokens of a prompt read in one pass, layer by layer


class TwoTowerModel(nn.Module):
    """A frozen autoregressive context tower and a denoiser that fills blocks, coupled layer by layer.

    `towers="context"` builds the context tower alone: autoregressive use on half the memory.
    """

    config: TwoTowerConfig
    tokenizer: Tokenizer | None = None
    _last_nfe = 0  # denoiser passes of the last `generate_*` call

    def __init__(self, config: TwoTowerConfig, towers: TowerSet = "both") -> None:
        super().__init__()
        self.config = config
        self.build_towers(config, towers)

    def build_towers(self, config: TwoTowerConfig, towers: TowerSet) -> None:
        """Makes the modules, with random weights unless they are on the meta device; part of `__init__`."""
        backbone = config.backbone
        self.context = Tower(backbone)
        self.denoiser = Tower(backbone) if towers == "both" else None
        self.time = TimeConditioning(backbone.hidden_size, backbone.num_layers) if towers == "both" else None
        self.transfer: DeviceTransfer | None = None
        if self.context.device.type != "meta":
            self.reset_parameters()
        self._apply(lambda tensor: tensor)  # whatever the default dtype, the tensors that must not be narrow are wide

    def towers(self) -> Iterator[Tower]:
        """The context tower, then the denoiser where the model has one."""
        yield self.context
        if self.denoiser is not None:
            yield self.denoiser

    def reset_parameters(self) -> None:
        """Random weights; the time conditioning is the identity."""
        for tower in self.towers():
            tower.reset_parameters()

    # --- where things are ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The context tower's device."""
        return self.context.device

    @property
    def backbone(self) -> BackboneConfig:
        """The validated configuration that the layers were built from."""
        return self.context.config

    @property
    def dtype(self) -> torch.dtype:
        return self.context.embeddings.weight.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Where `.to`, `.bfloat16`, … end: the tensors that must not be narrow stay wide."""
        self.release()  # what was prepared for the weights as they were
        super()._apply(preserving_fp32(self, fn), recurse)
        return self

    def release(self) -> None:
        """Frees what the runners have prepared; they prepare it again when it is needed."""
        for tower in self.towers():
            tower.release()

    def place_towers_on_devices(
        self, ctx_device: str | torch.device = "cuda:0", den_device: str | torch.device = "cuda:1"
    ) -> Self:
        """Moves the towers; returns the model."""
        self.context.to(ctx_device)
        if self.denoiser is not None and self.time is not None:
            self.denoiser.to(den_device)
            self.time.to(den_device)
        self.release()
        return self

    # --- verbs ----------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Waits until accelerators have done what was launched on them; for clocks."""
        for tower in self.towers():
            if tower.device.type == "cuda":
                torch.cuda.synchronize(tower.device)

    def new_state(self, rows: int, capacity: int, shared_kv_slots: int | None = None) -> TowerState:
        """An empty context state for `rows` texts of up to `capacity` tokens (it can grow: `reserve`), or that share
        `columns` of them (`open`)."""
        return TowerState(self.context.config, rows, capacity, self.context.device, self.dtype, shared_kv_slots)

    def reader(self, state: TowerState) -> ContextReader:
        """How the denoiser reads `state`: in place, or through a replica on its own device."""
        denoiser = self._denoiser()
        if self.transfer is None and denoiser.device == self.context.device:
            return LocalReader(state)
        return Replica(state, denoiser.device, self.transfer or DeviceTransfer())

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a prompt that are best read in one pass."""
        with torch.no_grad():
            pieces = (runner.prefill_chunk(self.context) for runner in self.context.runners)
            return next((piece for piece in pieces if piece is not None), PREFILL_CHUNK)

    def prefill(self, tokens: Tensor, lengths: Tensor, state: TowerState, rows: Tensor | None = None) -> Tensor:
        """Reads prompts piece by piece.

        tokens (B, S), of which the first lengths (B,) count (0 allowed) → logits (B, V) after each row's last
        token (of no meaning for a row of length 0), in at least fp32.
        """
        state.reserve(state.max_seq_len + tokens.shape[1])
        last: Tensor = torch.zeros(len(lengths), self.context.config.hidden_size, device=self.device, dtype=self.dtype)
        piece = self.prefill_chunk
        for start in range(0, tokens.shape[1], piece):
            part = tokens[:, start : start + piece]
            valid = (lengths - start).clamp(0, part.shape[1])
            hidden = self._extend(part, valid, state, rows)
            at = (valid - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1])
            last = torch.where((valid > 0)[:, None], hidden.gather(1, at)[:, 0], last)
        state.commit_state()
        return self.context.logits(last)

    def extend(
        self,
        tokens: Tensor,
        state: TowerState,
        lengths: Tensor | None = None,
        rows: Tensor | None = None,
        logits: bool | Tensor = True,
        upcast_logits: bool = True,
    ) -> Tensor | None:
        """The context tower reads tokens (B, L), of which the first lengths (B,) count (None: all; 0 allowed).

        rows (B,): slots of the state, None for all of them in order. logits: whether any are wanted, or of which n of
        the B rows (n,) → logits (B or n, L, V) in at least fp32 (upcast_logits=False: in the model's
        dtype), or None.
        `state.rollback` takes any suffix back until the state is read again.
        """
        state.reserve(state.max_seq_len + tokens.shape[1])
        hidden = self._extend(tokens, lengths, state, rows)
        if isinstance(logits, Tensor):
            return self.context.logits(hidden[logits], upcast_logits)
        return self.context.logits(hidden, upcast_logits) if logits else None

    def denoise(
        self,
        block: Tensor,
        t: Tensor | None,
        view: ContextView,
        causal: bool = False,
        lengths: Tensor | None = None,
        upcast_logits: bool = True,
    ) -> Tensor:
        """The denoiser reads block (B, L), of which the first lengths (B,) count (None: all), after the text that
        `view` shows; writes nothing.

        t (B,): the fraction of the block still masked; None: no time conditioning at all. causal: attention
        inside the block sees earlier positions only (mock-AR) → logits (B, L, V) in at least fp32 (upcast_logits=False:
        in the model's dtype).
        """
        denoiser = self._denoiser()
        meta = AttentionMetadata(valid=_counting(block, lengths), causal=causal, start=view.lengths)
        modulation = None if t is None or self.time is None else self.time(t)
        hidden, _ = denoiser(block, meta, view.past, modulation, trace=False)
        return denoiser.logits(hidden, upcast_logits)

    def _extend(self, tokens: Tensor, lengths: Tensor | None, state: TowerState, rows: Tensor | None) -> Tensor:
        view = state.view(rows)
        meta = AttentionMetadata(valid=_counting(tokens, lengths), start=view.lengths)
        hidden, added = self.context(tokens, meta, view.past)
        rows_read, width = tokens.shape
        valid = torch.full((rows_read,), width, device=tokens.device) if lengths is None else lengths.clone()
        state.append(added, valid, width, rows)
        return hidden

    def _denoiser(self) -> Tower:
        if self.denoiser is None:
            raise TwoTowerError('this model was loaded with towers="context"; load it with towers="both" to denoise')
        return self.denoiser


def _counting(tokens: Tensor, lengths: Tensor | None) -> Tensor | None:
    """(B, L) whether each token counts, of which the first lengths (B,) do; None: all."""
    return None if lengths is None else torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
