"""What quantization costs: size, likelihood, distributions of both towers, passes, accuracy and speed, side by side."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from twotower.decoding.output import Generation
from twotower.decoding.presets import AR, Setting, parse_setting
from twotower.evaluation.accuracy import answer_problems, answers_right, chosen_problems
from twotower.evaluation.comparison import PairedComparison, compare
from twotower.evaluation.tasks.problem_sets import Problem
from twotower.evaluation.text_batches import BLOCK_SIZE, check_towers, row_length, text_batches
from twotower.model.fp32_tensors import named_tensors
from twotower.model.packed_forward import denoise_layer, read_layer
from twotower.model.tower import Tower
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.quantization import TowerName
from twotower.tokenizer import require_tokenizer
from twotower.training.columns import next_tokens, tower_layout, trained_columns, wanted_columns
from twotower.training.data import Batch
from twotower.training.logits import in_chunks
from twotower.training.noise import Corruption
from twotower.training.patterns import ONLY_LEVELS, draw_masks
from twotower.training.run_tokenizer import encoder_for

DIFFUSION, VERIFIED = (parse_setting(text) for text in ("diffusion", "verified:draft_steps=1"))
SETTINGS = (AR, DIFFUSION, VERIFIED)
Progress = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """Figures of one model.

    nll: −ln p of the context tower in nats per token, without prompts. passes_per_block: denoiser passes of diffusion
    for 16 tokens. accepted: drafted tokens that verified decoding accepts, per draft. By setting: accuracy;
    tokens_per_pass, of the same answers, where passes of both towers count; tokens_per_second, the median of requests.
    """

    plan: str
    bytes: int
    nll: float
    accuracy: dict[str, float]
    passes_per_block: float
    accepted: float
    tokens_per_pass: dict[str, float]
    tokens_per_second: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """The original model and the quantised one.

    kl: KL divergence of each tower's distribution from the original's in nats: of the context tower for the next token,
    of the denoiser at masked positions. tokens, masked: how many positions these and `nll` are means of. answers: the
    paired comparison of right answers, by setting. times: speed ÷ the original's, the median over problems that both
    models answer in turns.
    """

    original: ModelFigures
    quantized: ModelFigures
    kl: dict[TowerName, float]
    tokens: int
    masked: int
    problems: int
    answers: dict[str, PairedComparison]
    times: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        """The fields as plain data for `--json`."""
        intervals = {name: pair.interval for name, pair in self.answers.items()}
        return asdict(self) | {"intervals": intervals}


def compare_quantized(
    original: TwoTowerForCausalLM,
    quantized: TwoTowerForCausalLM,
    *,
    data: Sequence[str] = (),
    tokens: int = 8192,
    per_family: int = 100,
    timed: int = 24,
    difficulties: Sequence[int] = (1, 2),
    seed: int = 0,
    progress: Progress = lambda text: None,
) -> QuantizationReport:
    """Measures both models on the same texts, masks and problems.

    data: items as in `twotower train --data`; none: problems of the suite. per_family: problems of each family. timed:
    problems that are answered one at a time, by both models in turns.

    Raises:
        ArgumentError: the data cannot be read, or the denoiser is the context tower with adapters.
    """
    check_towers(original.config, "--report")
    tokenizer = require_tokenizer(original.tokenizer)
    encoder = encoder_for(tokenizer, original.config, original.generation_defaults)
    batches = text_batches(data, encoder, tokens, row_length(original.spec.max_position_embeddings))
    progress("likelihoods")
    likelihoods = compare_likelihoods((original, quantized), batches, seed)
    problems = chosen_problems((), per_family, difficulties, seed)
    outputs: list[dict[str, list[Generation]]] = []
    for model in (original, quantized):
        answers = {}
        for setting in SETTINGS:
            progress(f"{model.quantization}, {setting.label}: {len(problems)} problems")
            answers[setting.label] = answer_problems(model, setting, problems)[1]
        outputs.append(answers)
    some = random.Random(seed).sample(problems, min(timed, len(problems)))
    speeds = time_in_turns((original, quantized), SETTINGS, some, progress)
    right = [{label: answers_right(problems, own) for label, own in answers.items()} for answers in outputs]
    figures = [
        _figures(model, nll, answers, hits, speed)
        for model, nll, answers, hits, speed in zip(
            (original, quantized), likelihoods.nll, outputs, right, speeds, strict=True
        )
    ]
    return QuantizationReport(
        original=figures[0],
        quantized=figures[1],
        kl=likelihoods.kl,
        tokens=likelihoods.tokens,
        masked=likelihoods.masked,
        problems=len(problems),
        answers={label: compare(right[0][label], right[1][label]) for label in right[0]},
        times={
            label: statistics.median(after / before for before, after in zip(own, speeds[1][label], strict=True))
            for label, own in speeds[0].items()
        },
    )


def _figures(
    model: TwoTowerForCausalLM,
    nll: float,
    answers: dict[str, list[Generation]],
    right: dict[str, list[bool]],
    speed: dict[str, list[float]],
) -> ModelFigures:
    def total(label: str, count: Callable[[Generation], int]) -> int:
        return sum(map(count, answers[label]))

    drafts = total(VERIFIED.label, lambda out: out.drafts)
    passes = total(DIFFUSION.label, lambda out: out.denoiser_passes)
    blocks = total(DIFFUSION.label, lambda out: -(-len(out.tokens) // BLOCK_SIZE))
    return ModelFigures(
        plan=model.quantization,
        bytes=sum(tensor.nbytes for _, tensor in named_tensors(model)),
        nll=nll,
        accuracy={label: sum(own) / len(own) for label, own in right.items()},
        passes_per_block=passes / max(blocks, 1),
        accepted=total(VERIFIED.label, lambda out: out.accepted) / max(drafts, 1),
        tokens_per_pass={
            label: total(label, lambda out: len(out.tokens)) / max(total(label, lambda out: out.passes_of_both), 1)
            for label in answers
        },
        tokens_per_second={label: statistics.median(own) for label, own in speed.items()},
    )


def time_in_turns(
    models: Sequence[TwoTowerForCausalLM], settings: Sequence[Setting], problems: Sequence[Problem], progress: Progress
) -> list[dict[str, list[float]]]:
    """Decoding tokens per second of each problem as a single request, for each model by setting.

    All models answer each problem in turn. The first problem is answered once more before, to warm up.
    """
    found: list[dict[str, list[float]]] = [{setting.label: [] for setting in settings} for _ in models]
    for number, problem in enumerate([problems[0], *problems]):
        progress(f"timing: problem {number} of {len(problems)}")
        for setting in settings:
            for model, own in zip(models, found, strict=True):
                _, (output,) = answer_problems(model, setting, [problem], rows=1)
                if number:
                    own[setting.label].append(len(output.tokens) / output.decode_seconds)
    return found


# --- likelihoods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Likelihoods:
    """nll: of each model's context tower in nats per token. kl: of the second model from the first, see the report."""

    nll: tuple[float, float]
    kl: dict[TowerName, float]
    tokens: int
    masked: int


@torch.no_grad()
def compare_likelihoods(
    models: tuple[TwoTowerForCausalLM, TwoTowerForCausalLM], batches: Sequence[Batch], seed: int
) -> Likelihoods:
    sums = torch.zeros(4, dtype=torch.float64)  # −ln p of each model, KL of each tower
    tokens = masked = 0
    for batch in batches:
        shift = models[0].config.denoiser.prediction_shift
        noise = draw_masks(batch, BLOCK_SIZE, ONLY_LEVELS, seed=seed, scope="block", shift=shift)
        open_ = trained_columns(batch, wanted_columns(batch, noise, BLOCK_SIZE, shift), shift)
        hidden = [final_hidden(model, batch.to(model.device), noise.to(model.device)) for model in models]
        asked = next_tokens(batch, prompts=False)
        own = [each[0][:, :-1][asked.to(each[0].device)] for each in hidden]
        sums[[0, 1, 2]] += compare_heads(models[0].context, models[1].context, own, batch.tokens[:, 1:][asked])
        own = [each[1].flatten(0, 1)[open_.at.to(each[1].device)] for each in hidden]
        denoisers = [model.denoiser for model in models]
        assert denoisers[0] is not None
        assert denoisers[1] is not None
        sums[3] += compare_heads(denoisers[0], denoisers[1], own, open_.token)[2]
        tokens, masked = tokens + int(asked.sum()), masked + len(open_.at)
    first, second, context, denoiser = sums.tolist()
    return Likelihoods(
        nll=(first / max(tokens, 1), second / max(tokens, 1)),
        kl={"context": context / max(tokens, 1), "denoiser": denoiser / max(masked, 1)},
        tokens=tokens,
        masked=masked,
    )


def final_hidden(model: TwoTowerForCausalLM, batch: Batch, noise: Corruption) -> tuple[Tensor, Tensor]:
    """Final hidden states (B, S, H): of the context tower, and of the denoiser in blocks with masks (elsewhere 0)."""
    assert model.denoiser is not None
    assert model.time is not None
    layout = tower_layout(batch, noise, BLOCK_SIZE, model.config.denoiser)
    clean = model.context.embed(batch.tokens)
    noisy = model.denoiser.embed(layout.to_blocks(batch.tokens.masked_fill(noise.masked, model.config.mask_token)))
    t = layout.select_blocks(noise.t.flatten())
    writers = list(model.denoiser.all_layers())
    places = {layer: place for place, layer in enumerate(model.denoiser.spec.context_layers)}
    for i, reader in enumerate(model.context.all_layers()):
        clean, past = read_layer(reader, clean, layout)
        if (place := places.get(i)) is not None:
            noisy = denoise_layer(writers[place], noisy, past, model.time.of_layer(t, place), layout)
    return model.context.norm_f(clean), layout.to_rows(model.denoiser.norm_f(noisy))


def compare_heads(first: Tower, second: Tower, hidden: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """Two towers' hidden states (N, H) and the true tokens (N,) → (3,) sums in nats: −ln p of each, and KL."""
    found = torch.zeros(3, dtype=torch.float64)
    at = 0
    for part, true in in_chunks(first, hidden[0], tokens.to(hidden[0].device)):
        p = first.logits(part).log_softmax(-1)
        q = second.logits(hidden[1][at : at + len(part)]).log_softmax(-1).to(p.device)
        at += len(part)
        found[:2] -= torch.stack([each.gather(-1, true[:, None]).double().sum().cpu() for each in (p, q)])
        found[2] += (p.exp() * (p - q)).sum(-1).double().sum().cpu()
    return found
