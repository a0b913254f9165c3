"""Verified decoding in vLLM (experimental): the denoiser drafts, vLLM checks and rolls back.

    --speculative-config '{"method": "custom_class", "num_speculative_tokens": 15,
                           "model": "twotower_vllm.proposer.DenoiserProposer"}'

The denoiser reads the states of the context tower where vLLM keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from twotower import TwoTowerForCausalLM
from twotower.cache.pools import ContextView
from twotower_vllm.backbone_config import SOURCE, two_tower_config
from twotower_vllm.draft_settings import DraftSettings
from twotower_vllm.drafter import DenoiserDrafter
from twotower_vllm.kv_layouts import LAYOUTS, Layout
from twotower_vllm.vllm_states import DraftRow, context_view

CPU_VARIANTS = ("vec", "vec16")  # of CPU_ATTN; others order keys in tiles
_PROPOSE = GPUModelRunner.propose_draft_token_ids


def _propose_with_runner(self: GPUModelRunner, *args: object, **kwargs: object) -> object:
    """vLLM's method, which does not tell a proposer where the states of its texts are."""
    if isinstance(self.drafter, DenoiserProposer):
        self.drafter.runner = self
    return _PROPOSE(self, *args, **kwargs)


GPUModelRunner.propose_draft_token_ids = _propose_with_runner


class DenoiserProposer:
    """The proposer that vLLM makes. runner: the model runner that calls it, with the states of the texts.

    Raises:
        ValueError: the model is not a two-tower checkpoint.
    """

    drafter: DenoiserDrafter
    runner: GPUModelRunner

    def __init__(self, vllm_config: VllmConfig) -> None:
        model_config = vllm_config.model_config
        if not hasattr(model_config.hf_config, SOURCE):
            raise ValueError(f"{model_config.model} is not a two-tower checkpoint; leave out --speculative-config")
        self.config = vllm_config
        self.length = int(vllm_config.speculative_config.num_speculative_tokens)

    def load_model(self, target: nn.Module) -> None:
        """Loads the denoiser. target: vLLM's context tower."""
        model_config = self.config.model_config
        own = two_tower_config(getattr(model_config.hf_config, SOURCE))
        name = None if own.denoisers is None else own.denoisers.of_mode("verified")
        device = next(target.parameters()).device
        model = TwoTowerForCausalLM.from_pretrained(
            model_config.model,
            revision=model_config.revision,
            dtype=model_config.dtype,
            denoiser=name,
            device_map=device,
        )
        if not model.has_adapters:
            model.context.to("meta")  # frees it: vLLM has its own
        self.drafter = DenoiserDrafter(model, self.length, DraftSettings.of(self.config.additional_config))

    def dummy_run(self, *args: object, **kwargs: object) -> None:
        """vLLM measures its memory with a run of the drafter; this one needs no graph."""

    @torch.inference_mode()
    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """A draft for each text; none for texts that are still being read, sample, or are near their longest length.

        sampled_token_ids: the new tokens of each text: the accepted drafted tokens, then one more.
        num_tokens_no_spec: the number of tokens of each text. token_ids_cpu: (texts, longest), the texts.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        greedy = self.runner.input_batch.temperature_cpu
        rows = [
            DraftRow(row, int(num_tokens_no_spec[row]) - 1, len(tokens) - 1)
            for row, tokens in enumerate(sampled_token_ids)
            if tokens and greedy[row] <= 0 and self._room(num_tokens_no_spec[row]) > 0
        ]
        if rows:
            view = self._view(rows)
            pending = torch.tensor([sampled_token_ids[row.place][-1] for row in rows], device=view.lengths.device)
            for row, tokens in zip(rows, self.drafter.draft(pending, view).tolist(), strict=True):
                drafts[row.place] = tokens[: self._room(row.length + 1)]
        return drafts

    def _view(self, rows: Sequence[DraftRow]) -> ContextView:
        """The states of texts in the caches of the runner."""
        tables: dict[str, Tensor] = {}
        for number, group in enumerate(self.runner.kv_cache_config.kv_cache_groups):
            table = self.runner.input_batch.block_table[number].get_cpu_tensor()[[row.place for row in rows]]
            tables |= dict.fromkeys(group.layer_names, table)
        layers = self.config.compilation_config.static_forward_context
        own = {name: layers[name] for name in tables}
        return context_view(self.drafter.model.spec, own, tables, rows, layout_of(own), is_conv_state_dim_first())

    def _room(self, tokens: int) -> int:
        """How many tokens a draft of a text may have."""
        return min(self.length, int(self.config.model_config.max_model_len) - int(tokens) - 1)


def layout_of(layers: Mapping[str, object]) -> Layout:
    """The layout of keys and values of vLLM's layers.

    Raises:
        RuntimeError: the attention backend, or its variant for this processor, has a layout that is not supported.
    """
    attention = [layer for layer in layers.values() if isinstance(layer, Attention)]
    if not attention:
        return LAYOUTS["CPU_ATTN"]  # nothing is read by it
    name = attention[0].attn_backend.get_name()
    variant = getattr(attention[0], "isa", "vec")
    if name not in LAYOUTS or variant not in CPU_VARIANTS:
        raise RuntimeError(
            f"verified decoding reads the caches of {' and '.join(LAYOUTS)}, on a CPU without AMX; this is {name}"
            f" ({variant}). Serve the model without --speculative-config"
        )
    return LAYOUTS[name]
