"""Part 6: the engine on the published shape: AR against diffusion at forced tokens per pass; 1, 8 and 64 rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common.forced_rate import Schedule, forced
from common.models import BLOCK, random_for_masks, random_tokens
from common.request_groups import run_group
from common.times_ar import ROWS

from gpu_parts.choices import AR_STEPS, chosen, sides, title
from gpu_parts.record import Figures, Record
from gpu_parts.setting import Setting, full_model, release
from twotower import LLM, GenerationParams, TwoTowerForCausalLM
from twotower.engine.engine_options import EngineOptions

PER_PASS = (3.0, 1.9, 5.0)  # the most important first
CONTEXT = 64  # tokens of a prompt


@torch.no_grad()
def run(setting: Setting, record: Record) -> None:
    model, form = full_model(setting)
    record.add("the model", note=form.text)
    tokens = (2 if setting.small else 4) * BLOCK
    with forced() as schedule, random_for_masks(model, BLOCK) as counted:
        for rows in (1, 2) if setting.small else ROWS:
            measure_rows(setting, record, Run(model, schedule, counted), rows, tokens)
            release(model)


@dataclass
class Run:
    """What generates texts at forced tokens per pass. ar: AR's tokens a second at these rows, once it is known."""

    model: TwoTowerForCausalLM
    schedule: Schedule
    counted: dict[str, int]
    ar: float | None = None

    def generate(self, engine: LLM, rows: int, params: GenerationParams) -> Figures:
        """Tokens a second, with and without the prefill, after a warm-up, and as a multiple of AR."""
        prompts = random_tokens(self.model, rows, CONTEXT, seed=3).tolist()
        for _ in range(2):
            self.schedule.begin()
            self.counted["passes"] = 0
            group = run_group(engine, prompts, params)
        first = 1 if params.mode == "ar" else BLOCK  # tokens of a row's first event, before which no time counts
        rate = (group.all_tokens - rows * first) / (group.all_seconds - max(group.first))
        found: Figures = {"tokens/s": rate, "with the prefill": group.all_tokens / group.all_seconds}
        if params.mode == "ar":
            self.ar = self.ar or rate  # of the default
            return found
        found["tokens per pass"] = group.all_tokens / max(group.denoiser_passes, 1)
        found["passes launched"] = self.counted["passes"]
        return found | ({} if self.ar is None else {"× AR": rate / self.ar})


def measure_rows(setting: Setting, record: Record, run: Run, rows: int, tokens: int) -> None:
    """AR and each rate of diffusion at one number of rows. All prompts are read in one step, so that rows keep step."""
    shared: Figures = {"max_new_tokens": tokens, "mask_token_id": run.model.config.mask_token, "seed": 0}
    asked = {"AR": GenerationParams.of(mode="ar", **shared)}
    for rate in PER_PASS[: 1 if setting.small else 3]:
        asked[f"{rate:g} a pass"] = GenerationParams.of(
            mode="diffusion", block_size=BLOCK, steps_per_block=BLOCK, policy="forced", policy_value=rate, **shared
        )
    once = EngineOptions(prompt_budget=None, prefix_cache=False)
    engine = LLM(run.model, rows=rows, length=CONTEXT + tokens, block_size=BLOCK, options=once)
    for name, params in asked.items():
        record.measure(f"{rows} rows: {name}", lambda params=params: run.generate(engine, rows, params))
    for side in sides(AR_STEPS):
        with chosen(run.model, side):
            engine = LLM(run.model, rows=rows, length=CONTEXT + tokens, block_size=BLOCK, options=once)
            record.measure(f"{rows} rows: AR, {title(side)}", lambda e=engine: run.generate(e, rows, asked["AR"]))
