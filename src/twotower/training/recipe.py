"""Recipes: what the denoiser is trained on, beside the data. Each part is an option of `twotower train`.

| recipe | patterns | targets | weights of positions |
|---|---|---|---|
| draft | draft 0.7, prefix 0.3 | KL 0.7, tokens 0.3 | exp(−(k − 1) / 4) |
| diffusion | prefix 0.4, levels 0.4, complementary 0.2; gated adapters: prefix | KL 0.7, tokens 0.3 | equal |
| both | draft 0.4, prefix 0.25, levels 0.35; gated adapters: draft 0.4, prefix 0.6 | KL 0.7, tokens 0.3 | equal |

In all recipes blocks begin anywhere in an answer, as they do in verified decoding. Without a recipe, a full denoiser is
trained as released (levels, tokens), and adapters as in `both`. Gated adapters decode from the left, so masks between
visible tokens do not occur there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from twotower.errors import ArgumentError
from twotower.training.patterns import ONLY_LEVELS, Patterns
from twotower.training.targets import ONLY_TOKENS, Targets

RecipeName = Literal["draft", "diffusion", "both"]
BlockStarts = Literal["prompt", "anywhere"]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)
TEACHER = "kl:0.7+tokens:0.3"
CLIP = (0.3, 0.8)
DRAFT_DECAY = 4.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is masked, what is predicted, and what counts how much.

    position_decay: D of the weights exp(−(k − 1) / D) of the k-th prediction of a block; 0: equal weights. alignment:
    weight of 1 − cosine of the hidden states of both towers (`alignment`). block_starts: where the blocks of a text
    with a prompt begin: where the prompt ends, or in half of the texts up to a block later.
    """

    patterns: Patterns = ONLY_LEVELS
    targets: Targets = ONLY_TOKENS
    position_decay: float = 0.0
    alignment: float = 0.0
    block_starts: BlockStarts = "prompt"

    def __post_init__(self) -> None:
        for name in ("position_decay", "alignment"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ArgumentError(f"{name} is {getattr(self, name)}; give 0 or more")

    @property
    def teacher(self) -> bool:
        """Whether all layers of the context tower are run, for its logits or hidden states."""
        return self.targets.teacher or self.alignment > 0

    def check_likelihood_bound(self) -> None:
        """Raises ArgumentError if the loss with these choices is no bound on −ln p (`--elbo`)."""
        if not self.patterns.only_levels:
            raise ArgumentError("the likelihood bound (--elbo) is for random levels only; leave out the patterns")
        if self.targets.teacher or self.alignment or self.position_decay:
            raise ArgumentError(
                "the likelihood bound (--elbo) is the likelihood of tokens, with equal weights; leave out AR targets, "
                "the decay of positions and the alignment"
            )


AS_RELEASED = Recipe()


@dataclass(frozen=True, kw_only=True)
class RecipeChoices:
    """What a user chose; None: as the recipe says, or without one the default of the denoiser's kind."""

    recipe: RecipeName | None = None
    patterns: str | None = None
    clip_levels: tuple[float, float] = CLIP
    targets: str | None = None
    position_decay: float | None = None
    alignment: float | None = None
    block_starts: BlockStarts | None = None

    def resolve(self, gated: bool) -> Recipe:
        """The recipe for a denoiser. gated: adapters that act from the first mask of a block on.

        Raises:
            ArgumentError: a choice has no meaning.
        """
        if self.recipe not in (None, *RECIPES):
            raise ArgumentError(f"recipe is {self.recipe!r}; choose one of {', '.join(RECIPES)}")
        name = self.recipe or ("both" if gated else None)
        patterns = self.patterns or _patterns(name, gated)
        targets = self.targets or (TEACHER if name else "tokens")
        decay = self.position_decay
        starts: BlockStarts = self.block_starts or ("anywhere" if name else "prompt")
        return Recipe(
            patterns=Patterns.parse(patterns, self.clip_levels),
            targets=Targets.parse(targets),
            position_decay=decay if decay is not None else DRAFT_DECAY if name == "draft" else 0.0,
            alignment=self.alignment or 0.0,
            block_starts=starts,
        )


AS_USUAL = RecipeChoices()


def _patterns(name: RecipeName | None, gated: bool) -> str:
    match name:
        case None:
            return "levels"
        case "draft":
            return "draft:0.7+prefix:0.3"
        case "diffusion":
            return "prefix" if gated else "prefix:0.4+levels:0.4+complementary:0.2"
        case "both":
            return "draft:0.4+prefix:0.6" if gated else "draft:0.4+prefix:0.25+levels:0.35"


ADAPTER_RECIPE = AS_USUAL.resolve(gated=True)
