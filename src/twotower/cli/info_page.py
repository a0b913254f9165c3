"""The facts of `twotower info` as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from twotower.byte_units import format_bytes, unit_of

if TYPE_CHECKING:
    from twotower.cli.info_facts import (
        AdapterFacts,
        BackboneFacts,
        BlockFacts,
        DenoiserFacts,
        Facts,
        GenerationFacts,
        NamedDenoiserFacts,
        ParameterCounts,
        StateSizes,
        StoredWeights,
    )

_INDENT = 12
_WIDTH = 100
_REPEATED = 10  # letters of a repeated part from which a pattern is written shorter
_SHORT = {"bfloat16": "bf16", "float32": "fp32", "float64": "float64"}


def page(facts: Facts) -> Iterator[str]:
    """Lines of text: layers, sizes, memory, backends and files, each with a heading."""
    yield click.style(facts["path"], bold=True)
    for name, lines in _sections(facts):
        for i, line in enumerate(lines):
            heading = click.style(name.ljust(_INDENT), dim=True) if i == 0 else " " * _INDENT
            first, *more = textwrap.wrap(line, _WIDTH - _INDENT, subsequent_indent="  ", break_on_hyphens=False) or [""]
            yield heading + first
            yield from (" " * _INDENT + rest for rest in more)


def _sections(facts: Facts) -> Iterator[tuple[str, list[str]]]:
    layers = ", ".join(f"{count} {name}" for name, count in facts["layers"].items())
    numbers = [f"{kind:<2} {format_numbers(each)}" for kind, each in facts["layer_numbers"].items()]
    yield "layers", [f"{len(facts['pattern'])}: {layers}", format_pattern(facts["pattern"])]
    yield "numbers", numbers
    yield "backbone", list(_backbone(facts["backbone"]))
    yield "shape", list(_shape(facts["shape"]))
    yield "parameters", list(_parameters(facts["parameters"], facts["adapters"], facts["denoiser"], facts["denoisers"]))
    if facts["adapters"] is not None:
        yield "denoiser", list(_adapters(facts["adapters"]))
    if facts["denoiser"] is not None:
        yield "denoiser", list(_denoiser(facts["denoiser"]))
    if facts["blocks"] is not None and (blocks := list(_blocks(facts["blocks"]))):
        yield "blocks", blocks
    several = facts["denoisers"] or []
    for each in several:
        yield "denoiser", list(_named_denoiser(each))
    yield "weights in", list(_memory(facts["memory"], facts["adapters"], several))
    adapters = facts["adapters"] is not None or any(each["adapters"] is not None for each in several)
    yield "state", list(_state(facts["state"], not adapters))
    for device, rows in facts["backends"].items():
        yield (
            f"{device} {_SHORT.get(facts['computes_in'][device], facts['computes_in'][device])}",
            [f"{row['op']:<19}{row['backend']:<15}{row['reason']}" for row in rows],
        )
    yield "files", list(_weights(facts["weights"]))
    files = ", ".join(facts["tokenizer"]) or "none (the model takes token ids only)"
    yield "tokenizer", [files, *(["cannot be read (see the error below)"] if facts["tokenizer_problem"] else [])]
    yield "generation", list(_generation(facts["generation"]))


def _backbone(backbone: BackboneFacts) -> Iterator[str]:
    head = "the head is the embedding" if backbone["tied_head"] else "a head of its own"
    yield f"{backbone['model_type']}: {backbone['layers']} layers, {head}"
    yield from backbone["options"]


def _shape(shape: dict[str, int]) -> Iterator[str]:
    yield (
        f"hidden {shape['hidden_size']}, vocabulary {shape['vocab_size']}, "
        f"context {shape['max_position_embeddings']} tokens"
    )
    if "num_attention_heads" in shape:
        yield (
            f"attention: {shape['num_attention_heads']} heads of {shape['head_dim']}, "
            f"{shape['num_key_value_heads']} K/V heads"
        )
    if "mamba_num_heads" in shape:
        yield (
            f"Mamba-2: {shape['mamba_num_heads']} heads of {shape['mamba_head_dim']}, state {shape['ssm_state_size']}, "
            f"{shape['n_groups']} groups, convolution {shape['conv_kernel']}"
        )
    if "linear_num_value_heads" in shape:
        yield (
            f"gated DeltaNet: {shape['linear_num_value_heads']} heads of {shape['linear_value_head_dim']}, "
            f"{shape['linear_num_key_heads']} key heads of {shape['linear_key_head_dim']}, "
            f"convolution {shape['linear_conv_kernel_dim']}"
        )
    if "n_routed_experts" in shape:
        groups = f" in {shape['topk_group']} of {shape['n_group']} groups" if shape["n_group"] > 1 else ""
        yield (
            f"MoE: {shape['num_experts_per_tok']} of {shape['n_routed_experts']} experts{groups}, width "
            f"{shape['moe_intermediate_size']}; shared expert {shape['moe_shared_expert_intermediate_size']}"
        )
    if "intermediate_size" in shape:
        yield f"MLP: width {shape['intermediate_size']}"


def _parameters(
    count: ParameterCounts,
    adapters: AdapterFacts | None,
    denoiser: DenoiserFacts | None,
    several: Sequence[NamedDenoiserFacts] | None,
) -> Iterator[str]:
    if several is not None:
        of_all = sum(each["parameters"] for each in several)
        yield (
            f"{format_count(count['per_tower'])} of the context tower; {format_count(count['both_towers'])} in all, "
            f"of which {format_count(of_all)} of {len(several)} denoisers"
        )
    elif denoiser is not None:
        yield (
            f"{format_count(count['per_tower'])} of the context tower, {format_count(denoiser['parameters'])} of the "
            f"denoiser; {format_count(count['both_towers'])} in all, "
            f"of which time conditioning {format_count(count['time_conditioning'])}"
        )
    elif adapters is None:
        yield (
            f"{format_count(count['per_tower'])} per tower; {format_count(count['both_towers'])} in all, "
            f"of which time conditioning {format_count(count['time_conditioning'])}"
        )
    else:
        yield (
            f"{format_count(count['per_tower'])} of the context tower; {format_count(count['both_towers'])} in all, "
            f"of which adapters {format_count(adapters['parameters'])}"
        )
    yield f"{format_count(count['active'])} active per token (without routed experts that the token does not select)"
    if count["active_without_embedding"] < count["active"]:
        yield f"{format_count(count['active_without_embedding'])} of them read (only one row of the embedding)"
    if count["moe_share"]:
        yield (
            f"{count['moe_share']:.1%} of a tower in MoE layers, {count['routed_expert_share']:.1%} in routed experts"
        )


def _denoiser(facts: DenoiserFacts) -> Iterator[str]:
    yield f"{len(facts['pattern'])} layers: {format_pattern(facts['pattern'])}"
    yield f"for layers {format_numbers(facts['layers'])} of the backbone"
    if facts["feed_forward"] is not None:
        yield facts["feed_forward"]
    yield f"{format_count(facts['parameters'])} parameters, without time conditioning"


def _named_denoiser(facts: NamedDenoiserFacts) -> Iterator[str]:
    """Lines about one denoiser of several."""
    modes = f"for mode {', '.join(facts['modes'])}" if facts["modes"] else "used by its name only"
    size = "" if facts["block_size"] is None else f", trained with blocks of {facts['block_size']}"
    yield f"{facts['name']}: {modes}{size}"
    if facts["adapters"] is not None:
        yield from _adapters(facts["adapters"])
    elif facts["denoiser"] is not None:
        yield from _denoiser(facts["denoiser"])
    else:
        yield f"a full tower: {format_count(facts['parameters'])} parameters with time conditioning"
    yield from _blocks(facts["blocks"])


def _adapters(adapters: AdapterFacts) -> Iterator[str]:
    yield (
        f"adapters of rank {adapters['rank']} on the context tower: {format_count(adapters['parameters'])} "
        "parameters; one network in memory"
    )
    if adapters["gate"] == "masks":
        yield "they act from the first mask on: a pass checks a draft and makes the next (docs/decoding.md)"
    else:
        yield "they act at every position of a block"


def _blocks(blocks: BlockFacts) -> Iterator[str]:
    """What is not as in the released model."""
    if blocks["prediction_shift"]:
        yield "prediction shift 1: each output predicts the next token; a block begins with the text's last token"
    if blocks["block_attention"] != "full":
        yield "prefix-causal attention: the tokens before the first mask attend only to earlier ones"
    if blocks["first_from_ar"]:
        yield "in diffusion the context tower chooses the first token of each block"
    if (rank := blocks["draft_head_rank"]) is not None:
        yield f"a draft head of rank {rank}: each token that a pass chooses depends on the token before it"


def _memory(
    memory: dict[str, dict[str, int]], adapters: AdapterFacts | None, several: Sequence[NamedDenoiserFacts]
) -> Iterator[str]:
    sizes = list(memory.values())
    unit, divisor = unit_of(max(size["both"] for size in sizes))
    named = {
        "both towers on one device": "both",
        "two devices: context": "context",
        "             denoiser": "denoiser",
        "context tower alone (--mode ar)": "context",
    }
    if adapters is not None:
        named = {"context tower and adapters": "both", "context tower alone (--mode ar)": "context"}
    if several:
        named = {"context tower and all denoisers": "both", "context tower alone (--mode ar)": "context"}
    rows = {name: [f"{size[part] / divisor:.1f}" for size in sizes] for name, part in named.items()}
    if adapters is not None:
        rows["adapters"] = [f"{size / divisor:.1f}" for size in adapters["bytes"].values()]
        rows["read by a pass of one token"] = [f"{size / divisor:.1f}" for size in adapters["read_bytes"].values()]
    for each in several:
        rows[f"{each['name']}: its own weights"] = [f"{size / divisor:.1f}" for size in each["bytes"].values()]
        rows[f"{each['name']}: read by a pass of 1 token"] = [
            f"{size / divisor:.1f}" for size in each["read_bytes"].values()
        ]
    wide = max(34, *(len(name) + 2 for name in rows))
    yield f"{unit:<{wide}}" + "".join(f"{_SHORT.get(name, name):>10}" for name in memory)
    for name, cells in rows.items():
        yield f"{name:<{wide}}" + "".join(f"{cell:>10}" for cell in cells)
    yield "int8, int4: with --quantization; weights that are not quantized in bf16"


def _state(state: StateSizes, two_towers: bool) -> Iterator[str]:
    yield (
        f"{format_bytes(state['per_token'])} per token (K/V), {format_bytes(state['per_row'])} per sequence "
        f"(convolution and SSM), in {_SHORT.get(state['dtype'], state['dtype'])}"
    )
    if state["windows"]:
        yield f"at most {format_bytes(state['windows'])} more for a sequence in the layers with a window"
    copies = "; two devices have a copy each" if two_towers else ""
    yield f"{format_bytes(state['full_context'])} for a sequence that fills the context{copies}"


def _weights(weights: StoredWeights) -> Iterator[str]:
    if not weights["present"]:
        yield "none (a config without weights)"
        return
    files = weights["files"]
    if files:
        names = files[0]["name"] if len(files) == 1 else f"{files[0]['name']} … {files[-1]['name']} ({len(files)})"
        dtypes = ", ".join(f"{count} {name}" for name, count in weights["dtypes"].items())
        yield f"{names}: {format_bytes(sum(file['bytes'] for file in files))}, tensors: {dtypes}"
    if weights["quantization"] != "none":
        yield f"stored in {weights['quantization']}: loaded as they are, without --quantization"
    yield (
        "do not fit the config (see the error below)"
        if weights["problem"]
        else "complete: all tensors with the right shapes"
    )


def _generation(generation: GenerationFacts) -> Iterator[str]:
    text = "" if generation["mask_token"] is None else f" {generation['mask_token']!r}"
    yield f"mask token: {generation['mask_token_id']}{text}"
    tokens = ", ".join(map(str, generation["eos_token_id"]))
    yield f"EOS tokens: {tokens} ({generation['eos_source']})" if tokens else "EOS tokens: none"
    if generation["sampling"]:
        values = ", ".join(f"{name} {value}" for name, value in generation["sampling"].items())
        yield f"sampling defaults of the server: {values} (generation_config.json)"
    else:
        yield "sampling defaults of the server: those of the OpenAI API"
    if generation["unused"]:
        yield f"without effect: {', '.join(generation['unused'])} (generation_config.json)"
    names = f", also {', '.join(generation['chat_templates'])}" if generation["chat_templates"] else ""
    yield f"chat template: {generation['chat_template'] or 'none (the server writes lines of `Role: text`)'}{names}"


def format_count(count: int) -> str:
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f} {name}"
    return str(count)


def format_numbers(numbers: Sequence[int]) -> str:
    """Increasing numbers; runs of at least three as a range: 0, 4, 8–11."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def format_pattern(pattern: str) -> str:
    """The letters of layers; parts that are repeated once: "*-*-*-*-*-*-" is 6 × "*-"."""
    parts, plain, at = [], "", 0
    while at < len(pattern):
        size, count = max(
            ((size, _repeats(pattern, at, size)) for size in range(1, len(pattern) - at + 1)),
            key=lambda found: (found[0] * found[1] * (found[1] > 1), -found[0]),
        )
        if size * count < _REPEATED or count == 1:
            plain, at = plain + pattern[at], at + 1
            continue
        parts += [f'"{plain}"'] * bool(plain) + [f'{count} × "{pattern[at : at + size]}"']
        plain, at = "", at + size * count
    return " + ".join(parts + [f'"{plain}"'] * bool(plain)) if parts else pattern


def _repeats(pattern: str, at: int, size: int) -> int:
    """How often the letters at … at + size − 1 follow each other from there."""
    count, unit = 1, pattern[at : at + size]
    while pattern.startswith(unit, at + count * size):
        count += 1
    return count
