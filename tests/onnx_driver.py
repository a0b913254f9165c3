"""`examples/onnx/decode.py` as a module, and its passes over a model's own modules in place of onnxruntime."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from twotower import TwoTowerForCausalLM
from twotower.checkpoint.generation_config import GenerationDefaults
from twotower.checkpoint.onnx_export.export import Graph, description, graphs_of

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "onnx" / "decode.py"


def load_driver() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("onnx_decode", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and annotations look there
    spec.loader.exec_module(module)
    return module


class EagerSession:
    """An `InferenceSession` that calls the module of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def run(self, names: None, feeds: dict[str, Any]) -> list[Any]:
        graph, given = self.graph, {name: torch.from_numpy(values) for name, values in feeds.items()}
        dtype = next(graph.module.parameters()).dtype
        given = {name: values.to(dtype) if values.is_floating_point() else values for name, values in given.items()}
        assert given.keys() == {*graph.inputs, *graph.state}
        state = [[given[name] for name in graph.state]] if graph.state else []
        with torch.no_grad():
            out = graph.module(*(given.get(name) for name in graph.arguments), *state)
        return [part.numpy() for part in (out if isinstance(out, tuple) else (out,))]


def eager_passes(driver: ModuleType, model: TwoTowerForCausalLM) -> Any:
    """The driver's passes over a model in memory."""
    graphs = list(graphs_of(model))
    values = json.loads(json.dumps(description(model, graphs, GenerationDefaults())))
    return driver.Passes(values | {"eos_token_ids": []}, {graph.file: EagerSession(graph) for graph in graphs})
