"""The generation modes, apart from the code that runs them: the command line needs their names without torch."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["diffusion", "ar", "mock_ar", "verified"]  # what writes a text
MODES: tuple[str, ...] = get_args(Mode)
AUTO = "auto"  # picks one of them for a request
REQUEST_MODES = (*MODES, AUTO)
BLOCK_MODES = ("diffusion", "verified", AUTO)  # those in which the denoiser may fill blocks of masks

CONSTRAINT_MODES = (
    "ar",
    "verified",
)  # those in which the AR model chooses every token, so that a grammar can be kept to

# Which modes a field of a request means something to.
MODES_OF_FIELD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("threshold", "policy", "policy_value", "block_size"), BLOCK_MODES),
    "steps": ("diffusion", AUTO),
    **dict.fromkeys(("draft_steps", "acceptance"), ("verified", AUTO)),
}
# Ways to decode (decoding/presets.py) that are compared with AR unless others are asked for: those of the bundled
# model's card.
COMPARED_SETTINGS = ("diffusion:0.8", "diffusion:0.9", "verified:draft_steps=1")
