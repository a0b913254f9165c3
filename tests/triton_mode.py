"""Imported before anything that imports Triton: where there is no GPU, its kernels run through the interpreter.

Only tests/test_triton*.py are to use them there: everything else is told to leave Triton alone.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TWOTOWER_TRITON"] = "0"
