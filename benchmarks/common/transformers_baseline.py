"""transformers' `NemotronHForCausalLM` with a context tower's weights: the baseline of AR, and a reference in tests."""

from __future__ import annotations

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from twotower import TwoTowerForCausalLM


def transformers_baseline(model: TwoTowerForCausalLM) -> NemotronHForCausalLM:
    """Copies every weight of the tower into transformers' model; all other choices are transformers' own."""
    config = model.config.to_dict()
    names = NemotronHConfig().to_dict().keys() - {"architectures", "dtype", "layer_types", "layers_block_type"}
    kept = {name: value for name, value in config.items() if name in names}
    hf_config = NemotronHConfig(hybrid_override_pattern=config["hybrid_override_pattern"], **kept)
    if model.dtype == torch.float64:
        hf_config._experts_implementation = "eager"  # transformers' grouped matmul does not support float64
    hf = NemotronHForCausalLM(hf_config)
    weights = {
        "lm_head.weight" if name == "head.weight" else f"model.{name}": tensor.detach()
        for name, tensor in model.context.state_dict().items()
    }
    hf.load_state_dict(weights, strict=True)
    return hf.to(device=model.device, dtype=model.dtype).eval()
