"""The released checkpoint layout: the one home of its tensor names. Reads and writes it, strictly both ways.

Weights are built once: the model is made on the meta device, each tensor is allocated where it belongs and
filled from the memory-mapped file. Experts are stacked in memory and single on disk.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from twotower.config import KIND_NAMES
from twotower.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# Kept in at least fp32 in a narrower model: a rounded decay rate or selection bias changes what a layer does.
WIDE_SUFFIXES = (".A_log", ".dt_bias", ".D", ".e_score_correction_bias")

_TOWERS = {"context": ("context_tower.", "context_lm_head."), "denoiser": ("denoiser_tower.", "lm_head.")}
_EXPERTS = re.compile(r"(.*\.experts)\.(up_proj|down_proj)$")
# Tensors that give a layer's kind away, for the message when the pattern and the file disagree.
_KIND_MARKS = {"mixer.in_proj.": "M", "mixer.q_proj.": "*", "mixer.gate.": "E", "mixer.up_proj.": "-"}


@dataclass(frozen=True)
class Slot:
    """One tensor on disk and its place in memory: a whole parameter, or one expert of a stacked one."""

    disk: str
    memory: str
    expert: int | None
    shape: tuple[int, ...]


def slots(model: nn.Module) -> list[Slot]:
    """Every tensor of a two-tower model (a meta one will do), in model order."""
    out = []
    for memory, tensor in _tensors(model):
        disk = disk_name(memory)
        stacked = _EXPERTS.match(disk)
        if stacked is None:
            out.append(Slot(disk, memory, None, tuple(tensor.shape)))
            continue
        prefix, projection = stacked.groups()
        for j in range(tensor.shape[0]):
            out.append(Slot(f"{prefix}.{j}.{projection}.weight", memory, j, tuple(tensor.shape[1:])))
    return out


def disk_name(memory: str) -> str:
    """context.head.weight → context_lm_head.weight, time.t_block.1.bias → t_block.1.bias, …"""
    first, rest = memory.split(".", 1)
    if first == "time":
        return rest
    tower, head = _TOWERS[first]
    return head + rest.removeprefix("head.") if rest.startswith("head.") else tower + rest


def wanted_dtype(memory: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype a tensor has in a model of `dtype`."""
    return torch.promote_types(dtype, torch.float32) if f".{memory}".endswith(WIDE_SUFFIXES) else dtype


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model in `dtype`, in place, with the tensors that must stay wide left wide."""
    for name, tensor in _tensors(model):
        tensor.data = tensor.data.to(wanted_dtype(name, dtype))
    return model


def keeping_wide(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`change` as `Module._apply` takes it (`.to`, `.bfloat16`, …), but it leaves the wide tensors wide."""
    names = {id(part): name for name, tensor in _tensors(model) for part in (tensor, tensor.grad)}

    def changed(tensor: Tensor) -> Tensor:
        out = change(tensor)
        dtype = wanted_dtype(names.get(id(tensor), ""), out.dtype)
        return out if out.dtype == dtype else tensor.to(out.device, dtype)

    return changed


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def scan(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint directory, from the files' headers alone.

    Raises:
        CheckpointError: no weights, an index and files that disagree, a damaged or truncated file.
    """
    index = directory / INDEX_FILE
    if not index.exists():
        if not (directory / SINGLE_FILE).exists():
            raise CheckpointError(f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; no weights to load")
        return _header(directory / SINGLE_FILE)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index with a weight_map ({error!r})") from None
    found: dict[str, Stored] = {}
    for name in files:
        file = directory / str(name)
        if not file.is_file():
            raise CheckpointError(f"{index}: names {name}, which is not in {directory}; fetch it again")
        for tensor, stored in _header(file).items():
            if tensor in found:
                raise CheckpointError(f"{file}: {tensor} is also in {found[tensor].file.name}; one copy is expected")
            if tensor not in weight_map:
                raise CheckpointError(f"{file}: holds {tensor}, which {index.name} does not list; a stray shard?")
            found[tensor] = stored
    for tensor, name in weight_map.items():
        if tensor not in found or found[tensor].file.name != name:
            raise CheckpointError(
                f"{index}: says {tensor} is in {name}, but it is not; the shards do not belong together"
            )
    return found


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as handle:
            out = {}
            for name in handle.keys():  # noqa: SIM118 — not a dict
                part = handle.get_slice(name)
                out[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
            return out
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); fetch it again") from None


def check(directory: Path, found: dict[str, Stored], known: list[Slot], needed: list[Slot], pattern: str) -> None:
    """The file against the model: nothing missing, nothing surplus, every shape right.

    known: all tensors of a two-tower model of this configuration; needed: those that will be loaded.
    """
    if not any(name.startswith("context_tower.") for name in found):
        kind = "a one-tower model" if any(n.startswith(("backbone.", "model.")) for n in found) else "something else"
        raise CheckpointError(
            f"{directory}: has no context_tower.* tensors, so it is {kind}, not a two-tower checkpoint; "
            "a two-tower checkpoint has context_tower.*, denoiser_tower.*, lm_head and t_embedder"
        )
    _check_kinds(directory, found, pattern)
    missing = [slot for slot in needed if slot.disk not in found]
    if missing:
        listing = INDEX_FILE if (directory / INDEX_FILE).exists() else SINGLE_FILE
        raise CheckpointError(
            f"{directory / listing}: {missing[0].disk} is missing (shape {list(missing[0].shape)} expected)"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    surplus = sorted(set(found) - {slot.disk for slot in known})
    if surplus:
        raise CheckpointError(
            f"{found[surplus[0]].file}: {surplus[0]} has no place in a model of this config"
            + (f", nor have {len(surplus) - 1} more" if len(surplus) > 1 else "")
            + "; is config.json the one that belongs to these weights?"
        )
    for slot in needed:
        stored = found[slot.disk]
        if stored.shape != slot.shape:
            raise CheckpointError(
                f"{stored.file}: {slot.disk} has shape {list(stored.shape)}; the config expects {list(slot.shape)}"
            )
        if stored.dtype not in ("BF16", "F16", "F32", "F64"):
            raise CheckpointError(f"{stored.file}: {slot.disk} is stored as {stored.dtype}; a float tensor is expected")


def _check_kinds(directory: Path, found: dict[str, Stored], pattern: str) -> None:
    for name, stored in found.items():
        layer = re.match(r"(?:context|denoiser)_tower\.layers\.(\d+)\.(.*)", name)
        if layer is None:
            continue
        i = int(layer[1])
        if i >= len(pattern):
            raise CheckpointError(
                f"{stored.file}: has {name}, but hybrid_override_pattern names only {len(pattern)} layers"
            )
        kind = next((kind for mark, kind in _KIND_MARKS.items() if layer[2].startswith(mark)), pattern[i])
        if kind != pattern[i]:
            raise CheckpointError(
                f"{stored.file}: {name} belongs to a layer of kind '{kind}' ({KIND_NAMES[kind]}), but letter {i} of "
                f"hybrid_override_pattern is '{pattern[i]}' ({KIND_NAMES[pattern[i]]})"
            )


def load_weights(
    model: nn.Module,
    directory: Path,
    pattern: str,
    known: list[Slot],
    dtype: torch.dtype | None,
    device_of: dict[str, torch.device],
) -> None:
    """Fills a meta model. dtype None: that of the stored embeddings. device_of: "context" and "denoiser"."""
    found = scan(directory)
    needed = slots(model)
    check(directory, found, known, needed, pattern)
    if dtype is None:
        dtype = _stored_dtype(found["context_tower.embeddings.weight"])
    by_file: dict[Path, list[Slot]] = defaultdict(list)
    for slot in needed:
        by_file[found[slot.disk].file].append(slot)
    shapes = {name: tensor.shape for name, tensor in _tensors(model)}
    filled: dict[str, Tensor] = {}
    for file, wanted in by_file.items():
        with safe_open(file, framework="pt") as handle:
            for slot in wanted:
                source = handle.get_tensor(slot.disk)
                if slot.memory not in filled:
                    filled[slot.memory] = torch.empty(
                        shapes[slot.memory],
                        dtype=wanted_dtype(slot.memory, dtype),
                        device=device_of["context" if slot.memory.startswith("context.") else "denoiser"],
                    )
                target = filled[slot.memory]
                (target if slot.expert is None else target[slot.expert]).copy_(source)
    model.load_state_dict(filled, strict=True, assign=True)


def _stored_dtype(stored: Stored) -> torch.dtype:
    names = {"BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    if stored.dtype not in names:
        raise CheckpointError(f"{stored.file}: is stored as {stored.dtype}; name the dtype to load it in, as bfloat16")
    return names[stored.dtype]


# --- writing -------------------------------------------------------------------------------------------------------


def save_weights(model: nn.Module, directory: Path, max_shard_size: int | str) -> None:
    """Released names; one file, or shards with an index where it would be larger than max_shard_size."""
    memory = dict(_tensors(model))
    tensors = {}
    for slot in slots(model):
        tensor = memory[slot.memory].detach()
        tensors[slot.disk] = (tensor if slot.expert is None else tensor[slot.expert]).contiguous()
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,  # experts share one storage but may go to different shards
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for stale in [*directory.glob("model-*-of-*.safetensors"), directory / INDEX_FILE, directory / SINGLE_FILE]:
        stale.unlink(missing_ok=True)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name].cpu() for name in names}, directory / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
