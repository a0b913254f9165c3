"""`load_model`: finds a model by name, loads it, and places it on devices.

The command line, evaluation and the server share this module. Its import does not load torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from twotower import assets, process
from twotower.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from twotower.engine.towers import Towers
    from twotower.model.towers import TowerSet
    from twotower.modeling_twotower import TwoTowerForCausalLM

# On a CPU, dtype "auto" computes in fp32 for a bf16 model with fewer parameters: verified decoding is then exact.
FP32_BELOW = 500_000_000
FP32_SHARE = 0.5  # of the free memory: fp32 weights under dtype "auto" may take this much
BUNDLED_PREFIX = "bundled/"
DTYPES = ("auto", "bfloat16", "float32", "float64")


def source_of(model: Path | str | None) -> Path | str:
    """The given model, or the directory of a bundled model: `bundled/NAME`, or without a model the default one.

    Raises:
        CheckpointError: this installation has no such bundled model.
    """
    if isinstance(model, str) and model.startswith(BUNDLED_PREFIX):
        name = model.removeprefix(BUNDLED_PREFIX)
        if name not in assets.bundled_names():
            known = ", ".join(BUNDLED_PREFIX + name for name in assets.bundled_names()) or "none"
            raise CheckpointError(f"{model}: no such bundled model; there are {known}")
        return assets.bundled_model(name)
    if model is not None:
        return model
    bundled = assets.bundled_model()
    if not bundled.is_dir():
        raise CheckpointError("this installation has no bundled model; give a checkpoint directory or a hub id")
    return bundled


def name_of(source: Path | str) -> str:
    """The name of a model for output."""
    return BUNDLED_PREFIX + Path(source).name if Path(source).parent == assets.FOLDER else str(source)


def name_on_nodes(source: Path | str) -> str:
    """The model as every node of a cluster finds it: bundled/NAME, an absolute path, or a hub id."""
    name = name_of(source)
    return str(Path(name).absolute()) if Path(name).exists() else name


def load_text_model(
    source: Path | str,
    consequence: str,
    *,
    towers: TowerSet = "both",
    dtype: str = "auto",
    quantization: str | None = None,
    context_device: str | None = None,
    denoiser_device: str | None = None,
    one_tower: bool = False,
) -> TwoTowerForCausalLM:
    """Loads a model that has a tokenizer; see `load_model`.

    consequence: ends the error message for a model without a tokenizer ("…, so CONSEQUENCE").

    Raises:
        TwoTowerError: as `load_model`, or the model has no tokenizer.
    """
    model = load_model(
        source,
        towers=towers,
        dtype=dtype,
        quantization=quantization,
        context_device=context_device,
        denoiser_device=denoiser_device,
        one_tower=one_tower,
    )
    need_tokenizer(model, source, consequence)
    return model


def without_weights(source: Path | str) -> TwoTowerForCausalLM:
    """The model of a two-tower checkpoint on the meta device: config, tokenizer and defaults, for checks of requests.

    Of a hub id, no weights are downloaded.

    Raises:
        TwoTowerError: the checkpoint is missing or its config is not valid.
    """
    import torch

    from twotower.checkpoint.generation_config import GenerationDefaults
    from twotower.checkpoint.source import resolve_source
    from twotower.config import TwoTowerConfig, errors_of
    from twotower.modeling_twotower import TwoTowerForCausalLM

    directory = resolve_source(source, {}, weights=False)
    config = TwoTowerConfig.read(directory)
    with torch.device("meta"), errors_of(directory):
        model = TwoTowerForCausalLM(config)
    model.tokenizer_source, model.generation_defaults = directory, GenerationDefaults.read(directory, config.vocab_size)
    return model


def check_source(source: Path | str) -> None:
    """Checks, without weights, that a checkpoint of either kind can be found from this machine.

    Raises:
        CheckpointError: there is no such directory or file, or the hub has no such model.
    """
    from twotower.checkpoint.source import resolve_source

    if not Path(source).is_file():  # a GGUF file, or an error when it is read
        resolve_source(source, {}, weights=False)


def same_dtype(model: TwoTowerForCausalLM, dtype: str, on_cpu: bool) -> str:
    """The dtype that "auto" means on every machine of a cluster, whatever memory is free there.

    model: may be one without weights. on_cpu: whether a tower is on a CPU.
    """
    stored = str(getattr(model.config, "dtype", None) or "float32").removeprefix("torch.")
    if dtype != "auto" or stored not in DTYPES:
        return dtype
    from twotower.checkpoint import names

    size = sum(math.prod(shape) for shape in names.weight_shapes(model).values())
    return "float32" if stored == "bfloat16" and on_cpu and size < FP32_BELOW else stored


def load_model(
    source: Path | str,
    *,
    towers: TowerSet = "both",
    dtype: str = "auto",
    quantization: str | None = None,
    context_device: str | None = None,
    denoiser_device: str | None = None,
    one_tower: bool = False,
) -> TwoTowerForCausalLM:
    """Loads a model for inference. Default device: the first CUDA device, else the CPU.

    dtype "auto": as stored, except that a bf16 model of less than `FP32_BELOW` parameters computes in fp32 on a CPU if
    the fp32 weights take at most half of the free memory. On a CPU, weights are packed if enough memory is free and the
    option `pack` allows it. quantization: a plan for the large matrices, such as "int8" or
    "experts=int4,rest=int8"; None: as stored. one_tower: the source may be the checkpoint of an autoregressive model,
    which becomes the context tower of a model without a denoiser.

    Raises:
        TwoTowerError: a device cannot be used, or the checkpoint is missing or does not match its config.
    """
    import torch

    from twotower.checkpoint import names, one_tower_model
    from twotower.modeling_twotower import TwoTowerForCausalLM
    from twotower.runners import packed_weights

    context = context_device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    devices = {"context device": context, "denoiser device": denoiser_device or context}
    for role, device in devices.items():
        _check_device(role, device)
    if one_tower and one_tower_model.is_one_tower(local := one_tower_model.local_source(source)):
        model = _load_one_tower(local, dtype, context, quantization)
    else:
        model = TwoTowerForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            quantization=quantization,
            towers=towers,
            context_device=devices["context device"],
            denoiser_device=devices["denoiser device"],
        )
    size = sum(math.prod(shape) for shape in names.weight_shapes(model).values())
    if dtype == "auto" and auto_dtype(model.dtype, size, devices.values()) != model.dtype:
        model.float()
        model.config.dtype = model.dtype
    process.fit_threads_to_model(size)
    if packed_weights.packing_unsupported_reason(model) is None:
        model.pack()
    return model


def _load_one_tower(source: Path, dtype: str, device: str, quantization: str | None) -> TwoTowerForCausalLM:
    import torch

    from twotower.checkpoint import one_tower_model
    from twotower.modeling_twotower import TwoTowerForCausalLM

    model, tokenizer, defaults = one_tower_model.load(
        TwoTowerForCausalLM, source, dtype=dtype, device=torch.device(device), quantization=quantization
    )
    model.tokenizer, model.generation_defaults = tokenizer, defaults
    model.eval()
    return model


def auto_dtype(stored: torch.dtype, parameters: int, devices: Iterable[str]) -> torch.dtype:
    """The dtype of computation that "auto" means, for a model of `parameters` stored in `stored`, on `devices`."""
    import torch

    from twotower.system_memory import available_memory

    on_cpu = any(torch.device(device).type == "cpu" for device in devices)
    if stored != torch.bfloat16 or not on_cpu or parameters >= FP32_BELOW:
        return stored
    free = available_memory()
    fits = free is None or parameters * torch.float32.itemsize <= FP32_SHARE * free
    return torch.float32 if fits else stored


def dtype_note(model: TwoTowerForCausalLM, dtype: str) -> str | None:
    """A note for the user if dtype "auto" means bf16, in one line; None otherwise."""
    import torch

    if dtype != "auto" or model.dtype != torch.bfloat16:
        return None
    return (
        "computing in bfloat16: where two tokens are almost equally likely, the text can differ from AR and between "
        "runs; --dtype float32 is exact, --deterministic repeats the same text"
    )


def placement(model: TwoTowerForCausalLM) -> dict[str, object]:
    """The dtype, quantization and devices of a model, for `--json`."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "context_device": str(model.device),
        "denoiser_device": str(model.denoiser_device) if model.denoiser is not None or model.denoisers else None,
    }


def eos_of(model: Towers) -> int | Sequence[int] | None:
    """The EOS token ids of `generation_config.json`, else of `config.json`, else of the tokenizer."""
    eos = model.generation_defaults.eos_or(model.config.eos_token_id)
    return eos if eos is not None else getattr(model.tokenizer, "eos_token_id", None)


def job_parameters(model: Towers, values: Mapping[str, object], max_new_tokens: int, seed: int) -> dict[str, object]:
    """The parameters of the prompts of a job that do not name their own. values: of the decoding setting."""
    ids = {"eos_token_id": eos_of(model), "mask_token_id": model.config.mask_token}
    return {"max_new_tokens": max_new_tokens, **ids, "seed": seed, **values}


def need_tokenizer(model: TwoTowerForCausalLM, source: Path | str, consequence: str) -> None:
    """Raises CheckpointError if the model has no tokenizer; `consequence` says what is not possible."""
    if model.tokenizer is None:
        raise CheckpointError(f"{source}: has no tokenizer.json, so {consequence}")


def _check_device(role: str, device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"the {role} is {device!r}, which this machine cannot use ({reason}); try cpu") from None
