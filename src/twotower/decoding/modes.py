"""Names of the generation modes, without torch, so that the command line starts fast."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["diffusion", "ar", "mock_ar", "verified"]  # modes that generate tokens
MODES: tuple[str, ...] = get_args(Mode)
AUTO = "auto"  # chooses one of MODES for each request
REQUEST_MODES = (*MODES, AUTO)
BLOCK_MODES = ("diffusion", "verified", AUTO)  # the denoiser fills blocks of mask tokens

CONSTRAINT_MODES = ("ar", "verified")  # the AR model chooses every token, so a grammar can be followed

# The modes in which a field of a request has an effect.
MODES_OF_FIELD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("threshold", "policy", "policy_value", "block_size"), BLOCK_MODES),
    "steps": ("diffusion", AUTO),
    **dict.fromkeys(("draft_steps", "acceptance"), ("verified", AUTO)),
    "denoiser": ("diffusion", "verified", "mock_ar", AUTO),
}
# Settings (decoding/presets.py) that are compared with AR by default.
COMPARED_SETTINGS = ("diffusion:0.9", "diffusion:0.95", "verified:draft_steps=1")
