"""`twotower export --to onnx`: the passes of a small model as ONNX graphs in fp32, for onnxruntime.

`passes.json` describes them: the inputs of each file, the state of an empty text, and the rule of the blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from twotower.checkpoint import one_tower, one_tower_model, pretrained, tokenizer_files
from twotower.checkpoint.convert import counter
from twotower.checkpoint.export import ExportResult
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.checkpoint.onnx_export import limits
from twotower.checkpoint.onnx_export.passes import GROWS, ContextPass, DenoiserPass, empty_shapes
from twotower.checkpoint.output_folder import FolderKind, check_apart, check_target, unfinished_folder
from twotower.checkpoint.stored_quantization import refuse_quantized
from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
from twotower.errors import ArgumentError
from twotower.json_text import JsonObject
from twotower.model.towers import TwoTowerModel
from twotower.process import without_messages
from twotower.specs import TowerSpec
from twotower.tokenizer import Tokenizer
from twotower.version import VERSION

FORMAT = 1  # of passes.json
DESCRIPTION = "passes.json"
CONTEXT, DENOISER, DRAFT_HEAD = "context.onnx", "denoiser.onnx", "draft_head.onnx"
FOLDER = FolderKind("an ONNX export", DESCRIPTION, ("*.onnx", DESCRIPTION, *tokenizer_files.PATTERNS))
BLOCK = 16  # the block size of a checkpoint that does not name its own
_TRACED = 5  # tokens and cached tokens of the traced pass; the graph takes any number


@dataclass(frozen=True)
class Graph:
    """A module that becomes a file. arguments: before the state, by name; None: an input that the file lacks.

    state: the names of the state that it reads. returns_state: whether the state after the pass follows the logits.
    """

    file: str
    module: nn.Module
    arguments: dict[str, Tensor | None]
    state: tuple[str, ...] = ()
    returns_state: bool = False

    @property
    def inputs(self) -> list[str]:
        """The names of the inputs before the state."""
        return [name for name, argument in self.arguments.items() if argument is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in fp32."""
        return 4 * sum(weight.numel() for weight in self.module.parameters())

    def described(self) -> JsonObject:
        """The entry of passes.json."""
        return {"file": self.file, "inputs": self.inputs, "state": list(self.state)}


def export_onnx(
    source: str | Path,
    directory: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportResult:
    """Writes the passes of a model as ONNX graphs: a two-tower checkpoint, or an autoregressive model (its AR passes).

    source: a directory, a hub id, or a GGUF file. overwrite: whether to replace an export in `directory`.
    progress(done, total): bytes of weights, called after each file. An unfinished export is in `<directory>.partial`.

    Raises:
        TwoTowerError: the packages `onnx` and `onnxscript` are not installed.
        ConfigError, CheckpointError: the source is not valid, or is quantised, or `limits` refuses it.
        ArgumentError: a directory that may not be replaced, or not enough disk space.
    """
    folder = Path(directory)
    if folder.suffix == ".onnx":
        raise ArgumentError(f"{folder}: the output is a directory with several files; give {folder.with_suffix('')}")
    target = check_target(folder, overwrite, FOLDER)
    origin = one_tower_model.local_source(source)
    check_apart(folder, target, origin)
    _check(origin)
    limits.require_packages()
    model, tokenizer, defaults = _load(origin)
    graphs = list(graphs_of(model))
    total = sum(graph.nbytes for graph in graphs)
    with unfinished_folder(folder, overwrite, total, FOLDER) as unfinished:
        written = counter(total, progress)
        for graph in graphs:
            write(graph, unfinished / graph.file, model.spec)
            written(graph.nbytes)
        values = description(model, graphs, defaults)
        (unfinished / DESCRIPTION).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        if origin.is_dir():
            tokenizer_files.copy_model_files(origin, unfinished)
        elif tokenizer is not None:
            tokenizer_files.save_tokenizer(tokenizer, unfinished)
    return ExportResult(
        source=str(source),
        directory=folder,
        architecture="ONNX in fp32",
        parameters=sum(weight.numel() for weight in model.parameters()),
        bytes=total,
        files=tuple(graph.file for graph in graphs),
        notes=tuple(_notes(model, origin, tokenizer)),
    )


def _notes(model: TwoTowerModel, origin: Path, tokenizer: Tokenizer | None) -> Iterator[str]:
    if not model.has_denoiser:
        yield "the source is an autoregressive model, so there is no denoiser pass"
    if not origin.is_dir() and tokenizer is None:
        yield "transformers does not read the tokenizer of this GGUF file, so none is written"


def _check(origin: Path) -> None:
    """Refuses a checkpoint by its config and headers."""
    if one_tower_model.is_one_tower(origin):
        model = one_tower.read(origin).model
    else:
        config = TwoTowerConfig.read(origin)
        refuse_quantized(config, origin, "twotower export")
        with torch.device("meta"):
            model = TwoTowerModel(config)
    limits.check(model, origin)
    limits.check_sizes({graph.file: graph.nbytes for graph in graphs_of(model)}, origin)


def _load(origin: Path) -> tuple[TwoTowerModel, Tokenizer | None, GenerationDefaults]:
    if one_tower_model.is_one_tower(origin):
        return one_tower_model.load(TwoTowerModel, origin, dtype=torch.float32, device=torch.device("cpu"))
    model, _, defaults = pretrained.from_pretrained(TwoTowerModel, origin, dtype=torch.float32)
    return model, None, defaults


def graphs_of(model: TwoTowerModel) -> Iterator[Graph]:
    """The files of a model: the context tower, and the denoiser tower or the draft head if it has one."""
    tokens = torch.ones(1, _TRACED, dtype=torch.long, device=model.device)
    prefix = torch.full((1,), _TRACED - 2, device=model.device)
    context = ContextPass(model.context)
    arguments = {"tokens": tokens, "prefix": prefix if model.has_adapters else None}
    yield Graph(CONTEXT, context, arguments, context.names, returns_state=True)
    if model.denoiser is not None:
        assert model.time is not None
        denoiser = DenoiserPass(model.denoiser, model.time, model.spec)
        first = prefix if model.config.denoiser.block_attention == "prefix_causal" else None
        t = torch.ones(1, device=model.device)
        yield Graph(DENOISER, denoiser, {"tokens": tokens, "t": t, "prefix": first}, denoiser.names)
    if model.draft_head is not None:
        yield Graph(DRAFT_HEAD, model.draft_head, {"tokens": tokens[0]})


def description(model: TwoTowerModel, graphs: Sequence[Graph], defaults: GenerationDefaults) -> JsonObject:
    """The contents of passes.json."""
    config, by_file = model.config, {graph.file: graph for graph in graphs}
    choices, ends = config.denoiser, defaults.eos_or(config.eos_token_id)
    denoiser = None
    if model.has_denoiser:
        denoiser = by_file[CONTEXT if model.has_adapters else DENOISER].described()
    own = config.block_size if isinstance(config, GenericTwoTowerConfig) else None
    return {
        "format": FORMAT,
        "twotower": VERSION,
        "context": by_file[CONTEXT].described(),
        "denoiser": denoiser,
        "draft_head": DRAFT_HEAD if DRAFT_HEAD in by_file else None,
        "state": {name: list(shape) for name, shape in empty_shapes(model.spec).items()},
        "longest_pass": _longest_pass(model.spec),
        "vocab_size": model.spec.vocab_size,
        "mask_token_id": config.mask_token if model.has_denoiser else None,
        "eos_token_ids": [] if ends is None else [ends] if isinstance(ends, int) else list(ends),
        "block_size": BLOCK if own is None else own,
        "prediction_shift": choices.prediction_shift,
        "first_from_ar": choices.first_from_ar,
        "adapters": None if choices.adapters is None else choices.adapters.gate,
    }


def _longest_pass(spec: TowerSpec) -> int | None:
    """The most tokens of a pass: Mamba-2 layers read one chunk; None: any number."""
    return None if spec.mamba is None else spec.chunk_size


def write(graph: Graph, path: Path, spec: TowerSpec) -> None:
    """Writes a graph. spec: of the context tower."""
    longest = _longest_pass(spec)
    length = torch.export.Dim("tokens") if longest is None else torch.export.Dim("tokens", max=longest)
    text, shapes = torch.export.Dim("context"), empty_shapes(spec)
    state = [torch.zeros([size or _TRACED + 2 for size in shapes[name]]) for name in graph.state]
    arguments: list[object] = list(graph.arguments.values())
    dynamic: list[object] = [
        {argument.dim() - 1: length} if argument is not None and name == "tokens" else None
        for name, argument in graph.arguments.items()
    ]
    if graph.state:
        arguments.append(state)
        dynamic.append([None if 0 not in shapes[name] else {GROWS: text} for name in graph.state])
    after = [f"next_{name}" for name in graph.state] if graph.returns_state else []
    with torch.no_grad(), without_messages("torch.onnx"):
        torch.onnx.export(
            graph.module.eval(),
            tuple(arguments),
            path,
            dynamo=True,
            input_names=[*graph.inputs, *graph.state],
            output_names=["logits", *after],
            dynamic_shapes=tuple(dynamic),
            external_data=False,
            verbose=False,
        )
