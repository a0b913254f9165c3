"""Experts of Nemotron-H on a CPU, in plain torch: vLLM has no CPU kernel for experts without a gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.config import CacheConfig, ModelConfig, ParallelConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models import nemotron_h

from twotower.ops.reference.routing import Routing, route


class Router(nn.Module):
    """The weight of the router (E, H), and the bias of the selection (E,), in fp32."""

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, hidden))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(experts, dtype=torch.float32))


class Experts(nn.Module):
    """A mixture of experts with the modules of `NemotronHMoE`, computed expert by expert."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: PretrainedConfig, quantization: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        if getattr(config, "moe_latent_size", None) is not None:
            raise NotImplementedError(
                f"moe_latent_size is {config.moe_latent_size}; twotower-vllm has no latent experts on a CPU"
            )
        count = config.n_routed_experts
        self.rule = Routing(
            n_group=config.n_group,
            topk_group=config.topk_group,
            top=config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
            factor=config.routed_scaling_factor,
        )
        self.gate = Router(count, config.hidden_size)

        def mlp(width: int, name: str) -> nn.Module:
            module: nn.Module = nemotron_h.NemotronHMLP(
                config, config.hidden_size, width, quantization, prefix=f"{prefix}.{name}"
            )
            return module

        self.experts = nn.ModuleList(mlp(config.moe_intermediate_size, f"experts.{j}") for j in range(count))
        self.shared_experts = mlp(config.moe_shared_expert_intermediate_size, "shared_experts")
        # vLLM reads these of the last layer with experts.
        self.n_logical_experts = self.n_physical_experts = self.n_local_physical_experts = count
        self.n_routed_experts, self.n_shared_experts, self.n_redundant_experts = count, 1, 0

    def forward(self, x: Tensor) -> Tensor:
        """x (T, H) → (T, H)."""
        chosen, weights = route(x, self.gate.weight, self.gate.e_score_correction_bias, self.rule)
        out: Tensor = self.shared_experts(x)
        for j, expert in enumerate(self.experts):
            rows, place = (chosen == j).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, place, None].to(x.dtype))
        return out


class ExpertsLayer(nemotron_h.NemotronHMoEDecoderLayer):
    """A layer of Nemotron-H with `Experts`."""

    def __init__(
        self,
        config: PretrainedConfig,
        layer_idx: int,
        model_config: ModelConfig | None = None,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        parallel_config: ParallelConfig | None = None,
        prefix: str = "",
    ) -> None:
        nn.Module.__init__(self)  # not vLLM's, which makes its own experts
        self.config = config
        self.mixer = Experts(config, quant_config, f"{prefix}.mixer")
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)


def install() -> None:
    """Lets Nemotron-H models of this process use this layer."""
    nemotron_h.ALL_DECODER_LAYER_TYPES["E"] = ExpertsLayer
