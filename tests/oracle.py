"""Reference decoding without cache, batch or state. Every fast path must equal it.

It decodes one request, token by token, from `GenerationParams`; each tower reads the text from its first token
(`oracle_tower`). It uses no code of `cache/`, `decoding/` or `engine/`, except for the parameters' plain data. The
functions follow the description of the modes in docs/architecture.md: masked diffusion, AR, mock-AR, verified.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from naive_policies import NAIVE, NaiveRow, naive_commit
from naive_rules import changed
from oracle_tower import Context, conditioning, read
from torch import Tensor

from twotower import GenerationParams, TwoTowerForCausalLM
from twotower.model.tower import Tower

AR_TOKEN, DIFFUSION_CANDIDATE = 1, 2  # purposes of noise


class Block(NamedTuple):
    """A filled block: tokens, the pass that committed each, their confidences, and the number of passes."""

    tokens: list[int]
    committed_at: list[int]
    confidence: list[float]
    passes: int


Drafter = Callable[[list[int], int], Block]  # (text, positions) → a block that begins with the last token of the text


@dataclass
class Decoded:
    """The result of a request."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    committed_at: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    denoiser_passes: int = 0
    context_passes: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0


def decode(
    model: TwoTowerForCausalLM, prompt: list[int], params: GenerationParams, drafter: Drafter | None = None
) -> Decoded:
    """Decodes a request with one seed, policy and policy value. drafter: replaces the denoiser in verified decoding."""
    row = _Row(model, prompt, params, Decoded(), drafter)
    if params.max_new_tokens == 0:
        row.out.finish_reason = "length"
    choices = model.config.denoiser
    after_text = choices.prediction_shift or choices.first_from_ar
    diffusion = _diffusion_after_text if after_text else _diffusion
    modes = {"diffusion": diffusion, "ar": _autoregressive, "mock_ar": _mock_autoregressive, "verified": _verified}
    while not row.out.finish_reason:
        modes[params.mode](row)
    return row.out


@dataclass
class _Row:
    model: TwoTowerForCausalLM
    prompt: list[int]
    params: GenerationParams
    out: Decoded
    drafter: Drafter | None

    @property
    def text(self) -> list[int]:
        return self.prompt + self.out.tokens

    def take(self, tokens: list[int], committed_at: list[int], confidence: list[float]) -> None:
        """Adds tokens until the row ends."""
        out, params = self.out, self.params
        for token, at, sure in zip(tokens, committed_at, confidence, strict=True):
            out.tokens.append(token)
            out.committed_at.append(at)
            out.confidence.append(sure)
            out.text, found = cut(self.model.tokenizer, out.tokens, params.end_tokens, params.stop, params.min_tokens)
            if found:
                out.finish_reason = "stop"
            elif token in params.eos_token_id and not params.ignore_eos:
                out.finish_reason = "eos"
            elif token in params.stop_token_ids:
                out.finish_reason = "stop"
            elif len(out.tokens) == params.max_new_tokens:
                out.finish_reason = "length"
            if out.finish_reason:
                return

    def sample(self, logits: Tensor, position: int, purpose: int, step: int = 0) -> int:
        return sample(logits, self.params, position, purpose, step)

    def changed(self, logits: Tensor, known: list[int], place: int | None = None) -> Tensor:
        """Logits (V,) after the rules of the request. known: tokens beside the text before, place: among new tokens."""
        before = self.out.tokens + known
        place = len(before) if place is None else place
        return changed(logits, self.params, self.prompt, before, place, self.model.tokenizer)


# --- the modes ------------------------------------------------------------------------------------------------------


def _autoregressive(row: _Row) -> None:
    """The context tower reads the text; its head chooses the next token."""
    logits, _ = read(row.model.context, row.text)
    row.out.context_passes += 1
    own = row.changed(logits[-1], [])
    token = row.sample(own, len(row.text), AR_TOKEN)
    row.take([token], [0], [probability(own, token)])


def _mock_autoregressive(row: _Row) -> None:
    """The denoiser reads the last token after the context of all tokens before it, without time conditioning."""
    logits, _ = read(denoiser_of(row.model), row.text[-1:], _denoisers_past(row.model, row.text[:-1]))
    row.out.denoiser_passes += 1
    own = row.changed(logits[-1], []) + term(row.model, row.text[-1])
    token = row.sample(own, len(row.text), AR_TOKEN)
    row.take([token], [0], [probability(own, token)])
    row.out.context_passes += not row.out.finish_reason  # after the last token there is no context pass


def _diffusion(row: _Row) -> None:
    """A block of masks is filled and cut at the end of the row; then the context tower reads it."""
    size, mask = row.params.block_size, row.params.mask_token_id
    block = fill(row, row.text, [mask] * size, list(range(size)), row.params.steps_per_block, DIFFUSION_CANDIDATE)
    row.out.denoiser_passes += block.passes
    row.take(block.tokens, block.committed_at, block.confidence)
    row.out.context_passes += not row.out.finish_reason


def _diffusion_after_text(row: _Row) -> None:
    """A block begins with the last token of the text. After it is filled, AR chooses the token that follows it.

    first_from_ar: AR also chooses the first token of all. AR's pass is left out where the text certainly ends before.
    """
    params, out, text = row.params, row.out, row.text
    size, room = params.block_size, params.max_new_tokens - len(out.tokens)
    if size == 1 or (row.model.config.denoiser.first_from_ar and not out.tokens):
        _autoregressive(row)
        return
    begun = text[-1:] + [params.mask_token_id] * (size - 1)
    block = fill(row, text[:-1], begun, list(range(1, size)), params.steps_per_block, DIFFUSION_CANDIDATE)
    out.denoiser_passes += block.passes
    row.take(block.tokens[1:], block.committed_at[1:], block.confidence[1:])
    out.context_passes += not (room < size or set(block.tokens[1:]) & set(params.end_tokens))
    if not out.finish_reason:
        logits, _ = read(row.model.context, text[:-1] + block.tokens)
        own = row.changed(logits[-1], [])
        token = row.sample(own, len(text) - 1 + size, AR_TOKEN)
        row.take([token], [params.steps_per_block], [probability(own, token)])


def _verified(row: _Row) -> None:
    """A draft follows the last token. The accepted part is kept, then the AR model's own token follows."""
    params, out, text = row.params, row.out, row.text
    room = params.max_new_tokens - len(out.tokens)
    length = min(params.block_size, room)  # positions of the draft with the token before it
    steps = params.draft_steps
    if steps is None:
        steps = 1  # only if acceptance < 1, because then the text depends on the draft
        assert params.acceptance < 1, "how many passes a draft gets depends on the clock"
    if length == 1:
        steps = 0
    draft, committed_at = [], []
    if steps:
        block = (row.drafter or _denoisers_draft(row, steps))(text, params.block_size)
        out.denoiser_passes += block.passes
        draft, committed_at = block.tokens[1:length], block.committed_at[1:length]
    logits = read(row.model.context, text + draft)[0][len(text) - 1 :]
    out.context_passes += 1
    logits = torch.stack([row.changed(logits[i], draft[:i]) for i in range(len(draft) + 1)])
    own = [row.sample(logits[i], len(text) + i, AR_TOKEN) for i in range(len(draft) + 1)]
    kept = 0
    while kept < len(draft) and _accepted(draft[kept], own[kept], logits[kept], params.acceptance):
        kept += 1
    out.drafts += bool(draft)
    out.drafted += len(draft)
    out.accepted += kept
    out.rejected += kept < len(draft)
    tokens = draft[:kept] + own[kept : kept + 1]
    sure = [probability(logits[i], token) for i, token in enumerate(tokens)]
    row.take(tokens, [*committed_at[:kept], steps], sure)


def _denoisers_draft(row: _Row, steps: int) -> Drafter:
    """The block begins with the last token of the text; its masks are filled with the noise of AR tokens."""

    def draft(text: list[int], size: int) -> Block:
        begun = text[-1:] + [row.params.mask_token_id] * (size - 1)
        return fill(row, text[:-1], begun, list(range(1, size)), steps, AR_TOKEN)

    return draft


def _accepted(drafted: int, own: int, logits: Tensor, acceptance: float) -> bool:
    near = probability(logits, drafted) >= acceptance * float(logits.softmax(-1).max()) and logits[drafted] > -math.inf
    return drafted == own or (acceptance < 1 and near)


def fill(row: _Row, before: list[int], begun: list[int], masked: list[int], steps: int, purpose: int) -> Block:
    """Denoises the `masked` positions of block `begun` after the text `before`, in at most `steps` passes."""
    model, params, size = row.model, row.params, len(begun)
    denoiser, shift = denoiser_of(model), model.config.denoiser.prediction_shift
    assert isinstance(params.policy, str)
    assert not isinstance(params.policy_value, tuple)
    policy, head = params.policy, denoiser.draft_head
    usual = params.confidence_threshold if policy == "threshold" else NAIVE[policy].default
    if head is not None:  # the tokens of a pass follow each other, with AR's noise
        policy, purpose = "span" if policy == "threshold" else policy, AR_TOKEN
    policy_value = usual if params.policy_value is None else params.policy_value
    block, masked = list(begun), list(masked)
    committed_at, confidence, seen, passes = [0] * size, [0.0] * size, None, 0
    past = _denoisers_past(model, before)
    for step in range(steps):
        if not masked:
            break
        time = None if model.time is None else conditioning(model.time, len(masked) / (size - shift))
        logits, _ = read(denoiser, block, past, causal=_prefix(model, block, masked), time=time)
        passes += 1
        logits = torch.cat([logits[:1], logits[:-1]]) if shift else logits  # at each input, those that predict it
        logits[:, params.mask_token_id] = -math.inf
        known = [block[i] for i in range(size) if i not in masked and len(before) + i >= len(row.text)]
        offset = len(before) - len(row.prompt)
        logits = torch.stack([row.changed(logits[i], known, offset + i) for i in range(size)])
        noise_step = step if purpose == DIFFUSION_CANDIDATE else 0
        candidate = list(block)
        for i in masked if head is not None else range(size):
            if head is not None:
                logits[i] += term(model, candidate[i - 1] if i else before[-1])
            candidate[i] = row.sample(logits[i], len(before) + i, purpose, noise_step)
        chances = logits.softmax(-1).tolist()
        sure = [chances[i][candidate[i]] for i in range(size)]
        for i in naive_commit(policy, NaiveRow(chances, sure, masked, seen, step, steps), policy_value):
            block[i], committed_at[i], confidence[i] = candidate[i], step, sure[i]
            masked.remove(i)
        seen = chances
    return Block(block, committed_at, confidence, passes)


def _prefix(model: TwoTowerForCausalLM, block: list[int], masked: list[int]) -> int:
    """How many positions of a block attend causally: with prefix-causal attention, those before its first mask."""
    return min(masked) if model.config.denoiser.block_attention == "prefix_causal" else 0


def term(model: TwoTowerForCausalLM, token: int) -> Tensor:
    """What the draft head adds to the logits (V,) after a token; 0 without one."""
    head = denoiser_of(model).draft_head
    if head is None:
        return torch.zeros((), dtype=torch.float64)
    return head.following @ head.previous[token]


def denoiser_of(model: TwoTowerForCausalLM) -> Tower:
    """The denoiser tower. Adapters that act everywhere are added to the weights of a copy of the context tower."""
    if model.denoiser is not None:
        return model.denoiser
    if id(model) not in _MERGED:
        tower = copy.deepcopy(model.context)
        for module in tower.modules():
            adapter = getattr(module, "adapter", None)
            if adapter is not None:
                module.weight = torch.nn.Parameter(module.weight + adapter.b @ adapter.a)
        assert tower.mask_embedding is not None
        weight = tower.embeddings.weight.detach().clone()
        weight[model.config.mask_token] = tower.mask_embedding.weight
        tower.embeddings.weight = torch.nn.Parameter(weight)
        _MERGED[id(model)] = model, tower
    return _MERGED[id(model)][1]


_MERGED: dict[int, tuple[TwoTowerForCausalLM, Tower]] = {}  # with the model, so that its id stays its own


def _denoisers_past(model: TwoTowerForCausalLM, text: list[int]) -> Context | None:
    """What the denoiser sees of a text; None for an empty text."""
    return seen_by_denoiser(model, read(model.context, text)[1] if text else None)


def seen_by_denoiser(model: TwoTowerForCausalLM, past: Context | None) -> Context | None:
    """The context tower's layer states, of those layers that the denoiser has a counterpart for."""
    layers = model.config.denoiser.denoiser_layers
    if past is None or layers is None:
        return past
    found = zip(past.layers, model.context.spec.layers, strict=True)
    return Context([state for state, layer in found if layer.source in layers], past.tokens)


# --- tokens, noise, text --------------------------------------------------------------------------------------------


def probability(logits: Tensor, token: int) -> float:
    """The untempered and unfiltered distribution."""
    return float(logits.softmax(-1)[token])


def sample(logits: Tensor, params: GenerationParams, position: int, purpose: int, step: int) -> int:
    """The most probable token, or a Gumbel-max sample at the temperature, filtered by top-k and then top-p."""
    values = logits.tolist()
    if params.temperature <= 0:
        return max(range(len(values)), key=values.__getitem__)
    assert isinstance(params.seed, int)
    scaled = [value / params.temperature for value in values]
    uniform = noise(params.seed, position, purpose, step, len(values))
    if params.min_p:
        top = max(scaled)
        scaled = [value if math.exp(value - top) >= params.min_p else -math.inf for value in scaled]
    scores = {i: scaled[i] - math.log(-math.log(uniform[i])) for i in left(scaled, params.top_k, params.top_p)}
    return max(scores, key=scores.__getitem__)


def left(scaled: list[float], top_k: int | None, top_p: float | None) -> list[int]:
    """Tokens that pass the filters: top-k with ties of the k-th largest, then the smallest set whose sum exceeds p."""
    tokens = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if top_k is not None and top_k < len(tokens):
        least = scaled[tokens[top_k - 1]]
        tokens = [i for i in tokens if scaled[i] >= least]
    if top_p is None or top_p >= 1:
        return tokens
    weights = [math.exp(scaled[i] - scaled[tokens[0]]) for i in tokens]
    kept, before = [], 0.0
    for token, weight in zip(tokens, weights, strict=True):
        if before > top_p:
            break
        kept.append(token)
        before += weight / sum(weights)
    return kept


def noise(seed: int, position: int, purpose: int, step: int, size: int) -> list[float]:
    """A uniform number for each token, from seed, position, purpose and step: splitmix64 in Python integers."""
    golden, wrap = 0x9E3779B97F4A7C15, 2**64

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % wrap
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % wrap
        return z ^ (z >> 31)

    key = mix(seed)
    for part in (position, purpose, step):
        key = mix((key + golden * (part + 1)) % wrap)
    return [((mix((key + golden * i) % wrap) >> 11) + 0.5) * 2.0**-53 for i in range(1, size + 1)]


def cut(
    tokenizer: Any, tokens: list[int], eos: tuple[int, ...], stop: tuple[str, ...], min_tokens: int = 0
) -> tuple[str, bool]:
    """The text of the tokens up to the first stop string, and whether there is a stop string.

    Special tokens are left out. min_tokens: no stop string ends in the text of so many tokens.
    """
    if tokenizer is None:
        return "", False
    early, text = (
        tokenizer.decode([t for t in part if t not in eos], skip_special_tokens=True)
        for part in (tokens[:min_tokens], tokens)
    )
    least = len(early.rstrip("\ufffd"))  # an incomplete character comes later
    found = [at for at in (text.find(each, max(least - len(each) + 1, 0)) for each in stop) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)
