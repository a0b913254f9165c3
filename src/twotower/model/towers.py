"""`TwoTowerModel`: both towers and the three passes of decoding: `prefill`, `extend` and `denoise`.

`prefill` and `extend` write a context state, `denoise` reads one. All take and return tensors, and none waits for an
accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Self

import torch
from torch import Tensor, nn

from twotower.cache.hybrid_cache import TowerState
from twotower.cache.pools import ContextView
from twotower.cache.replica import ContextReader, DeviceTransfer, LocalReader, Replica
from twotower.cache.sliding_window import prefill_limit
from twotower.cache.state_caches import caches_of
from twotower.config import TwoTowerConfig
from twotower.errors import ArgumentError, TwoTowerError
from twotower.families import tower_spec
from twotower.model import long_rope
from twotower.model.conditioning import TimeConditioning
from twotower.model.denoisers import Views, add_adapters, check_one_device, parts_of, several_denoisers, tower_of
from twotower.model.draft_head import DraftHead
from twotower.model.fp32_tensors import preserving_fp32
from twotower.model.layer_io import AttentionMetadata
from twotower.model.tower import Tower
from twotower.specs import TowerSpec
from twotower.tokenizer import Tokenizer

TowerSet = Literal["both", "context"]
NO_DENOISER = 'the model was loaded with towers="context" and has no denoiser; load it with towers="both"'
PREFILL_CHUNK = 512  # prompt tokens of one pass, where no runner prefers another number


class TwoTowerModel(nn.Module):
    """A frozen autoregressive context tower and a denoiser tower, which reads the caches of the same context layers.

    `towers="context"` builds the context tower alone, for autoregressive decoding with half the memory. With
    `config.denoiser.adapters`, the denoiser is the context tower with adapters, and there is no second tower. With
    `config.denoisers`, `denoisers` has the parts of several, in the order of their names.
    """

    config: TwoTowerConfig
    tokenizer: Tokenizer | None = None
    _last_nfe = 0  # denoiser passes of the last `generate_*` call

    def __init__(self, config: TwoTowerConfig, towers: TowerSet = "both") -> None:
        super().__init__()
        self.config = config
        self.build_towers(config, towers)

    def build_towers(self, config: TwoTowerConfig, towers: TowerSet) -> None:
        """Builds the modules, with random weights unless they are on the meta device; part of `__init__`."""
        spec = tower_spec(config)
        self.context = Tower(spec)
        full = towers == "both" and config.denoisers is None and config.denoiser.adapters is None
        self.denoiser = tower_of(config, spec) if full else None
        self.time = TimeConditioning(spec.hidden_size, self.denoiser.spec.num_layers) if self.denoiser else None
        self.denoisers, self._views = several_denoisers(config, self.context, towers == "both"), Views()
        if towers == "both" and config.denoisers is None and config.denoiser.adapters is not None:
            add_adapters(self.context, config)
        self.transfer: DeviceTransfer | None = None
        if self.context.device.type != "meta":
            self.reset_parameters()
        self._apply(lambda tensor: tensor)  # upcasts the fp32 tensors if the default dtype is narrower

    def with_denoiser(self, name: str) -> Self:
        """The model with one of its denoisers alone. It shares the weights, and is kept until modules change.

        Raises:
            ArgumentError: the model has no denoiser of this name, or a single one.
        """
        several = self.config.denoisers
        if several is None:
            raise ArgumentError(
                f"denoiser is {name!r}, and this model has one denoiser, without a name; leave it out", param="denoiser"
            )
        several.check_known(name)
        if not self.denoisers:
            raise TwoTowerError(NO_DENOISER)
        return self._views.of(self, name, self._prepare_view)

    def _prepare_view(self, view: Self) -> None:
        """Completes a new view of `with_denoiser`."""

    def towers(self) -> Iterator[Tower]:
        """The context tower, then the denoiser towers that the model has."""
        yield self.context
        for tower in (self.denoiser, *(part.denoiser for part in parts_of(self.denoisers))):
            if tower is not None:
                yield tower

    def reset_parameters(self) -> None:
        """Sets random weights, and the identity as time conditioning."""
        for tower in self.towers():
            tower.reset_parameters()
        for part in parts_of(self.denoisers):
            part.reset_adapters(self.spec.initializer_range)

    @property
    def has_adapters(self) -> bool:
        """Whether the denoiser is the context tower with adapters."""
        return self.context.mask_embedding is not None

    @property
    def draft_head(self) -> DraftHead | None:
        """The draft head of the denoiser, if it has one."""
        return (self.context if self.denoiser is None else self.denoiser).draft_head

    @property
    def has_denoiser(self) -> bool:
        """Whether the model has a denoiser: a tower, adapters, or several."""
        return self.denoiser is not None or self.has_adapters or len(self.denoisers) > 0

    # --- devices and dtype ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The context tower's device."""
        return self.context.device

    @property
    def denoiser_device(self) -> torch.device:
        """The device of denoisers: that of the denoiser towers, else that of the context tower."""
        return list(self.towers())[-1].device

    @property
    def spec(self) -> TowerSpec:
        """The layers of the context tower and their options; those of the denoiser are `denoiser.spec`."""
        return self.context.spec

    @property
    def dtype(self) -> torch.dtype:
        return self.context.embeddings.weight.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Implements `.to`, `.bfloat16`, …; the fp32 tensors stay in at least fp32 (see `fp32_tensors`)."""
        self.release()  # prepared data holds addresses of the old weights
        super()._apply(preserving_fp32(self, fn), recurse)
        return self

    def release(self) -> None:
        """Frees the data that the runners have prepared; they prepare it again on demand."""
        for tower in self.towers():
            tower.release()
        self._views.release()

    def release_modules(self) -> None:
        """Frees whatever keeps modules that are about to be replaced: prepared data, and views with one denoiser."""
        self.release()
        self._views.drop()

    def place_towers_on_devices(
        self, ctx_device: str | torch.device = "cuda:0", den_device: str | torch.device = "cuda:1"
    ) -> Self:
        """Moves each tower to its device; returns the model.

        Raises:
            ArgumentError: the devices differ, and the denoiser is adapters on the context tower.
        """
        parts = parts_of(self.denoisers)
        if self.has_adapters or any(part.context is not None for part in parts):
            check_one_device(ctx_device, den_device)
        self.context.to(ctx_device)
        for module in (self.denoiser, self.time, *parts):
            if module is not None:
                module.to(den_device)
        self.release()
        return self

    # --- passes ---------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Waits until the CUDA devices of the towers are idle, for time measurements."""
        for tower in self.towers():
            if tower.device.type == "cuda":
                torch.cuda.synchronize(tower.device)

    def new_state(
        self, rows: int, capacity: int, shared_kv_slots: int | None = None, longest_pass: int | None = None
    ) -> TowerState:
        """An empty context state of `rows` rows.

        Each row has room for `capacity` tokens (`reserve` grows it), or the rows share `shared_kv_slots` (`allocate`).
        longest_pass: see `TowerState`; None: that of a prompt.
        """
        device = self.context.device
        return TowerState(self.spec, rows, capacity, device, self.dtype, shared_kv_slots, longest_pass)

    def reader(self, state: TowerState) -> ContextReader:
        """The denoiser's access to `state`: in place, or through a replica on the denoiser's device."""
        own = [tower.spec for tower in self.towers()][1:] if self.denoisers else [self._denoiser().spec]
        device, places = self.denoiser_device, [spec.counterparts for spec in own or [self.spec]]
        if self.transfer is None and device == self.context.device:
            return LocalReader(state)
        layers = None if None in places else sorted({place for each in places for place in each or ()})
        return Replica(state, device, self.transfer or DeviceTransfer(), layers)

    @property
    def prefill_chunk(self) -> int:
        """The number of prompt tokens to read in one pass."""
        with torch.no_grad():
            chunks = (runner.prefill_chunk(self.context) for runner in self.context.runners)
            chunk = next((chunk for chunk in chunks if chunk is not None), PREFILL_CHUNK)
            return min(chunk, prefill_limit(self.spec))

    def prefill(self, tokens: Tensor, lengths: Tensor, state: TowerState, rows: Tensor | None = None) -> Tensor:
        """The context tower reads prompts chunk by chunk → logits (B, V) after the last token of each row.

        tokens: (B, S), padded on the right. lengths: (B,), tokens of each row without padding; a row of length 0 gets
        undefined logits. rows: (B,), the slots of the rows in the state; None: all slots in order. The logits are in
        at least fp32.
        """
        state.reserve(state.max_seq_len + tokens.shape[1])
        last: Tensor = torch.zeros(len(lengths), self.spec.hidden_size, device=self.device, dtype=self.dtype)
        chunk = self.prefill_chunk
        for start in range(0, tokens.shape[1], chunk):
            part = tokens[:, start : start + chunk]
            valid = (lengths - start).clamp(0, part.shape[1])
            hidden = self._extend(part, valid, state, rows, None)
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
        prefix: Tensor | None = None,
    ) -> Tensor | None:
        """The context tower reads tokens (B, L) and appends to the state → logits (B or n, L, V), or None.

        lengths: (B,), tokens of each row without padding; None: L. rows: (B,), the slots of the rows in the state;
        None: all slots in order. logits: whether to compute logits, or the indices (n,) of the rows that need them.
        upcast_logits: False: logits in the model's dtype; True: in at least fp32. prefix: (B,), with adapters, the
        tokens of each row before its first mask (`model.adapters`): the state gets them alone; None: no masks.
        `state.rollback` can drop any suffix of the tokens until the state is read again.
        """
        state.reserve(state.max_seq_len + tokens.shape[1])
        hidden = self._extend(tokens, lengths, state, rows, prefix)
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
        prefix: Tensor | None = None,
    ) -> Tensor:
        """One denoising pass over block (B, L) → logits (B, L, V). It writes nothing.

        t: (B,), the masked fraction of each block; None: no time conditioning. view: the context before the block.
        causal: whether attention in the block is causal (mode mock_ar). lengths: (B,), tokens of each row without
        padding; None: L. upcast_logits: False: logits in the model's dtype; True: in at least fp32. prefix: (B,), with
        prefix-causal attention, the positions before the first mask; None: those before the model's mask token. With
        adapters, t has no effect. With a prediction shift of 1 the logits at a position are those of the token after
        it.
        """
        denoiser = self._denoiser()
        meta = AttentionMetadata(
            token_mask=_token_mask(block, lengths),
            causal=causal,
            prefix=self._prefix(block, causal, view, prefix),
            start=view.lengths,
            long=view.long,
        )
        modulation = None if t is None or self.time is None else self.time(t)
        past = caches_of(view.past, denoiser.spec.counterparts)
        hidden, _ = denoiser(block, meta, past, modulation, keep_step_inputs=False)
        return denoiser.logits(hidden, upcast_logits)

    def _prefix(self, block: Tensor, causal: bool, view: ContextView, given: Tensor | None) -> Tensor | None:
        """(B,), how many positions of a block (B, L) attend causally and have no adapters; None: as `causal` says."""
        choices = self.config.denoiser
        if choices.adapters is not None and choices.adapters.gate == "everywhere":
            assert not causal or block.shape[1] == 1, "adapters everywhere act in blocks, and mock-AR's have one token"
            return torch.zeros_like(view.lengths)
        if choices.block_attention == "full":
            return None
        if causal:
            return torch.full_like(view.lengths, block.shape[1])
        return first_masks(block, self.config.mask_token, choices.prediction_shift) if given is None else given

    def _extend(
        self, tokens: Tensor, lengths: Tensor | None, state: TowerState, rows: Tensor | None, prefix: Tensor | None
    ) -> Tensor:
        if state.texts is not None:
            assert prefix is None, "adapters with LongRoPE"
            return long_rope.extend(self._read, tokens, lengths, state, rows, self.prefill_chunk)
        return self._read(tokens, lengths, state, rows, prefix)

    def _read(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        state: TowerState,
        rows: Tensor | None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        rows_read, width = tokens.shape
        state.prepare(width)
        view = state.view(rows)
        meta = AttentionMetadata(
            token_mask=_token_mask(tokens, lengths), prefix=prefix, start=view.lengths, long=view.long
        )
        appended = lengths if prefix is None else prefix
        appended = torch.full((rows_read,), width, device=tokens.device) if appended is None else appended.clone()
        hidden, updates = self.context(tokens, meta, view.past, appended=appended)
        state.append(updates, appended, width, rows)
        return hidden

    def _denoiser(self) -> Tower:
        if self.has_adapters:
            return self.context
        if self.denoiser is None:
            raise TwoTowerError(NO_DENOISER) if self.config.denoisers is None else self.config.denoisers.ambiguous()
        return self.denoiser


def _token_mask(tokens: Tensor, lengths: Tensor | None) -> Tensor | None:
    """(B, L), True for the first lengths (B,) tokens of each row; None without lengths: no padding."""
    return None if lengths is None else torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


def first_masks(block: Tensor, mask_token: int, known: int = 0) -> Tensor:
    """(B,), the tokens of each row of a block (B, L) before its first mask. The first `known` tokens are no masks."""
    visible = block != mask_token
    visible[:, :known] = True
    return visible.long().cumprod(1).sum(1)
