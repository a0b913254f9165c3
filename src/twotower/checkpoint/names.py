"""Names of tensors on disk: the two-tower layouts, and the one-tower layouts of autoregressive models.

Families (`families/`) say what a module of a layer is called on disk. A tensor in memory may be several on disk (each
expert has its own), and several in memory may share one on disk (packed projections).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from twotower.families import family_of
from twotower.families.family import Family, Names, Rows
from twotower.model.fp32_tensors import named_tensors
from twotower.model.linear import Int4Linear
from twotower.model.moe import Int4Experts
from twotower.model.towers import TwoTowerModel
from twotower.ops.reference import int8
from twotower.specs import TowerSpec

DENOISERS = "denoisers."  # before the names of the tensors of one denoiser of several
SCALE = "_scale"  # suffix of the scales of an int8 tensor; checkpoints do not store them

_LAYER_IN_MEMORY = re.compile(r"layers\.(\d+)\.(.*)")
LAYER = re.compile(r"(?:(?:context|denoiser)_tower|backbone|model)\.layers\.(\d+)\.(.*)")
# Tensor names that identify the kind of a Nemotron-H layer, to compare with the pattern of the config.
KIND_MARKS = {"mixer.in_proj.": "M", "mixer.q_proj.": "*", "mixer.gate.": "E", "mixer.up_proj.": "-"}

Index = tuple[slice | int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in memory, or its index (`expert`) in a stacked tensor, and where it is on disk.

    shape: of the piece. disk_shape: of the tensor on disk. index: of the piece in the tensor on disk; (): the whole.
    part, whole: of a weight that is quantised on disk, the suffix of this part's name, and the weight's shape.
    """

    disk: str
    memory: str
    expert: int | None
    shape: tuple[int, ...]
    disk_shape: tuple[int, ...]
    index: Index = ()
    part: str = ""
    whole: tuple[int, ...] = ()


@dataclass(frozen=True)
class DiskLayout:
    """How a tower's tensors are called on disk: a prefix of all but the head, the head's module, and other names.

    found: the names on disk, if there is a choice: `Family.stacked` names, and the embedding as head.
    """

    root: str
    head: str
    found: Container[str] | None = None


TWO_TOWERS = {
    "context": DiskLayout("context_tower.", "context_lm_head"),
    "denoiser": DiskLayout("denoiser_tower.", "lm_head"),
}


def tensor_entries(model: TwoTowerModel) -> list[TensorEntry]:
    """All tensors of a two-tower model on disk, in the order of the model, which may be on the meta device.

    Quantised tensors have the entry of the tensor that they were made from.
    """
    out: list[TensorEntry] = []
    family = family_of(model.config)
    specs = {"context": model.spec, "denoiser": model.spec if model.denoiser is None else model.denoiser.spec}
    for memory, shape in weight_shapes(model).items():
        first, part = memory.split(".", 1)
        if first == "denoisers":
            continue
        if first == "time" or (first == "denoiser" and part.startswith("draft_head.")):
            out.append(TensorEntry(part, memory, None, shape, shape))
        elif of_adapters(memory):
            own = part.removeprefix("layers.").replace(".adapter", "")
            out.append(TensorEntry(f"adapters.{own}", memory, None, shape, shape))
        else:
            out += _entries(memory, shape, family, specs[first], TWO_TOWERS[first])
    several = model.config.denoisers
    for place, name in enumerate(several.names if several is not None and model.denoisers else ()):
        alone = [entry for entry in tensor_entries(model.with_denoiser(name)) if not of_context(entry)]
        out += [replace(one, memory=f"{DENOISERS}{place}.{one.memory}") for one in among_several(alone, name)]
    return out


def among_several(entries: Iterable[TensorEntry], denoiser: str) -> list[TensorEntry]:
    """The tensors of a model with one denoiser in a checkpoint of several, where the denoiser has this name."""
    return [one if of_context(one) else replace(one, disk=f"{DENOISERS}{denoiser}.{one.disk}") for one in entries]


def of_context(entry: TensorEntry) -> bool:
    """Whether a tensor belongs to the context tower, without adapters."""
    return entry.memory.startswith("context.") and not of_adapters(entry.memory)


def one_tower_entries(model: TwoTowerModel, layout: DiskLayout) -> list[TensorEntry]:
    """The tensors of the context tower of a model in a one-tower checkpoint."""
    out: list[TensorEntry] = []
    family = family_of(model.config)
    for memory, shape in weight_shapes(model).items():
        if memory.startswith("context.") and not of_adapters(memory):
            out += _entries(memory, shape, family, model.spec, layout)
    return out


def of_adapters(memory: str) -> bool:
    """Whether a tensor belongs to the adapters or their draft head, which no one-tower model has."""
    return ".adapter." in memory or memory.startswith(("context.mask_embedding.", "context.draft_head."))


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors of a model by name, with the shapes of the tensors that quantised ones were made from."""
    every, of_int4 = dict(named_tensors(model)), int4_shapes(model)
    out = {}
    for memory, tensor in every.items():
        scale = every.get(memory + SCALE)
        if not memory.endswith(SCALE):
            shape = tuple(tensor.shape) if scale is None else int8.weight_shape(tensor, scale)
            out[memory] = of_int4.get(memory, shape)
    return out


def int4_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The int4 tensors of a model by name, with the shapes of the weights that they stand for."""
    modules = [(path, part) for path, part in model.named_modules() if isinstance(part, Int4Linear | Int4Experts)]
    return {f"{path}.{leaf}": shape for path, part in modules for leaf, shape in part.shapes.items()}


def _entries(
    memory: str, shape: tuple[int, ...], family: Family, spec: TowerSpec, layout: DiskLayout
) -> Iterator[TensorEntry]:
    part = memory.split(".", 1)[1]
    found = _LAYER_IN_MEMORY.match(part)
    if found is None:
        module, _, leaf = part.rpartition(".")
        absent = layout.found is not None and f"{layout.head}.{leaf}" not in layout.found
        alone = layout.found is not None and f"{layout.root}{family.embeddings}.{leaf}" not in layout.found
        own_head = module == "head" and not spec.tied_head  # the int8 copy of a tied head is a tensor of its own
        tied_head_alone = module != "norm_f" and spec.tied_head and alone  # the file has no embedding
        if (own_head or tied_head_alone) and not absent:
            disk = f"{layout.head}.{leaf}"
        else:
            disk = f"{layout.root}{family.norm_f if module == 'norm_f' else family.embeddings}.{leaf}"
        yield TensorEntry(disk, memory, None, shape, shape)
        return
    layer = spec.layers[int(found[1])]
    root = f"{layout.root}layers.{layer.source}."
    target = place_on_disk(found[2], family.names(layer))
    name = target.module if isinstance(target, Rows) else target
    one_each = "{}" in name
    if layout.found is not None and root + name.format(0) not in layout.found:
        target = place_on_disk(found[2], {**family.names(layer), **family.stacked(layer)})
    if isinstance(target, Rows):
        rows, dim = (slice(target.lo, target.hi),), target.dim
        disk, stored = root + target.module, (*shape[:dim], target.of, *shape[dim + 1 :])
        if one_each:  # a piece for each expert, as in the other layout
            for j in range(shape[0]):
                yield TensorEntry(disk, memory, j, shape[1:], stored, (j, *rows))
        else:
            yield TensorEntry(disk, memory, None, shape, stored, (*[slice(None)] * dim, *rows))
    elif one_each:
        for j in range(shape[0]):
            if "{}" in target:
                yield TensorEntry(root + target.format(j), memory, j, shape[1:], shape[1:])
            else:
                yield TensorEntry(root + target, memory, j, shape[1:], shape, (j,))
    else:
        yield TensorEntry(root + target, memory, None, shape, shape)


def by_tensor_on_disk(entries: Iterable[TensorEntry]) -> dict[str, list[TensorEntry]]:
    """The entries of each tensor on disk, in their order."""
    out: dict[str, list[TensorEntry]] = defaultdict(list)
    for entry in entries:
        out[entry.disk].append(entry)
    return out


def place_on_disk(part: str, names: Names) -> str | Rows:
    """The name on disk of a tensor of a layer. The longest prefix of its name in memory that `names` has counts."""
    prefix = part
    while prefix:
        if (target := names.get(prefix)) is not None:
            rest = part[len(prefix) :]
            return target._replace(module=target.module + rest) if isinstance(target, Rows) else target + rest
        prefix = prefix.rpartition(".")[0]
    return part
