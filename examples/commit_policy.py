"""Register a commit policy of your own and compare it with the default policy.

A commit policy decides which masked positions of a block become final after a denoising pass. Adapters that act at
masks commit from the left, so this needs a model with a denoiser tower.
Run: python examples/commit_policy.py
"""

from torch import Tensor

from twotower import GenerationParams, TwoTowerForCausalLM, bundled_model, generate, register_policy
from twotower.decoding.unmasking import Pass, Verdict

PROMPTS = [
    "User: I need a taxi to the airport.\nAssistant:",
    "User: Find me a restaurant in San Jose.\nAssistant:",
]


def pairs(seen: Pass, value: Tensor) -> Verdict:
    """Commit a position if it and its left neighbour are confident. `seen.confidence` is (B, L), `value` (B, 1)."""
    left = seen.confidence.roll(1, dims=1)
    left[:, 0] = 1.0  # the first position of a block follows final text
    return Verdict(sure=seen.confidence * left > value, order=seen.confidence)


register_policy("pairs", pairs, value_meaning="product of two confidences", default=0.7, high=1.0)
model = TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32")
choices: tuple[tuple[str, float], ...] = (("threshold", 0.8), ("pairs", 0.7), ("pairs", 0.5))
for policy, value in choices:
    params = GenerationParams.of(
        mode="diffusion",
        policy=policy,
        policy_value=value,
        max_new_tokens=64,
        eos_token_id=model.config.eos_token_id,
    )
    outputs = generate(model, PROMPTS, params)
    passes = sum(output.denoiser_passes for output in outputs)
    print(f"{policy} {value}: {sum(len(output.tokens) for output in outputs)} tokens in {passes} denoising passes")
