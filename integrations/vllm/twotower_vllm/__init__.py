"""A plugin of vLLM for two-tower checkpoints.

vLLM decodes them autoregressively with the context tower, in its own class of the backbone. With
`twotower_vllm.proposer.DenoiserProposer` as drafter, the denoiser drafts and vLLM verifies (experimental).
"""

from __future__ import annotations


def register() -> None:
    """Adds the two-tower architectures to vLLM. vLLM calls this in each of its processes.

    It ends the process with one line if vLLM has another version than the supported one.
    """
    import vllm

    from twotower_vllm.exits import refuse
    from twotower_vllm.release import version_refusal

    if (reason := version_refusal(str(vllm.__version__))) is not None:
        refuse(reason)
    from twotower_vllm.registration import add_architectures

    add_architectures()
