"""Operations for tensors without storage that save for backward what the CUDA kernels save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.overrides import TorchFunctionMode

from twotower.model.moe import Experts, MoE
from twotower.model.tower import Tower
from twotower.ops.reference.experts import experts_grouped, experts_sorted
from twotower.specs import TowerSpec


class GroupedExperts(Experts):
    """Routed experts with the grouped backend, as on CUDA in bf16. On the meta device `Experts` uses another one."""

    def forward(self, hidden: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        weights = self.gate_proj if self.gated else None, self.up_proj, self.down_proj
        return experts_grouped(hidden, choice, weight, *weights, self.activation)


class LoopingExperts(Experts):
    """Routed experts that loop, as in training on CUDA in fp32. On the meta device `Experts` uses another backend."""

    def forward(self, hidden: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        weights = self.gate_proj if self.gated else None, self.up_proj, self.down_proj
        return experts_sorted(hidden, choice, weight, *weights, self.activation)


def tower_of_cuda(spec: TowerSpec, dtype: torch.dtype) -> Tower:
    """A tower whose MoE layers compute as on CUDA when they train in this dtype."""
    tower = Tower(spec)
    kind = GroupedExperts if dtype == torch.bfloat16 else LoopingExperts
    for module in tower.modules():
        if isinstance(module, MoE):
            module.experts = kind(module.spec, module.spec.latent or spec.hidden_size)
    return tower


class FusedAttention(TorchFunctionMode):
    """Attention that saves what a fused kernel saves, without the scores of torch's fallback."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v, mask = (part for part in (*args, kwargs["attn_mask"]) if isinstance(part, Tensor))
        return fused_attention(q, k, v, mask)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out, bias = torch.empty_like(q), torch.empty_like(mask, dtype=q.dtype)
        log_sum = torch.empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        ctx.save_for_backward(q, k, v, bias, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        q, k, v, *_ = saved
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


fused_attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _Fused.apply
