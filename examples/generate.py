"""Generate text with the bundled model in three modes, and compare their passes.

Run: python examples/generate.py ["A prompt"]
"""

import sys

from twotower import GenerationParams, TwoTowerForCausalLM, bundled_model, generate

PROMPT = "User: I want to book a table for two in San Jose.\nAssistant:"
MODES = {
    "ar": "the context tower alone",
    "verified": "the denoiser drafts, the context tower checks",
    "diffusion": "the denoiser fills blocks of masks",
}

prompt = sys.argv[1] if len(sys.argv) > 1 else PROMPT
model = TwoTowerForCausalLM.from_pretrained(bundled_model(), dtype="float32")  # or a directory, or a hub id
model.pack()  # on a CPU: a second copy of the weights, in a faster layout

for mode, description in MODES.items():
    params = GenerationParams.of(mode=mode, max_new_tokens=64, eos_token_id=model.config.eos_token_id)
    (output,) = generate(model, [prompt], params)
    print(f"--- {mode}: {description}")
    print(output.text.strip())
    passes = output.denoiser_passes + output.context_passes
    print(f"    {len(output.tokens) / passes:.2f} tokens per pass, passes of both towers counted")
