"""`mode="auto"` chooses AR, verified or diffusion for a request, from the cost of passes and recent drafts.

Expected seconds per token of a row:
    AR         c_step
    verified   (k·c_draft + c_check) / (accepted + 1), with the k passes and the accepted tokens of recent rounds
    diffusion  (p·c_draft + c_check) / S, with the p passes of recent blocks of S tokens; before the first block, p is
               estimated from the passes and accepted tokens of recent drafts
Diffusion is a candidate only if AR recently agreed with almost all drafted tokens (`agreement`), because its text is
not AR's. The costs are measured once for each model, batch size and block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from twotower.decoding.modes import Mode
from twotower.decoding.output import Generation

MIN_AGREEMENT = 0.98  # least share of the verified drafted tokens that AR agreed with, for diffusion
EXPLORE_EVERY = 8  # requests: every 8th is verified, to measure drafts again
AVERAGE_WEIGHT = 0.3  # of a new value in the moving averages


@dataclass(frozen=True)
class Costs:
    """Seconds of an AR step, of a denoiser pass over a block, and of a context pass over a block with its head."""

    step: float
    draft: float
    check: float


@dataclass
class MovingAverage:
    """A moving average; None before the first value."""

    value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + AVERAGE_WEIGHT * (value - self.value)


@dataclass
class RecentStats:
    """Moving averages over recent requests.

    kept: accepted drafted tokens a round; passes: denoising passes of a draft; agreement: share of the verified drafted
    tokens that AR agreed with; block_passes: denoising passes a block in diffusion.
    """

    kept: MovingAverage = field(default_factory=MovingAverage)
    passes: MovingAverage = field(default_factory=MovingAverage)
    agreement: MovingAverage = field(default_factory=MovingAverage)
    block_passes: MovingAverage = field(default_factory=MovingAverage)

    def add_outputs(self, outputs: Sequence[Generation], block_size: int) -> None:
        """Adds the outputs of one batch, all of one mode."""
        drafts = sum(out.drafts for out in outputs)
        if drafts:
            kept = sum(out.accepted for out in outputs)
            self.kept.add(kept / drafts)
            self.passes.add(sum(out.denoiser_passes for out in outputs) / drafts)
            self.agreement.add(kept / max(kept + sum(out.rejected for out in outputs), 1))
        finished = [out for out in outputs if out.mode == "diffusion" and out.tokens]
        if finished:
            blocks = sum(-(-len(out.tokens) // block_size) for out in finished)
            self.block_passes.add(sum(out.denoiser_passes for out in finished) / blocks)


@dataclass(frozen=True)
class ModeChoice:
    """A mode, and the reason for it in words."""

    mode: Mode
    reason: str


@dataclass
class ModeChooser:
    """Chooses the mode of each request to one model, and is updated with the outputs of these requests."""

    recent: RecentStats = field(default_factory=RecentStats)
    costs: dict[tuple[int, int], Costs] = field(default_factory=dict)
    requests: int = 0

    def choose(self, costs: Costs, block_size: int) -> ModeChoice:
        """Chooses the mode of the next request."""
        self.requests += 1
        recent = self.recent
        price = f"a pass over {block_size} tokens costs {costs.draft / costs.step:.2f} AR steps"
        if recent.kept.value is None or recent.passes.value is None or recent.agreement.value is None:
            return ModeChoice("verified", f"no draft has been measured yet; {price}")
        if self.requests % EXPLORE_EVERY == 0:
            return ModeChoice("verified", f"every {EXPLORE_EVERY}th request measures drafts again; {price}")
        kept, agreement = recent.kept.value, recent.agreement.value
        seconds: dict[Mode, float] = {
            "ar": costs.step,
            "verified": (recent.passes.value * costs.draft + costs.check) / (kept + 1),
        }
        if agreement >= MIN_AGREEMENT:
            passes = recent.block_passes.value
            if passes is None:  # a draft's passes, scaled to a whole block
                passes = max(recent.passes.value, 1.0) * block_size / (kept + 1)
            seconds["diffusion"] = (passes * costs.draft + costs.check) / block_size
        best = min(seconds, key=lambda mode: seconds[mode])
        gain = ", ".join(f"{mode} {costs.step / each:.2f}×" for mode, each in seconds.items() if mode != "ar")
        without = "" if agreement >= MIN_AGREEMENT else f", too little for diffusion ({MIN_AGREEMENT:.0%})"
        return ModeChoice(
            best,
            f"expected against AR: {gain}; recently {kept:.1f} drafted tokens accepted a round, AR agreed "
            f"with {agreement:.1%} of the verified ones{without}; {price}",
        )
