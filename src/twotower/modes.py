"""The generation modes, apart from the code that runs them: the command line needs their names without torch."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["diffusion", "ar", "mock_ar", "verified"]
MODES: tuple[str, ...] = get_args(Mode)
BLOCK_MODES = ("diffusion", "verified")  # those in which the denoiser fills blocks of masks
