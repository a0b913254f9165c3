"""Adapter for lm-evaluation-harness: its `--model twotower`.

    twotower lm-eval run --model twotower --model_args setting=verified --tasks gsm8k_cot --limit 20

`generate_until` decodes with a setting. `loglikelihood` does not depend on the setting: it is computed by the context
tower, or with `likelihood=bound` it is a lower bound under the denoiser.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from twotower import model_loading
from twotower.decoding.output import Generation
from twotower.decoding.presets import Setting, parse_setting
from twotower.engine import Request
from twotower.errors import ArgumentError
from twotower.evaluation.likelihood import Likelihood, continuation_bound, continuation_likelihood
from twotower.evaluation.running import generate_all
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.tokenizer import require_tokenizer

log = logging.getLogger(__name__)

NEW_TOKENS = 256  # if a task does not say; the default of lm-evaluation-harness's own models
LIKELIHOODS = ("context", "bound")
PLAN_SEPARATOR = "+"
MODEL_ARGUMENTS = (
    "pretrained", "setting", "likelihood", "samples", "batch_size", "max_length", "dtype", "quantization", "device",
    "denoiser_device",
)  # fmt: skip
GENERATION_ARGUMENTS = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "seed")


@dataclass
class GenerationCost:
    """Tokens and passes of all requests so far."""

    tokens: int = 0
    denoiser_passes: int = 0
    context_passes: int = 0
    truncated_prompts: int = 0  # prompts that lost their beginning

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per pass; passes of both towers count, prefill does not."""
        return self.tokens / max(self.denoiser_passes + self.context_passes, 1)

    def add(self, output: Generation) -> None:
        self.tokens += len(output.tokens)
        self.denoiser_passes += output.denoiser_passes
        self.context_passes += output.context_passes


@register_model("twotower")
class TwoTowerLM(TemplateLM):
    """A two-tower model for lm-evaluation-harness.

    Args:
        pretrained: a checkpoint directory, a hub id or a loaded model; None: the bundled model.
        setting: a decoding setting (`decoding.presets`), e.g. "ar", "verified", "diffusion:0.8".
        likelihood: "context": exact ln P under the context tower; "bound": a lower bound under the denoiser,
            estimated from `samples` draws, with `is_greedy` always False.
        batch_size: rows of a batch.
        dtype, quantization: of the weights, as on the command line. `+` stands for a comma between pairs of a plan,
            because lm-evaluation-harness separates arguments by commas: quantization=experts=int4+rest=int8.
        max_length: tokens of prompt and answer together; None: the model's context window.
        progress: called with (number done, number in all) instead of showing a progress bar.

    Raises:
        ArgumentError: an unknown argument, an unknown setting, or a value that is not allowed.
    """

    def __init__(
        self,
        pretrained: str | TwoTowerForCausalLM | None = None,
        setting: str | Setting = "diffusion:0.8",
        likelihood: str = "context",
        samples: int = 8,
        batch_size: int | str | None = 16,
        max_length: int | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        device: str | None = None,
        denoiser_device: str | None = None,
        progress: Callable[[int, int], object] | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # lm-evaluation-harness always passes it
        if unknown:
            raise ArgumentError(
                f"model_args: unknown {', '.join(sorted(unknown))}; allowed are {', '.join(MODEL_ARGUMENTS)}"
            )
        if likelihood not in LIKELIHOODS:
            raise ArgumentError(f"likelihood is {likelihood!r}; choose one of {', '.join(LIKELIHOODS)}")
        if isinstance(pretrained, TwoTowerForCausalLM):
            self.model, self.name = pretrained, pretrained.config.name_or_path
        else:
            source = model_loading.source_of(pretrained)
            if device in ("cuda", "cuda:0") and not torch.cuda.is_available():
                device = None  # the default of lm-evaluation-harness, not a choice of the user
            self.model, self.name = (
                model_loading.load_model(
                    source,
                    dtype=dtype,
                    quantization=quantization and quantization.replace(PLAN_SEPARATOR, ","),
                    context_device=device,
                    denoiser_device=denoiser_device,
                ),
                model_loading.name_of(source),
            )
            model_loading.need_tokenizer(self.model, source, "tasks cannot be encoded; add a tokenizer")
        self.setting = parse_setting(setting) if isinstance(setting, str) else setting
        self.likelihood, self.samples = likelihood, int(samples)
        self.rows = _rows(batch_size)
        window = self.model.spec.max_position_embeddings
        self.max_length = min(int(max_length), window) if max_length else window
        self.tokenizer = require_tokenizer(self.model.tokenizer)
        self.cost = GenerationCost()
        self.progress = progress

    # --- interface of lm-evaluation-harness -------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        eos = model_loading.eos_of(self.model)
        if eos is None:
            raise ArgumentError(
                "text without a prefix cannot be scored: the model has no EOS token; set eos_token_id in its config"
            )
        return int(eos[0] if isinstance(eos, Sequence) else eos)

    @property
    def prefix_token_id(self) -> int:
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        return str(self.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens is not False)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _loglikelihood_tokens(
        self, requests: list[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        # The last token is scored but not read, so one more token fits than the window has.
        pairs = [(self._truncate_left(given, self.max_length + 1 - len(text)), text) for _, given, text in requests]
        with self._bar(f"ln P by the {self._scorer}", len(pairs), disable_tqdm) as tell:
            found = self._score(pairs, tell)
        for (request, _, _), (value, greedy) in zip(requests, found, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, (value, greedy))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        pairs, owners = [], []
        for number, request in enumerate(requests):
            for given, text in self._windows(self.tok_encode(request.args[0], add_special_tokens=False)):
                pairs.append((given, text))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(pairs), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        generation_requests = [self._request(*request.args) for request in requests]
        with self._bar(self.setting.label, len(generation_requests), disable_tqdm) as tell:
            outputs = generate_all(self.model, generation_requests, self.rows, tell)
        for request, output in zip(requests, outputs, strict=True):
            self.cost.add(output)
            self.cache_hook.add_partial("generate_until", request.args, output.text)
        return [output.text for output in outputs]

    # ---------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _bar(self, what: str, count: int, disabled: bool) -> Iterator[Callable[[int], object]]:
        """Reports progress to `self.progress`, or else by a bar, as lm-evaluation-harness does."""
        if self.progress is not None:
            yield lambda done: self.progress and self.progress(done, count)
            return
        with tqdm(total=count, desc=what, disable=disabled) as bar:
            yield lambda done: bar.update(done - bar.n)

    @property
    def _scorer(self) -> str:
        return "context tower" if self.likelihood == "context" else "denoiser's bound"

    def _score(
        self, pairs: list[tuple[list[int], list[int]]], progress: Callable[[int], object] | None = None
    ) -> list[tuple[float, bool]]:
        if self.likelihood == "bound":
            size = self.setting.values.get("block_size", 16)
            assert isinstance(size, int)
            bounds = continuation_bound(self.model, pairs, block_size=size, samples=self.samples, progress=progress)
            return [(value, False) for value in bounds]
        found: list[Likelihood] = continuation_likelihood(self.model, pairs, progress)
        return [(one.log_prob, one.greedy) for one in found]

    def _request(self, context: str, arguments: dict[str, Any]) -> Request:
        """A prompt and its parameters. Stop strings end a row during generation: a base model would continue."""
        unknown = sorted(set(arguments) - set(GENERATION_ARGUMENTS))
        if unknown:
            raise ArgumentError(
                f"gen_kwargs: unknown {', '.join(unknown)}; allowed are {', '.join(GENERATION_ARGUMENTS)}"
            )
        until = arguments.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        limit = int(arguments.get("max_gen_toks") or arguments.get("max_new_tokens") or NEW_TOKENS)
        limit = min(limit, self.max_length - 1)
        shared: dict[str, object] = {
            "max_new_tokens": limit,
            "stop": stops,
            "eos_token_id": model_loading.eos_of(self.model),
            "mask_token_id": self.model.config.mask_token,
            "seed": int(arguments.get("seed", 0)),
        }
        if arguments.get("do_sample"):
            shared |= {name: arguments[name] for name in ("temperature", "top_k", "top_p") if name in arguments}
            shared.setdefault("temperature", 1.0)
        return Request(
            self._truncate_left(self.tok_encode(context), self.max_length - limit), self.setting.params(**shared)
        )

    def _truncate_left(self, tokens: list[int], room: int) -> list[int]:
        """The last `room` tokens, at least one."""
        if len(tokens) <= room:
            return tokens
        if room < 1:
            raise ArgumentError(
                f"max_length is {self.max_length}, and an answer leaves no room for its prompt; use a larger max_length"
            )
        if not self.cost.truncated_prompts:
            log.warning("a prompt of %d tokens loses its beginning to fit into %d (others may too)", len(tokens), room)
        self.cost.truncated_prompts += 1
        return tokens[-room:]

    def _windows(self, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        """Parts of a text, each with as many tokens before it as fit; the first part follows the prefix token."""
        text = [self.prefix_token_id, *tokens]
        parts, start = [], 1
        while start < len(text):
            end = (
                min(start + self.max_length - 1, len(text))
                if start == 1
                else min(start + self.max_length // 2, len(text))
            )
            parts.append((text[max(0, end - self.max_length) : start], text[start:end]))
            start = end
        return parts


def _rows(batch_size: int | str | None) -> int:
    if batch_size is None or str(batch_size).startswith("auto"):
        return 16
    try:
        rows = int(batch_size)
    except ValueError:
        rows = 0
    if rows < 1:
        raise ArgumentError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1, or auto")
    return rows
