"""The recipe of the bundled model: `python -m twotower.training.bundled DATA OUT --stage ar|denoiser|export`.

DATA is a folder with train.jsonl.gz (`text` per line). Each stage resumes from its checkpoint in OUT.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from twotower.allocator import keep_large_blocks
from twotower.checkpoint import cast
from twotower.config import BackboneConfig, TwoTowerConfig
from twotower.model.conditioning import TimeConditioning
from twotower.model.tower import Tower
from twotower.model.two_tower import TwoTowerForCausalLM
from twotower.training.data import BOS, EOS, MASK, PAD, Batches, encode, pad_rows, read_documents, train_tokenizer
from twotower.training.objective import ar_loss, corrupt, denoising_loss
from twotower.training.optimizer import Schedule
from twotower.training.trainer import Run, train

SEED = 1
BLOCK_SIZE = 16
TOKENS_PER_BATCH = 2560
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
    """Next-token prediction from scratch → OUT/backbone.pt."""
    batches = Batches(_documents(data, out), TOKENS_PER_BATCH, SEED)
    backbone = Tower(SHAPE)
    backbone.reset_parameters()
    cast(backbone, torch.bfloat16)

    def loss_at(step: int) -> tuple[torch.Tensor, int]:
        rows = batches.rows(step)
        return ar_loss(backbone, pad_rows(rows, [0] * len(rows), SHAPE.chunk_size), SHAPE.chunk_size)

    train(Run(directory=out / "ar", schedule=schedule), [backbone], loss_at)
    torch.save(backbone.state_dict(), out / "backbone.pt")


def train_denoiser(data: Path, out: Path, schedule: Schedule) -> None:
    """The frozen backbone's copy learns to fill blocks → OUT/denoiser.pt."""
    batches = Batches(_documents(data, out), TOKENS_PER_BATCH, SEED + 1)
    context, denoiser, time = Tower(SHAPE), Tower(SHAPE), TimeConditioning(SHAPE.hidden_size, SHAPE.num_layers)
    for module in (context, denoiser, time):
        cast(module, torch.bfloat16)
    for tower in (context, denoiser):
        tower.load_state_dict(torch.load(out / "backbone.pt", weights_only=True))
    context.requires_grad_(False)

    def loss_at(step: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        rows = batches.rows(step)
        starts = torch.randint(0, BLOCK_SIZE, (len(rows),), generator=generator)
        batch = pad_rows(rows, starts.tolist(), BLOCK_SIZE)
        noise = corrupt(batch, starts, BLOCK_SIZE, generator)
        return denoising_loss(context, denoiser, time, batch, noise, BLOCK_SIZE)

    train(Run(directory=out / "denoiser", schedule=schedule), [denoiser, time], loss_at)
    torch.save({"denoiser": denoiser.state_dict(), "time": time.state_dict()}, out / "denoiser.pt")


def export(out: Path) -> None:
    """Both towers and the tokenizer in the released layout → OUT/model."""
    config = TwoTowerConfig(
        **asdict(SHAPE), bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, mask_token_id=MASK, n_shared_experts=1
    )
    model = TwoTowerForCausalLM(config)
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


def _documents(data: Path, out: Path) -> list[list[int]]:
    texts = read_documents(data / "train.jsonl.gz")
    vocabulary = out / "tokenizer.json"
    if not vocabulary.exists():
        train_tokenizer(texts, SHAPE.vocab_size).save(str(vocabulary))
    documents = encode(Tokenizer.from_file(str(vocabulary)), texts)
    print(f"{len(documents)} documents, {sum(map(len, documents))} tokens", flush=True)
    return documents


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--stage", type=click.Choice(["ar", "denoiser", "export"]), required=True)
@click.option("--steps", type=int, default=4000, show_default=True)
@click.option("--rate", type=float, default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--threads", type=int, default=2, show_default=True)
def main(data: Path, out: Path, stage: str, steps: int, rate: float, threads: int) -> None:
    """Trains one stage of the bundled model, or exports it."""
    keep_large_blocks()
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(steps=steps, peak=rate)
    if stage == "ar":
        train_backbone(data, out, schedule)
    elif stage == "denoiser":
        train_denoiser(data, out, schedule)
    else:
        export(out)


if __name__ == "__main__":
    main()
