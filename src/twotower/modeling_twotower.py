"""`TwoTowerForCausalLM`: the Hugging Face face of `TwoTowerModel`, with the published API.

Everything that generates is built from the verbs of `TwoTowerModel` in `twotower.engine.generation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from twotower.checkpoint import pretrained
from twotower.checkpoint.quantize import Quantization, quantization_of
from twotower.config import TwoTowerConfig
from twotower.decoding.output import BlockEvent
from twotower.decoding.params import GenerationParams
from twotower.decoding.prompts import Prompts
from twotower.deprecation import renamed_argument
from twotower.engine import generation
from twotower.engine.generation import StreamArguments
from twotower.engine.workspace import Workspace
from twotower.errors import ArgumentError
from twotower.model.packed_forward import Layout, context_pass
from twotower.model.towers import TowerSet, TwoTowerModel
from twotower.runners import packed_weights
from twotower.runners.attach import attach_runners
from twotower.tokenizer import Tokenizer


class TwoTowerForCausalLM(TwoTowerModel, PreTrainedModel):
    """A frozen autoregressive context tower and a denoiser that fills blocks, coupled layer by layer.

    `towers="context"` builds the context tower alone: autoregressive use on half the memory.
    """

    config_class = TwoTowerConfig
    config: TwoTowerConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: TwoTowerConfig, towers: TowerSet = "both") -> None:
        config = TwoTowerConfig.of(config)  # AutoModel.from_config hands over transformers' own
        PreTrainedModel.__init__(self, config)
        self.build_towers(config, towers)
        for tower in self.towers():
            attach_runners(tower)
        self.tokenizer_source: Path | None = None
        self._tokenizer: Tokenizer | None = None
        self.workspace = Workspace()

    # --- loading and saving (the work is in checkpoint/) -------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> TwoTowerForCausalLM:
        """Loads a two-tower checkpoint: a directory in the released layout, or a hub id.

        Keyword arguments: dtype (or torch_dtype; "auto": as the config says), quantization ("none" | "int8": the large
        matrices, quantised as they are read; the rest in dtype), towers ("both" | "context"), context_device,
        denoiser_device (or device_map: one device for both), and the hub's revision, cache_dir, token,
        local_files_only, force_download.

        Raises:
            CheckpointError, ConfigError: what is wrong, in which file and tensor.
            ArgumentError: an argument with no meaning here.
        """
        if pretrained_model_name_or_path is None:
            raise ArgumentError("from_pretrained: no checkpoint; give a directory or a hub id")
        model, source = pretrained.from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs)
        model.tokenizer_source = source
        model.eval()
        return model

    def save_pretrained(
        self, save_directory: str | PathLike[str], *args: object, max_shard_size: int | str = "5GB", **kwargs: Any
    ) -> None:
        """Writes the released layout, with a config and a code file that AutoModelForCausalLM can load from."""
        if args:
            raise ArgumentError("save_pretrained takes one positional argument, the directory; name the others")
        pretrained.save_pretrained(self, self.tokenizer, Path(save_directory), max_shard_size, **kwargs)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, loaded when first asked for; None where it has none. Can be set."""
        if self._tokenizer is None:
            self._tokenizer = pretrained.load_tokenizer(self.tokenizer_source)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    # --- where things are ---------------------------------------------------------------------------------------

    @property
    def quantization(self) -> Quantization:
        """How the large matrices are kept."""
        return quantization_of(self)

    def train(self, mode: bool = True) -> TwoTowerForCausalLM:
        """As in torch.

        Raises:
            ArgumentError: its weights are int8.
        """
        if mode and self.quantization != "none":
            raise ArgumentError(f"{self.quantization} weights do not train; load the model without quantization")
        super().train(mode)
        return self

    def pack(self) -> int:
        """For inference on a processor: copies the large weights into the order that passes read fastest → bytes taken.

        The command line does it where there is memory to spare. Weights changed afterwards (in torch's own ways) are
        noticed and read as they lie; call it again then.
        """
        return packed_weights.pack_weights(self)

    def unpack(self) -> None:
        """Gives the memory of `pack` back."""
        packed_weights.unpack_weights(self)

    def release(self) -> None:
        """Frees what runners and generation have prepared for this model; they prepare it again when it is needed."""
        super().release()
        workspace = getattr(self, "workspace", None)
        if workspace is not None:
            workspace.release()

    # --- the context tower as an ordinary causal language model ---------------------------------------------------

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: object
    ) -> CausalLMOutput:
        """The context tower over whole sequences (B, S): fp32 logits (B, S, V) and, with labels, the AR loss.

        attention_mask (B, S): 0 at padding, on either side; labels: −100 is ignored.
        """
        unknown = sorted(kwargs.keys() - {"use_cache", "return_dict"})
        if unknown:
            raise ArgumentError(f"forward: {', '.join(unknown)} has no meaning for a two-tower model; leave it out")
        for name, given in (("attention_mask", attention_mask), ("labels", labels)):
            if given is not None and given.shape != input_ids.shape:
                raise ArgumentError(f"forward: {name} is {tuple(given.shape)}, input_ids {tuple(input_ids.shape)}")
        input_ids = input_ids.to(self.device)
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(self.device)
        length = input_ids.shape[1]
        chunk = max(min(self.context.config.chunk_size, length), 1)
        pad = (0, -length % chunk)
        layout = Layout(F.pad(valid.bool().long() - 1, pad, value=-1), chunk)
        hidden = context_pass(self.context, F.pad(input_ids, pad), layout)
        logits = self.context.logits(hidden[:, :length])
        loss = None
        if labels is not None:
            targets = labels[:, 1:].to(self.device).flatten()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    # --- the published API (spec §3): names, defaults and positional order are the release's ----------------------

    def generate_ar(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        """Context tower and its head only, one token a pass → prompt + new tokens (B, S + n)."""
        params = GenerationParams.of(
            mode="ar",
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            seed=seed,
            stop=stop,
            deterministic=deterministic,
        )
        return self._generate(input_ids, params, attention_mask)

    def generate_mock_ar(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        """The denoiser as a next-token predictor, without time conditioning → prompt + new tokens (B, S + n)."""
        params = GenerationParams.of(
            mode="mock_ar",
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            seed=seed,
            stop=stop,
            deterministic=deterministic,
        )
        return self._generate(input_ids, params, attention_mask)

    @renamed_argument("knob", "policy_value")
    def generate_mask_diffusion(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        block_size: int = 16,
        steps_per_block: int = 16,
        mask_token_id: int = 3,
        temperature: float = 0.0,
        top_k: int | None = None,
        confidence_threshold: float = 0.9,
        eos_token_id: int | Sequence[int] | None = None,
        step_callback: Callable[..., None] | None = None,
        *,
        top_p: float | None = None,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        deterministic: bool = False,
        policy: str | Sequence[str] | None = None,
        policy_value: float | Sequence[float] | None = None,
    ) -> Tensor:
        """Masked diffusion, block by block → prompt + new tokens (B, S + n).

        policy, policy_value: which positions a pass commits (`decoding.unmasking.POLICIES`), for all rows or each.

        step_callback(step, steps, block, t=, logits=, block_idx=): once per block with t 1.0 and logits None,
        then after each pass with the block (B, L) as it was before that pass's commits.
        """
        params = GenerationParams.of(
            mode="diffusion",
            block_size=block_size,
            steps_per_block=steps_per_block,
            mask_token_id=mask_token_id,
            confidence_threshold=confidence_threshold,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            seed=seed,
            stop=stop,
            deterministic=deterministic,
            policy="threshold" if policy is None else policy,
            policy_value=policy_value,
        )
        return self._generate(input_ids, params, attention_mask, step_callback)

    @renamed_argument("knob", "policy_value")
    def generate_verified(
        self,
        input_ids: Prompts,
        max_new_tokens: int = 128,
        block_size: int = 16,
        draft_steps: int | None = None,
        mask_token_id: int = 3,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        acceptance: float = 1.0,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        deterministic: bool = False,
        policy: str | Sequence[str] | None = None,
        policy_value: float | Sequence[float] | None = None,
    ) -> Tensor:
        """The tokens of `generate_ar` with the same seed, drafted by the denoiser and checked by the context tower, a
        block a pass → prompt + new tokens (B, S + n).

        draft_steps: denoiser passes for a draft; None: as many as have lately paid, none where none do. acceptance
        below 1 also keeps drafted tokens that the AR model gives at least that share of its best one's probability.
        """
        params = GenerationParams.of(
            mode="verified",
            block_size=block_size,
            draft_steps=draft_steps,
            mask_token_id=mask_token_id,
            acceptance=acceptance,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos_token_id,
            seed=seed,
            stop=stop,
            deterministic=deterministic,
            policy="threshold" if policy is None else policy,
            policy_value=policy_value,
        )
        return self._generate(input_ids, params, attention_mask)

    @renamed_argument("knob", "policy_value")
    def stream(
        self, input_ids: Prompts, mode: str = "diffusion", **parameters: Unpack[StreamArguments]
    ) -> Iterator[BlockEvent]:
        """Yields a `BlockEvent` per row and block as it is committed (AR: blocks of one); arguments as generate_*.

        A row's last event carries its `Generation`: counts, timings, finish reason. Arguments are checked at the
        call, before the first event is asked for.
        """
        return generation.stream(self, input_ids, mode, **parameters)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' entry point: plain AR generation, or a refusal that names the other methods."""
        tokens = generation.generate_like_transformers(self, *args, **kwargs)
        self._last_nfe = 0
        return tokens

    def _generate(
        self,
        input_ids: Prompts,
        params: GenerationParams,
        attention_mask: Tensor | None,
        callback: Callable[..., None] | None = None,
    ) -> Tensor:
        tokens, self._last_nfe = generation.generate_tensor(self, input_ids, params, attention_mask, callback)
        return tokens


for _auto in (AutoModel, AutoModelForCausalLM):
    _auto.register(TwoTowerConfig, TwoTowerForCausalLM, exist_ok=True)
