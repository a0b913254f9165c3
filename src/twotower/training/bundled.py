"""The recipe of the bundled model: `python -m twotower.training.bundled DATA OUT --stage ar|denoiser`.

DATA is a folder with train.jsonl.gz (`text` per line). Each stage resumes from its checkpoint in OUT.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from tokenizers import Tokenizer

from twotower.config import BackboneConfig
from twotower.model.conditioning import TimeConditioning
from twotower.model.tower import Tower
from twotower.training.data import Batches, encode, pad_rows, read_documents, train_tokenizer
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
# Kept in fp32 in a bf16 model: a rounded decay rate or selection bias changes what the layer does.
FP32_SUFFIXES = ("A_log", "dt_bias", ".D", "e_score_correction_bias")


def to_bf16(module: torch.nn.Module) -> torch.nn.Module:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not f".{name}".endswith(FP32_SUFFIXES):
            tensor.data = tensor.data.bfloat16()
    return module


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--stage", type=click.Choice(["ar", "denoiser"]), required=True)
@click.option("--steps", type=int, required=True)
@click.option("--rate", type=float, required=True, help="Peak learning rate.")
@click.option("--threads", type=int, default=2)
def main(data: Path, out: Path, stage: str, steps: int, rate: float, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    texts = read_documents(data / "train.jsonl.gz")
    vocabulary = out / "tokenizer.json"
    if not vocabulary.exists():
        train_tokenizer(texts, SHAPE.vocab_size).save(str(vocabulary))
    documents = encode(Tokenizer.from_file(str(vocabulary)), texts)
    print(f"{len(documents)} documents, {sum(map(len, documents))} tokens")
    schedule = Schedule(steps=steps, peak=rate)
    backbone = Tower(SHAPE)
    backbone.reset_parameters()
    to_bf16(backbone)
    if stage == "ar":
        batches = Batches(documents, TOKENS_PER_BATCH, SEED)

        def next_token(step: int) -> tuple[torch.Tensor, int]:
            rows = batches.rows(step)
            return ar_loss(backbone, pad_rows(rows, [0] * len(rows), SHAPE.chunk_size), SHAPE.chunk_size)

        train(Run(directory=out / "ar", schedule=schedule), [backbone], next_token)
        torch.save(backbone.state_dict(), out / "backbone.pt")
        return
    backbone.load_state_dict(torch.load(out / "backbone.pt", weights_only=True))
    backbone.requires_grad_(False)
    denoiser, time = Tower(SHAPE), TimeConditioning(SHAPE.hidden_size, SHAPE.num_layers)
    to_bf16(denoiser)
    to_bf16(time)
    denoiser.load_state_dict(backbone.state_dict())
    batches = Batches(documents, TOKENS_PER_BATCH, SEED + 1)

    def masked(step: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        rows = batches.rows(step)
        starts = torch.randint(0, BLOCK_SIZE, (len(rows),), generator=generator)
        batch = pad_rows(rows, starts.tolist(), BLOCK_SIZE)
        return denoising_loss(
            backbone, denoiser, time, batch, corrupt(batch, starts, BLOCK_SIZE, generator), BLOCK_SIZE
        )

    train(Run(directory=out / "denoiser", schedule=schedule), [denoiser, time], masked)
    torch.save({"denoiser": denoiser.state_dict(), "time": time.state_dict()}, out / "denoiser.pt")


if __name__ == "__main__":
    main()
