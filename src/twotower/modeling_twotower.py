"""`TwoTowerForCausalLM`: `TwoTowerModel` as a transformers model, with the published `generate_*` API.

The methods are thin calls: loading and saving are in `checkpoint/`, generation is in `engine/generation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from twotower.checkpoint import pretrained, tokenizer_files
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.checkpoint.quantize import quantization_of
from twotower.config import TwoTowerConfig
from twotower.decoding.output import BlockEvent
from twotower.decoding.params import GenerationParams
from twotower.decoding.prompts import Prompts
from twotower.deprecation import renamed_argument
from twotower.engine import generation
from twotower.engine.generation import StreamArguments
from twotower.engine.published_methods import PublishedMethods
from twotower.engine.workspace import Workspace
from twotower.errors import ArgumentError
from twotower.model.packed_forward import causal_lm
from twotower.model.towers import TowerSet, TwoTowerModel
from twotower.runners import packed_weights
from twotower.runners.attach import attach_runners
from twotower.tokenizer import Tokenizer


class TwoTowerForCausalLM(PublishedMethods, TwoTowerModel, PreTrainedModel):
    """A frozen autoregressive context tower and a denoiser tower, which reads the caches of the same context layers.

    `towers="context"` builds the context tower alone, for autoregressive decoding with half the memory.
    """

    config_class = TwoTowerConfig
    config: TwoTowerConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: TwoTowerConfig, towers: TowerSet = "both") -> None:
        config = TwoTowerConfig.of(config)  # AutoModel.from_config passes transformers' class
        PreTrainedModel.__init__(self, config)
        self.build_towers(config, towers)
        for tower in self.towers():
            attach_runners(tower)
        self.tokenizer_source: Path | None = None
        self.trust_remote_code = False
        self._tokenizer: Tokenizer | None = None
        self.generation_defaults = GenerationDefaults()
        self.workspace = Workspace()

    # --- loading and saving -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> TwoTowerForCausalLM:
        """Loads a two-tower checkpoint from a directory in the released layout, or from a hub id.

        dtype or torch_dtype: "auto" means that of the config. quantization: "int8", "int4" or a
        plan such as "experts=int4,rest=int8" (docs/quantization.md); None: as stored.
        towers: "both" or "context". denoiser: of a checkpoint with several, the name of one to load alone; None: all.
        context_device, denoiser_device: default cpu; device_map: one device for both.
        Of the hub: revision, subfolder, cache_dir, token, local_files_only, force_download. trust_remote_code: whether
        code of the checkpoint may run to load the tokenizer. Other arguments of transformers are refused.

        Raises:
            CheckpointError, ConfigError: a file is missing or wrong; the message names the file and the tensor.
            ArgumentError: an unknown argument, or an argument with a wrong value.
        """
        if pretrained_model_name_or_path is None:
            raise ArgumentError("from_pretrained: no checkpoint; give a directory or a hub id")
        model, directory, defaults = pretrained.from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs)
        model.tokenizer_source, model.generation_defaults = directory, defaults
        model.trust_remote_code = bool(kwargs.get("trust_remote_code"))
        model.eval()
        return model

    def save_pretrained(
        self, save_directory: str | PathLike[str], *args: object, max_shard_size: int | str = "5GB", **kwargs: Any
    ) -> None:
        """Writes a checkpoint in the released layout, which AutoModelForCausalLM can load too."""
        if args:
            raise ArgumentError("save_pretrained takes one positional argument, the directory; name the others")
        defaults = self.generation_defaults
        pretrained.save_pretrained(self, self.tokenizer, defaults, Path(save_directory), max_shard_size, **kwargs)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the checkpoint, loaded on first use; None if it has none. Can be set."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_files.load_tokenizer(self.tokenizer_source, self.trust_remote_code)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    # --- several denoisers --------------------------------------------------------------------------------------

    def with_denoiser(self, name: str) -> TwoTowerForCausalLM:
        """The model with one of its denoisers alone, which shares the weights. It has measured costs of its own.

        Raises:
            ArgumentError: the model has no denoiser of this name, or a single one.
        """
        view = super().with_denoiser(name)
        view._tokenizer, view.generation_defaults = self._tokenizer, self.generation_defaults
        return view

    def _prepare_view(self, view: TwoTowerForCausalLM) -> None:
        view.workspace = Workspace()
        if view.context is not self.context:
            attach_runners(view.context)

    # --- weights ------------------------------------------------------------------------------------------------

    @property
    def quantization(self) -> str:
        """The quantization plan of the large matrices, e.g. "none" or "int8"."""
        return quantization_of(self)

    def train(self, mode: bool = True) -> TwoTowerForCausalLM:
        """As in torch. Raises ArgumentError if the weights are quantised."""
        if mode and self.quantization != "none":
            raise ArgumentError(f"{self.quantization} weights cannot be trained; load the model without quantization")
        super().train(mode)
        return self

    def pack(self) -> int:
        """Packs the large weights for fast inference on a CPU: a second copy → its bytes.

        The command line packs if enough memory is free. After a change of a weight, its copy is not used: pack again.
        """
        return packed_weights.pack_weights(self)

    def unpack(self) -> None:
        """Frees the memory of `pack`."""
        packed_weights.unpack_weights(self)

    def release(self) -> None:
        """Frees the data that runners and generation have prepared; they prepare it again on demand."""
        super().release()
        workspace = getattr(self, "workspace", None)
        if workspace is not None:
            workspace.release()

    # --- the context tower as a causal language model -----------------------------------------------------------

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: object
    ) -> CausalLMOutput:
        """The context tower over whole sequences (B, S) → logits (B, S, V) in at least fp32, and the AR loss.

        attention_mask: (B, S), 0 at padding, on either side. labels: (B, S); −100 is ignored. None: no loss.
        """
        unknown = sorted(kwargs.keys() - {"use_cache", "return_dict"})
        if unknown:
            raise ArgumentError(f"forward: {', '.join(unknown)} is not supported by a two-tower model; remove it")
        logits, loss = causal_lm(self.context, input_ids, attention_mask, labels)
        return CausalLMOutput(loss=loss, logits=logits)

    # --- generation: see also `PublishedMethods` --------------------------------------------------------------------

    @renamed_argument("knob", "policy_value")
    def stream(
        self, input_ids: Prompts, mode: str = "diffusion", **parameters: Unpack[StreamArguments]
    ) -> Iterator[BlockEvent]:
        """Yields a `BlockEvent` for each finished block of each row (AR: for each token); arguments as in generate_*.

        The last event of a row has its `Generation`: counts, times, finish reason. Arguments are checked at the call.
        """
        return generation.stream(self, input_ids, mode, **parameters)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' entry point: AR generation. Raises ArgumentError, naming other methods, for other requests."""
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
