"""Imported before Triton: on a machine without a GPU, Triton kernels run in Triton's interpreter.

There, only tests/ops/test_triton*.py use Triton kernels; for all other tests TWOTOWER_TRITON=0 turns them off.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TWOTOWER_TRITON"] = "0"


@cache
def mend_interpreter() -> None:
    """Patches three faults of Triton 3.6's interpreter.

    Loop bounds that the kernel computes are arrays of one element, which numpy 2.4 does not convert to int. Products of
    bf16 multiply the bits. The language is patched again for each call inside a kernel, which takes half of the time.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def exact_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    prepared = cache(interpreter._patch_lang)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = exact_dot


def compiled(form: str, cache_dir: Path) -> set[str]:
    """The kernels that triton_compile.py compiles for an H100. form: "short" or "full"."""
    import twotower

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = Path(twotower.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_compile.py"), form],
        env=environment | {"TRITON_CACHE_DIR": str(cache_dir), "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {line.split()[0] for line in done.stdout.splitlines()}
