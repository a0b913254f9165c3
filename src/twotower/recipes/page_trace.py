"""Records one block of bundled/small for the page's "How it works".

    python -m twotower.recipes.page_trace            # repeat when that model has changed; takes a second

Greedy, in fp32. The file has the context tower's state of the prompt, layer by layer; each denoising pass with its
tokens and commits; the first pass again with the Mamba states set to zero, for comparison; and the state after the
context tower has read the block.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import torch
from torch import Tensor

from twotower import model_loading
from twotower.cache.hybrid_cache import TowerState
from twotower.cache.layer_cache import MambaCache
from twotower.cache.pools import AttentionPool, ContextView, MambaPool
from twotower.decoding.sampling import confidence
from twotower.decoding.unmasking import Pass, decide
from twotower.file_writes import replace_text
from twotower.process import configure_process
from twotower.server import page
from twotower.server.tokenizer_adapter import TokenizerAdapter
from twotower.tokenizer import require_tokenizer

if TYPE_CHECKING:
    from twotower.modeling_twotower import TwoTowerForCausalLM

PROMPT = "User: I need a flight to Paris.\nAssistant:"
BLOCK, STEPS, THRESHOLD = 16, 16, 0.9


@click.command()
@click.option("--prompt", default=PROMPT)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=page.FOLDER / "how.json", show_default=True)
def main(prompt: str, output: Path) -> None:
    """Record the block."""
    configure_process(threads=1)
    model = model_loading.load_model(model_loading.source_of("bundled/small"), dtype="float32")
    trace = record(model, prompt)
    passes = trace["passes"]
    assert isinstance(passes, list)
    replace_text(output, json.dumps(trace, ensure_ascii=False, separators=(",", ":")) + "\n")
    click.echo(f"{output}: {len(passes)} passes, {output.stat().st_size / 1024:.1f} KiB")


@torch.inference_mode()
def record(model: TwoTowerForCausalLM, prompt: str) -> dict[str, object]:
    """The recording as plain data."""
    tokenizer = TokenizerAdapter(require_tokenizer(model.tokenizer))
    read = tokenizer.encode_prompt(prompt)
    state = model.new_state(1, len(read) + BLOCK)
    model.prefill(torch.tensor([read]), torch.tensor([len(read)]), state)
    before = layers(state)
    view = state.view()
    unseeded = _pass(model, _masks(model), torch.ones(1), without_states(view), tokenizer)
    block, passes = denoise(model, view, tokenizer)
    model.extend(block, state, logits=False)
    after = layers(state)
    return {
        "made_by": "python -m twotower.recipes.page_trace",
        "model": "small",
        "pattern": model.spec.pattern,
        "threshold": THRESHOLD,
        "steps": STEPS,
        "prompt": prompt,
        "context": [tokenizer.token_text(token) for token in read],
        "before": before,
        "unseeded": {"texts": unseeded.texts, "confidence": unseeded.confidence},
        "passes": passes,
        "block": [tokenizer.token_text(token) for token in block[0].tolist()],
        "after": after,
    }


def denoise(
    model: TwoTowerForCausalLM, view: ContextView, tokenizer: TokenizerAdapter
) -> tuple[Tensor, list[dict[str, object]]]:
    """The block (1, L), and its denoising passes: t, tokens, confidences, masked and committed positions of each."""
    block, memory = _masks(model), None
    passes: list[dict[str, object]] = []
    masked = torch.ones_like(block, dtype=torch.bool)
    while masked.any():
        t = masked.float().mean(1)
        seen = _pass(model, block, t, view, tokenizer)
        at, allowed = torch.tensor([[len(passes)]]), torch.tensor([[STEPS]])
        facts = Pass(seen.logits, seen.tokens, seen.sure, masked, at, allowed, memory)
        commit, memory = decide("threshold", facts, torch.tensor([[THRESHOLD]]))
        passes.append(
            {
                "t": round(float(t), 4),
                "texts": seen.texts,
                "confidence": seen.confidence,
                "masked": masked[0].int().tolist(),
                "commit": commit[0].int().tolist(),
            }
        )
        block, masked = torch.where(commit, seen.tokens, block), masked & ~commit
    return block, passes


def without_states(view: ContextView) -> ContextView:
    """The view with the Mamba states set to zero, as if there were no text before the block."""
    past = [
        MambaCache(*map(torch.zeros_like, layer.gathered())) if isinstance(layer, MambaCache) else layer
        for layer in view.past
    ]
    return ContextView(past, view.lengths, view.long)


def layers(state: TowerState) -> list[dict[str, object]]:
    """The state of each layer: for attention the number of cached tokens, for Mamba norms, for other layers nothing.

    The norms are those of each head's SSM state and of each position of the convolution window.
    """
    state.commit_state()
    attention = state.spec.attention
    out: list[dict[str, object]] = []
    for kind, pool in zip(state.spec.pattern, state.pools, strict=True):
        facts: dict[str, object] = {"kind": kind}
        if isinstance(pool, AttentionPool) and attention is not None:
            sizes = {"heads": attention.num_kv_heads, "size": attention.head_dim}
            facts |= {"tokens": int(state.lengths[0])} | sizes
        elif isinstance(pool, MambaPool):
            facts |= {
                "window": _rounded(pool.conv_window[0].norm(dim=1)),
                "channels": pool.conv_window.shape[2],
                "heads": _rounded(pool.ssm_state[0].flatten(1).norm(dim=1)),
                "size": list(pool.ssm_state.shape[2:]),
            }
        out.append(facts)
    return out


def _masks(model: TwoTowerForCausalLM) -> Tensor:
    return torch.full((1, BLOCK), model.config.mask_token)


class Guesses(NamedTuple):
    """The result of a denoising pass: logits (1, L, V), most likely tokens (1, L) and their confidence (1, L)."""

    logits: Tensor
    tokens: Tensor
    sure: Tensor
    texts: list[str]
    confidence: list[float]


def _pass(
    model: TwoTowerForCausalLM, block: Tensor, t: Tensor, view: ContextView, tokenizer: TokenizerAdapter
) -> Guesses:
    logits = model.denoise(block, t, view)
    logits[..., model.config.mask_token] = -torch.inf
    tokens = logits.argmax(-1)
    sure = confidence(logits, tokens)
    return Guesses(
        logits, tokens, sure, [tokenizer.token_text(token) for token in tokens[0].tolist()], _rounded(sure[0])
    )


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


if __name__ == "__main__":
    main()
