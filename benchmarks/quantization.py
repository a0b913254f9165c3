"""What do 8 and 4 bits cost in likelihood? KL and NLL of the context tower beside its own weights, in fp32.

    python benchmarks/quantization.py --text FILE

Compares rules of rounding on the same text: the package's two, and others that were considered. Weights are rounded and
dequantised, so every rule has the same arithmetic. Heads have 8 bits, as in the package. The last lines have the
package's own products with activations in int8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from common import program
from rich.table import Table
from torch import Tensor, nn

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.checkpoint.quantize import large_weights, part_of
from twotower.model.moe import Experts
from twotower.ops.reference import int4, int8

Rule = Callable[[Tensor], Tensor]


def grouped(weight: Tensor, size: int) -> Tensor:
    """(out, in) → (out, groups, size), zero where there is no input."""
    return F.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))


def narrow(scale: Tensor) -> Tensor:
    return scale.bfloat16().float()


def scale_alone(weight: Tensor, size: int, divisors: tuple[float, ...]) -> Tensor:
    """The scale m / divisor with the least squared error, in −8…7; m: the value of largest magnitude."""
    x = grouped(weight, size)
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    found = []
    for divisor in divisors:
        scale = narrow(largest / divisor)
        found.append((x / scale.where(scale != 0, 1.0)).round().clamp(-8, 7) * scale)
    best = torch.stack([(each - x).square().sum(-1) for each in found]).argmin(0)
    chosen = torch.stack(found).gather(0, best[None, ..., None].expand(1, *x.shape))[0]
    return chosen.flatten(1)[:, : weight.shape[1]]


def scale_and_minimum(weight: Tensor, size: int, integer: bool) -> Tensor:
    """0…15 times a scale plus a minimum in bf16, or minus an integer zero point."""
    x = grouped(weight, size)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if integer:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = narrow((high - low) / 15)
    step = scale.where(scale > 0, 1.0)
    if integer:
        zero = (-low / step).round().clamp(0, 15)
        out = (((x / step).round() + zero).clamp(0, 15) - zero) * scale
    else:
        low = narrow(low)
        out = ((x - low) / step).round().clamp(0, 15) * scale + low
    return out.flatten(1)[:, : weight.shape[1]]


def in_int8(weight: Tensor) -> Tensor:
    q, scale = int8.quantize(weight)
    return int8.unpack(q, scale, torch.float32) * scale[:, None]


def in_int4(weight: Tensor) -> Tensor:
    return int4.dequantize(int4.quantize(weight), *weight.shape, torch.float32)


def rules() -> Iterator[tuple[str, float, Rule]]:
    """Name, bits a weight, and the function of one matrix (out, in)."""
    yield "int8", 8, in_int8
    yield "int4", 4.5, in_int4
    for size in (32, 64):
        yield f"scale m / 7, groups of {size}", 4 + 16 / size, lambda w, s=size: scale_alone(w, s, (7.0,))
        yield f"scale m / −8, groups of {size}", 4 + 16 / size, lambda w, s=size: scale_alone(w, s, (-8.0,))
        yield f"best of 3 scales, groups of {size}", 4 + 16 / size, lambda w, s=size: scale_alone(w, s, int4.DIVISORS)
        yield f"scale, zero point, groups of {size}", 4 + 20 / size, lambda w, s=size: scale_and_minimum(w, s, True)
        yield f"scale, minimum, groups of {size}", 4 + 32 / size, lambda w, s=size: scale_and_minimum(w, s, False)


def round_weights(model: nn.Module, original: dict[str, Tensor], rule: Rule) -> float:
    """Rounds all large weights in place → the relative root mean square error of those that are not heads."""
    error = size = 0.0
    for path, module in large_weights(model):
        names = ("gate_proj", "up_proj", "down_proj") if isinstance(module, Experts) else ("weight",)
        for name in (name for name in names if f"{path}.{name}" in original):
            weight = original[f"{path}.{name}"]
            head = part_of(path).kind == "heads"
            made = torch.stack([(in_int8 if head else rule)(part) for part in weight.view(-1, *weight.shape[-2:])])
            getattr(module, name).data = made.view_as(weight)
            if not head:
                error += float((made.view_as(weight) - weight).square().sum())
                size += float(weight.square().sum())
    return math.sqrt(error / size)


@torch.no_grad()
def log_probabilities(model: TwoTowerForCausalLM, rows: Tensor) -> Tensor:
    return torch.cat([F.log_softmax(model(row[None]).logits, -1) for row in rows])


@click.command()
@program.MODEL
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True, help="UTF-8 text.")
@click.option("--tokens", type=click.IntRange(2), default=8192, show_default=True, help="Tokens of the text to read.")
@click.option("--length", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a row.")
@program.THREADS
@program.JSON
def main(path: Path | None, text: Path, tokens: int, length: int, threads: int | None, as_json: bool) -> None:
    """Compare rules of rounding to 8 and 4 bits by KL and NLL of the context tower."""
    program.start(threads)
    model = TwoTowerForCausalLM.from_pretrained(path or bundled_model("small"), dtype="float32", towers="context")
    if model.tokenizer is None:
        raise click.UsageError("the model has no tokenizer.json; give another --model")
    ids = torch.tensor(model.tokenizer(text.read_text(encoding="utf-8"))["input_ids"][:tokens])
    if len(ids) < length:
        raise click.UsageError(f"{text} has {len(ids)} tokens; give a longer text, or --length")
    rows = ids[: len(ids) // length * length].view(-1, length)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = log_probabilities(model, rows)

    def nll(found: Tensor) -> float:
        return float(-found[:, :-1].gather(-1, rows[:, 1:, None]).mean())

    results = []
    for name, bits, rule in rules():
        error = round_weights(model, original, rule)
        found = log_probabilities(model, rows)
        kl = float((exact.exp() * (exact - found)).sum(-1).mean())
        results.append({"rule": name, "bits": bits, "error": error, "kl": kl, "nll": nll(found) / nll(exact) - 1})
    for bits, name in ((8, "int8"), (4.5, "int4")):
        plan = f"{name},activations=int8"
        rounded = TwoTowerForCausalLM.from_pretrained(
            path or bundled_model("small"), dtype="float32", towers="context", quantization=plan
        )
        found = log_probabilities(rounded, rows)
        kl = float((exact.exp() * (exact - found)).sum(-1).mean())
        results.append({"rule": plan, "bits": bits, "error": None, "kl": kl, "nll": nll(found) / nll(exact) - 1})
    table = Table("rule", "bits", "relative error", "KL, nats", "NLL", title=f"{rows.numel()} tokens, {nll(exact):.4f}")
    for each in results:
        error = "" if each["error"] is None else f"{each['error']:.3f}"
        figures = f"{each['bits']:.2f}", error, f"{each['kl']:.4f}", f"{each['nll']:+.2%}"
        table.add_row(str(each["rule"]), *figures)
    program.publish("quantization", {"tokens": rows.numel(), "nll": nll(exact), "results": results}, [table], as_json)


if __name__ == "__main__":
    main()
