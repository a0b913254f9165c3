"""`twotower info`: describes a checkpoint from its config and the headers of its files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from twotower.cli.info_facts import Facts, ParameterCounts, StateSizes, StoredWeights
    from twotower.modeling_twotower import TwoTowerForCausalLM
    from twotower.specs import TowerSpec

DTYPES = ("bfloat16", "float32", "float64")
# Measured on a CPU (docs/log.md): a step takes 6.2 ms in plain torch, 4.1 compiled, 2.3 in one native call.
_COMPILE = {
    "cpu": "not used: with a C++ compiler, the native kernels are faster",
    "cuda": "CUDA graphs are used instead; torch.compile has not been measured on a GPU",
}


@click.command()
@click.argument("path", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def info(path: str | None, as_json: bool) -> None:
    """Describe a checkpoint or a config.json.

    The output lists layers, parameters, memory, backends and files. PATH is a checkpoint directory or a config.json;
    without PATH the bundled model is described. No weights are loaded, so that the largest model takes seconds and
    little memory.
    """
    facts = describe(Path(model_loading.source_of(path)))
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, allow_nan=False))
    else:
        from twotower.cli.info_page import page

        for line in page(facts):
            click.echo(line)
    for problem in (facts["weights"]["problem"], facts["tokenizer_problem"]):
        if problem:
            raise CheckpointError(problem)


def describe(path: Path) -> Facts:
    """Facts about a checkpoint directory or config file as plain data; sizes in bytes.

    Raises:
        ConfigError: the config is missing, or no model can be built from it.
    """
    with models.status("reading …"):
        import torch

        from twotower.checkpoint.quantize import quantize_
        from twotower.checkpoint.stored_quantization import stored_plan
        from twotower.checkpoint.tokenizer_files import TOKENIZER_FILES
        from twotower.cli.info_backbone import backbone_facts, refuse_one_tower
        from twotower.cli.info_denoiser import denoiser_facts, layer_numbers, memory_of
        from twotower.cli.info_generation import generation_facts, read_tokenizer
        from twotower.config import TwoTowerConfig, errors_of
        from twotower.modeling_twotower import TwoTowerForCausalLM

        refuse_one_tower(path)
        config = TwoTowerConfig.read(path)
        with torch.device("meta"), errors_of(path):
            model = TwoTowerForCausalLM(config)
            stored = stored_plan(config, path)
            plans = {"int8": "int8", "int4": "int4"} | ({} if stored is None else {"stored": str(stored)})
            quantized = {name: quantize_(TwoTowerForCausalLM(config), plan) for name, plan in plans.items()}
    directory = path if path.is_dir() else path.parent
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"{path}: dtype is {dtype!r}, which torch does not have; correct it in the config")
    computes_in = _computes_in(model, dtype)
    models_by_dtype = {name: (model, name) for name in DTYPES} | {
        name: (each, "bfloat16") for name, each in quantized.items()
    }
    tokenizer, problem = read_tokenizer(directory)
    return {
        "path": str(path),
        "architectures": config.architectures,
        "dtype": dtype,
        "pattern": model.spec.pattern,
        **denoiser_facts(model, models_by_dtype),
        "layer_numbers": layer_numbers(model.spec),
        "backbone": backbone_facts(config, model.spec),
        "layers": _layers(model.spec),
        "shape": _shape(model.spec),
        "parameters": _parameters(model),
        "memory": {name: memory_of(*each) for name, each in models_by_dtype.items()},
        "computes_in": computes_in,
        "state": _state(model.spec, list(computes_in.values())[-1]),
        "backends": _backends(model, computes_in),
        "weights": _weights(directory, quantized.get("stored", model)),
        "tokenizer": [name for name in TOKENIZER_FILES if (directory / name).exists()],
        "tokenizer_problem": problem,
        "generation": generation_facts(directory, config, tokenizer),
    }


def _layers(spec: TowerSpec) -> dict[str, int]:
    from twotower.specs import KIND_NAMES

    counts = Counter(spec.pattern)
    return {name: counts[kind] for kind, name in KIND_NAMES.items() if counts[kind]}


def _shape(spec: TowerSpec) -> dict[str, int]:
    """The sizes of the model, without those of layer kinds that it does not have."""
    from twotower.specs import MLPSpec

    sizes = {name: getattr(spec, name) for name in ("hidden_size", "vocab_size", "max_position_embeddings")}
    if (attention := spec.attention) is not None:
        sizes |= {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_kv_heads,
            "head_dim": attention.head_dim,
        }
    if (mamba := spec.mamba) is not None:
        sizes |= {
            "mamba_num_heads": mamba.num_heads,
            "mamba_head_dim": mamba.head_dim,
            "ssm_state_size": mamba.state_size,
            "n_groups": mamba.num_groups,
            "conv_kernel": mamba.conv_kernel,
        }
    if (delta_net := spec.delta_net) is not None:
        sizes |= {
            "linear_num_value_heads": delta_net.num_heads,
            "linear_value_head_dim": delta_net.head_dim,
            "linear_num_key_heads": delta_net.num_groups,
            "linear_key_head_dim": delta_net.state_size,
            "linear_conv_kernel_dim": delta_net.conv_kernel,
        }
    if (moe := spec.moe) is not None:
        sizes |= {
            "n_routed_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert.width,
            "moe_shared_expert_intermediate_size": 0 if moe.shared is None else moe.shared.width,
            "n_group": moe.num_groups,
            "topk_group": moe.top_groups,
        }
    mlps = [layer.mixer.width for layer in spec.layers if isinstance(layer.mixer, MLPSpec)]
    return sizes | ({"intermediate_size": mlps[0]} if mlps else {})


def _parameters(model: TwoTowerForCausalLM) -> ParameterCounts:
    from twotower.cli.info_denoiser import count_of
    from twotower.model.conditioning import TimeConditioning
    from twotower.model.moe import MoE

    spec, moe_spec = model.spec, model.spec.moe
    layers = list(model.context.all_layers())
    total = count_of(model.context, adapters=False)
    moe = sum(count_of(layer, adapters=False) for layer in layers if layer.kind == "E")
    routed = sum(count_of(layer.mixer.experts) for layer in layers if isinstance(layer.mixer, MoE))
    active = total - routed + (0 if moe_spec is None else routed * moe_spec.top_k // moe_spec.experts)
    table = count_of(model.context.embeddings)
    return {
        "per_tower": total,
        "both_towers": count_of(model),
        "time_conditioning": sum(count_of(part) for part in model.modules() if isinstance(part, TimeConditioning)),
        "active": active,
        "active_without_embedding": active if spec.tied_head else active - table + spec.hidden_size,
        "moe_share": moe / total,
        "routed_expert_share": routed / total,
    }


def _state(spec: TowerSpec, dtype: str) -> StateSizes:
    """Sizes of the state, computed by the module that allocates it."""
    import torch

    from twotower.cache.sliding_window import longest_pass_of
    from twotower.cache.state_bytes import state_bytes

    size = state_bytes(spec, getattr(torch, dtype))
    full = size.of_text(spec.max_position_embeddings, longest_pass_of(spec))
    windows = full - size.row - size.token * spec.max_position_embeddings
    return {
        "dtype": dtype, "per_token": size.token, "per_row": size.row, "windows": windows, "full_context": full,
    }  # fmt: skip


def _computes_in(model: TwoTowerForCausalLM, stored: str) -> dict[str, str]:
    """The dtype of `--dtype auto` by device of this machine; the last device is the default of commands."""
    import torch

    from twotower.model.fp32_tensors import named_tensors

    size = sum(tensor.numel() for _, tensor in named_tensors(model))
    devices = ["cpu"] + (["cuda:0"] if torch.cuda.is_available() else [])
    chosen = {device: model_loading.auto_dtype(getattr(torch, stored), size, [device]) for device in devices}
    return {device: str(dtype).removeprefix("torch.") for device, dtype in chosen.items()}


def _backends(model: TwoTowerForCausalLM, computes_in: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    import torch

    from twotower.ops import registry
    from twotower.runners import cuda_graph, fused_cpu, layer_options, packed_weights

    found: dict[str, list[dict[str, str]]] = {}
    for device, dtype in computes_in.items():
        rows = registry.report(torch.device(device), getattr(torch, dtype))
        unsupported = cuda_graph.cuda_graph_unsupported_reason(torch.device(device))
        if unsupported is None:
            rows.append(("pass", "recorded", "a CUDA graph of all layers, checked when it is recorded"))
        else:
            at_once = all(backend == "native" for op, backend, _ in rows if op in fused_cpu.OPS)
            declined = layer_options.spec_unsupported_reason(model.spec) if at_once else "some kernels are not C++"
            way = "one call" if declined is None else "layer by layer"
            rows.append(("pass", way, f"{declined or 'for few tokens'}; a CUDA graph {unsupported}"))
        if device == "cpu":
            unpacked = packed_weights.packing_unsupported_reason(model, torch.device(device), getattr(torch, dtype))
            packed = "a second copy of the weights, in the order in which passes read them"
            rows.append(("weights", "packed", packed) if unpacked is None else ("weights", "not packed", unpacked))
        rows.append(("torch.compile", "off", _COMPILE[torch.device(device).type]))
        found[device] = [{"op": op, "backend": backend, "reason": reason} for op, backend, reason in rows]
    return found


def _weights(directory: Path, model: TwoTowerForCausalLM) -> StoredWeights:
    """Files of weights, and whether they pass the check that loading makes. model: quantised as they are."""
    from twotower.checkpoint import names, reader
    from twotower.checkpoint.stored_quantization import stored_entries
    from twotower.checkpoint.writer import INDEX_FILE, SINGLE_FILE

    plan = model.quantization
    nothing: StoredWeights = {"present": False, "files": [], "dtypes": {}, "quantization": plan, "problem": None}
    if not any((directory / name).exists() for name in (INDEX_FILE, SINGLE_FILE)):
        return nothing
    try:
        found = reader.read_headers(directory)
        known = list(stored_entries(model, names.tensor_entries(model)))
        problem = None
    except CheckpointError as error:
        return nothing | {"present": True, "problem": str(error)}
    try:
        reader.check(directory, found, known, known, model.config)
    except CheckpointError as error:
        problem = str(error)
    tensors = Counter(stored.file for stored in found.values())
    return {
        "present": True,
        "files": [
            {"name": file.name, "bytes": file.stat().st_size, "tensors": count}
            for file, count in sorted(tensors.items())
        ],
        "dtypes": dict(Counter(stored.dtype for stored in found.values()).most_common()),
        "quantization": plan,
        "problem": problem,
    }
