"""The recipe of the bundled model: `python -m twotower.recipes.dialogues DATA OUT --stage STAGE`, stage by stage.

    backbone       next-token prediction from scratch                        → OUT/backbone.pt
    continuations  the backbone's own greedy continuations of cut dialogues  → OUT/continuations.jsonl
    denoiser       the backbone's copy learns to fill blocks                 → OUT/denoiser.pt
    export         both towers and the tokenizer in the released layout      → OUT/model

DATA is a folder with train.jsonl.gz (`text` per line). Training stages resume from their checkpoint in OUT.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from twotower.allocator import keep_large_blocks
from twotower.checkpoint import cast
from twotower.config import BackboneConfig, TwoTowerConfig
from twotower.generation import GenerationParams, generate
from twotower.model.conditioning import TimeConditioning
from twotower.model.tower import Tower
from twotower.model.two_tower import TwoTowerForCausalLM
from twotower.training.data import (
    BOS,
    EOS,
    MASK,
    PAD,
    Batches,
    cut_dialogue,
    encode,
    pad_rows,
    read_documents,
    train_tokenizer,
)
from twotower.training.objective import ar_loss, corrupt, denoising_loss
from twotower.training.optimizer import Schedule
from twotower.training.trainer import Run, train

SEED = 1
BLOCK_SIZE = 16
TOKENS_PER_BATCH = 2560
CONTINUATIONS = 9000
CONTINUATION_LENGTH = 300
# The denoiser's course, in steps: dialogues, then dialogues and continuations in turn, then continuations alone.
BOTH_FROM, CONTINUATIONS_FROM = 1200, 2200
SHAPE = BackboneConfig(
    hybrid_override_pattern="M-M*MEM*-",
    hidden_size=256,
    vocab_size=1024,
    max_position_embeddings=4096,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=8,
    mamba_head_dim=64,
    ssm_state_size=32,
    n_groups=2,
    chunk_size=32,
    intermediate_size=768,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    moe_shared_expert_intermediate_size=512,
    routed_scaling_factor=1.0,
)


def train_backbone(data: Path, out: Path, schedule: Schedule) -> None:
    """Next-token prediction on the dialogues."""
    batches = Batches(_documents(data, out), TOKENS_PER_BATCH, SEED)
    backbone = Tower(SHAPE)
    backbone.reset_parameters()
    cast(backbone, torch.bfloat16)

    def loss_at(step: int) -> tuple[torch.Tensor, int]:
        rows = batches.rows(step)
        return ar_loss(backbone, pad_rows(rows, [0] * len(rows), SHAPE.chunk_size), SHAPE.chunk_size)

    train(Run(directory=out / "ar", schedule=schedule), [backbone], loss_at)
    torch.save(backbone.state_dict(), out / "backbone.pt")


def write_continuations(data: Path, out: Path) -> None:
    """Training dialogues cut at a random turn and finished greedily by the backbone: one JSON object a line.

    What the denoiser is to imitate is the frozen context tower, not the corpus: on such text a block has one right
    answer, so several positions can be sure at once (sequence-level distillation, Kim & Rush 2016).
    """
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    model = TwoTowerForCausalLM(_config(), towers="context")
    cast(model, torch.bfloat16)
    model.context.load_state_dict(torch.load(out / "backbone.pt", weights_only=True))
    rng = random.Random(SEED)
    texts = rng.choices(read_documents(data / "train.jsonl.gz"), k=CONTINUATIONS)
    prompts = [item.ids for item in tokenizer.encode_batch([cut_dialogue(text, rng) for text in texts])]
    prompts.sort(key=len)  # like lengths share a batch
    params = GenerationParams.of(mode="ar", max_new_tokens=CONTINUATION_LENGTH, eos_token_id=EOS)
    with (out / "continuations.partial").open("w") as lines:
        for start in range(0, len(prompts), 128):
            part = prompts[start : start + 128]
            for prompt, result in zip(part, generate(model, part, params), strict=True):
                if result.finish_reason == "eos":  # a text cut short would teach a wrong ending
                    line = {"prompt": len(prompt), "tokens": [*prompt, *result.tokens]}
                    lines.write(json.dumps(line) + "\n")
            print(f"{start + len(part)}/{len(prompts)} continuations", flush=True)
    (out / "continuations.partial").rename(out / "continuations.jsonl")


def train_denoiser(data: Path, out: Path, schedule: Schedule) -> None:
    """The frozen backbone's copy learns to fill blocks: first of dialogues, then of the backbone's continuations."""
    context, denoiser, time = Tower(SHAPE), Tower(SHAPE), TimeConditioning(SHAPE.hidden_size, SHAPE.num_layers)
    for module in (context, denoiser, time):
        cast(module, torch.bfloat16)
    for tower in (context, denoiser):
        tower.load_state_dict(torch.load(out / "backbone.pt", weights_only=True))
    context.requires_grad_(False)
    dialogues = Batches(_documents(data, out), TOKENS_PER_BATCH, SEED + 1)
    prompts, texts = _continuations(out)
    continuations = Batches(texts, TOKENS_PER_BATCH, SEED + 2)

    def loss_at(step: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        if step < CONTINUATIONS_FROM and (step < BOTH_FROM or step % 2 == 0):
            rows = dialogues.rows(step)
            lead = torch.randint(0, BLOCK_SIZE, (len(rows),), generator=generator)
            starts = lead
        else:  # blocks begin where the prompt ends, as in generation; only what the backbone wrote is learned
            chosen = continuations.indices(step)
            rows = [texts[i] for i in chosen]
            ends = torch.tensor([prompts[i] for i in chosen])
            lead = -ends % BLOCK_SIZE
            starts = lead + ends
        batch = pad_rows(rows, lead.tolist(), BLOCK_SIZE)
        noise = corrupt(batch, starts, BLOCK_SIZE, generator)
        return denoising_loss(context, denoiser, time, batch, noise, BLOCK_SIZE)

    train(Run(directory=out / "denoiser", schedule=schedule), [denoiser, time], loss_at)
    torch.save({"denoiser": denoiser.state_dict(), "time": time.state_dict()}, out / "denoiser.pt")


def export(out: Path) -> None:
    """The shipped checkpoint."""
    model = TwoTowerForCausalLM(_config())
    assert model.denoiser is not None
    assert model.time is not None
    trained = torch.load(out / "denoiser.pt", weights_only=True)
    cast(model, torch.bfloat16)
    model.context.load_state_dict(torch.load(out / "backbone.pt", weights_only=True))
    model.denoiser.load_state_dict(trained["denoiser"])
    model.time.load_state_dict(trained["time"])
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(out / "tokenizer.json")),
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "mask")},
    )
    model.save_pretrained(out / "model")


def _config() -> TwoTowerConfig:
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "mask_token_id": MASK}
    return TwoTowerConfig(**asdict(SHAPE), **ids)


def _documents(data: Path, out: Path) -> list[list[int]]:
    texts = read_documents(data / "train.jsonl.gz")
    vocabulary = out / "tokenizer.json"
    if not vocabulary.exists():
        train_tokenizer(texts, SHAPE.vocab_size).save(str(vocabulary))
    documents = encode(Tokenizer.from_file(str(vocabulary)), texts)
    print(f"{len(documents)} documents, {sum(map(len, documents))} tokens", flush=True)
    return documents


def _continuations(out: Path) -> tuple[list[int], list[list[int]]]:
    """Prompt lengths, and prompts with their continuations."""
    lines = [json.loads(line) for line in (out / "continuations.jsonl").read_text().splitlines()]
    return [line["prompt"] for line in lines], [line["tokens"] for line in lines]


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--stage", type=click.Choice(["backbone", "continuations", "denoiser", "export"]), required=True)
@click.option("--steps", type=int, default=4000, show_default=True)
@click.option("--rate", type=float, default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--threads", type=int, default=2, show_default=True)
def main(data: Path, out: Path, stage: str, steps: int, rate: float, threads: int) -> None:
    """Runs one stage."""
    keep_large_blocks()
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(steps=steps, peak=rate)
    match stage:
        case "backbone":
            train_backbone(data, out, schedule)
        case "continuations":
            write_continuations(data, out)
        case "denoiser":
            train_denoiser(data, out, schedule)
        case "export":
            export(out)


if __name__ == "__main__":
    main()
