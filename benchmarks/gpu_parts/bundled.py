"""Part 3: the bundled models: graphs on and off, scheduling ahead and waiting, verified as AR in fp32."""

from __future__ import annotations

import time
from typing import Any

import torch

from gpu_parts.choices import chosen
from gpu_parts.record import Figures, Record
from gpu_parts.setting import Setting, release
from twotower import LLM, GenerationParams, Request, TwoTowerForCausalLM, bundled_model, model_loading
from twotower.evaluation.workloads import few_shot_prompts

Texts = list[list[int]]
DIFFUSION = {"mode": "diffusion", "confidence_threshold": 0.8}


def run(setting: Setting, record: Record) -> None:
    for name in ("small", "adapters"):
        for dtype in ("float32",) if setting.small else ("float32", "bfloat16"):
            model = model_loading.load_model(bundled_model(name), dtype=dtype, context_device=str(setting.device))
            measure(setting, record, model, name, dtype)
            release(model)


def measure(setting: Setting, record: Record, model: TwoTowerForCausalLM, name: str, dtype: str) -> None:
    """Texts and speed of one model, and whether texts that must be equal are."""
    title = f"{name}, {dtype}"
    texts, tokens = (2, 8) if setting.small else (16, 64)
    prompts = few_shot_prompts(model, texts, 32 if setting.small else 48)
    written: dict[str, Texts] = {}

    def write(what: str, like: str | None, ahead: bool | None = None, **params: Any) -> None:
        record.measure(f"{title}: {what}", lambda: figures(what, like, ahead, params))

    def figures(what: str, like: str | None, ahead: bool | None, params: dict[str, Any]) -> Figures:
        engine = LLM(model, rows=texts, length=len(prompts[0]) + tokens + 32, block_size=16)
        if ahead is not None:
            engine.core.async_scheduling = ahead
        rounds = 1 if setting.small else 3
        for _ in range(rounds):
            seconds, written[what] = generated(engine, prompts, tokens, params)
        found: Figures = {"tokens/s": sum(map(len, written[what])) / seconds}
        if like is not None:
            if like not in written:
                return found | {"note": f"nothing to compare with: {like} failed"}
            found[f"texts as {like}"] = same(written[what], written[like])
        return found

    write("AR", None, mode="ar")
    write("AR, waiting", "AR", ahead=False, mode="ar")
    write("verified", "AR", mode="verified", draft_steps=1)
    write("diffusion", None, **DIFFUSION)
    write("diffusion, waiting", "diffusion", ahead=False, **DIFFUSION)
    if not setting.small or name == "small":
        write("diffusion, again", "diffusion", **DIFFUSION)
        with chosen(model, {"graphs": False}):
            write("AR, without graphs", "AR", mode="ar")
            write("diffusion, without graphs", "diffusion", **DIFFUSION)
    if dtype == "float32" and (setting.small or setting.cuda) and name == "small":
        on_cpu = TwoTowerForCausalLM.from_pretrained(bundled_model(name), dtype=dtype)
        few, short = prompts[:4], tokens // 2
        engine = LLM(on_cpu, rows=len(few), length=len(prompts[0]) + tokens + 32, block_size=16)
        there = generated(engine, few, short, {"mode": "ar"})[1]
        here = [one[:short] for one in written.get("AR", [])[: len(few)]]
        record.add(f"{title}: AR on the CPU", **{"texts as AR": same(there, here)})


def generated(engine: LLM, prompts: Texts, tokens: int, params: dict[str, Any]) -> tuple[float, Texts]:
    """Seconds, and the tokens of each text."""
    asked = GenerationParams.of(
        max_new_tokens=tokens, mask_token_id=engine.model.config.mask_token, seed=0, **params
    )  # fmt: skip
    started = time.perf_counter()
    with torch.no_grad():
        outputs = list(engine.generate([Request(prompt, asked) for prompt in prompts]))
    return time.perf_counter() - started, [output.tokens for output in outputs]


def same(ones: Texts, others: Texts) -> str:
    """How many texts are equal."""
    return f"{sum(a == b for a, b in zip(ones, others, strict=False))} of {max(len(ones), len(others))}"
