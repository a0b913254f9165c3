"""`mode="auto"`: AR, verified or diffusion for a request, from what passes cost here and what drafts were worth lately.

Seconds a token, expected of a row:
    AR         c_step
    verified   (k·c_draft + c_check) / (kept + 1), with the k passes and the kept tokens of recent rounds
    diffusion  (p·c_draft + c_check) / S, with the p passes of recent blocks of S; not yet known: as many as a draft
               would have taken whose tokens AR agrees with as often as lately
Diffusion is in the running only where AR lately agreed with almost all that was drafted (`agreement`): there, checking
buys little; elsewhere the text would not be AR's. Costs are measured once for a model, batch size and block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from twotower.decoding.modes import Mode
from twotower.decoding.output import Generation

MIN_AGREEMENT = 0.98  # of drafted tokens that AR looked at
EXPLORE_EVERY = 8  # requests: what was not chosen meanwhile may have become better
AVERAGE_WEIGHT = 0.3  # of the moving averages


@dataclass(frozen=True)
class Costs:
    """Seconds of a pass: an AR step, the denoiser's over a block, the context tower's over a block with its head."""

    step: float
    draft: float
    check: float


@dataclass
class MovingAverage:
    """A moving average; None before its first value."""

    value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + AVERAGE_WEIGHT * (value - self.value)


@dataclass
class RecentStats:
    """What texts lately were like: drafted tokens kept a round, the passes of its draft, the share of looked-at drafted
    tokens that AR agreed with, denoiser passes a block in diffusion."""

    kept: MovingAverage = field(default_factory=MovingAverage)
    passes: MovingAverage = field(default_factory=MovingAverage)
    agreement: MovingAverage = field(default_factory=MovingAverage)
    block_passes: MovingAverage = field(default_factory=MovingAverage)

    def add_outputs(self, outputs: Sequence[Generation], block_size: int) -> None:
        """From the outputs of one batch, all of one mode."""
        drafts = sum(out.drafts for out in outputs)
        if drafts:
            kept = sum(out.accepted for out in outputs)
            self.kept.add(kept / drafts)
            self.passes.add(sum(out.denoiser_passes for out in outputs) / drafts)
            self.agreement.add(kept / max(kept + sum(out.rejected for out in outputs), 1))
        whole = [out for out in outputs if out.mode == "diffusion" and out.tokens]
        if whole:
            blocks = sum(-(-len(out.tokens) // block_size) for out in whole)
            self.block_passes.add(sum(out.denoiser_passes for out in whole) / blocks)


@dataclass(frozen=True)
class ModeChoice:
    """A mode, and the reason for it in words."""

    mode: Mode
    reason: str


@dataclass
class ModeChooser:
    """Chooses for one model, and learns from everything it writes in this mode."""

    recent: RecentStats = field(default_factory=RecentStats)
    costs: dict[tuple[int, int], Costs] = field(default_factory=dict)
    requests: int = 0

    def choose(self, costs: Costs, block_size: int) -> ModeChoice:
        """For the next request."""
        self.requests += 1
        recent = self.recent
        price = f"a pass over {block_size} tokens costs {costs.draft / costs.step:.2f} AR steps"
        if recent.kept.value is None or recent.passes.value is None or recent.agreement.value is None:
            return ModeChoice("verified", f"nothing is known yet of what drafts are worth; {price}")
        if self.requests % EXPLORE_EVERY == 0:
            return ModeChoice(
                "verified", f"every {EXPLORE_EVERY}th request looks again at what drafts are worth; {price}"
            )
        kept, agreement = recent.kept.value, recent.agreement.value
        seconds: dict[Mode, float] = {
            "ar": costs.step,
            "verified": (recent.passes.value * costs.draft + costs.check) / (kept + 1),
        }
        if agreement >= MIN_AGREEMENT:
            passes = recent.block_passes.value
            if passes is None:  # a draft's passes for its kept tokens, up to a whole block
                passes = max(recent.passes.value, 1.0) * block_size / (kept + 1)
            seconds["diffusion"] = (passes * costs.draft + costs.check) / block_size
        best = min(seconds, key=lambda mode: seconds[mode])
        gain = ", ".join(f"{mode} {costs.step / each:.2f}×" for mode, each in seconds.items() if mode != "ar")
        without = "" if agreement >= MIN_AGREEMENT else f", too little for diffusion ({MIN_AGREEMENT:.0%})"
        return ModeChoice(
            best,
            f"expected against AR: {gain}; lately {kept:.1f} drafted tokens kept a round, AR agreed with "
            f"{agreement:.1%} of what it looked at{without}; {price}",
        )
