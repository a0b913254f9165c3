"""Print text while it is generated, one block at a time.

Run: python examples/stream.py ["A prompt"]
"""

import sys

from twotower import TwoTowerForCausalLM, bundled_model

PROMPT = "User: I need a taxi to the airport.\nAssistant:"

prompt = sys.argv[1] if len(sys.argv) > 1 else PROMPT
model = TwoTowerForCausalLM.from_pretrained(bundled_model(), dtype="float32")
events = model.stream(
    [prompt],
    "diffusion",
    max_new_tokens=96,
    block_size=16,
    confidence_threshold=0.8,  # commit every position whose confidence is higher
    eos_token_id=model.config.eos_token_id,
)

print(prompt, end="")
for event in events:  # one event for each block; a row's last event has its result
    print(event.text, end="", flush=True)
    if event.result is not None:
        result = event.result
        print(f"\n[{result.finish_reason}: {event.block + 1} blocks, {result.denoiser_passes} denoising passes]")
