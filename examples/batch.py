"""Run many requests at once. Each request has its own mode, length and sampling.

Run: python examples/batch.py
"""

from twotower import LLM, GenerationParams, Request, TwoTowerForCausalLM, bundled_model

model = TwoTowerForCausalLM.from_pretrained(bundled_model(), dtype="float32")
assert model.tokenizer is not None
tokenizer = model.tokenizer
model.pack()  # on a CPU: a second copy of the weights, in a faster layout
llm = LLM(model, rows=8, length=512)  # at most 8 sequences run at once; the others wait


def request(prompt: str, **params: object) -> Request:
    """A request for up to 48 tokens."""
    values = {"max_new_tokens": 48, "eos_token_id": model.config.eos_token_id, "stop": ["\nUser:"], **params}
    return Request(tokenizer(prompt)["input_ids"], GenerationParams.from_mapping(values))


requests = [
    request("User: I need a taxi to the airport.\nAssistant:", mode="ar"),
    request("User: I need a taxi to the airport.\nAssistant:", mode="verified"),
    request("User: Find me a restaurant in San Jose.\nAssistant:", mode="diffusion", confidence_threshold=0.9),
    *(
        request("User: Play a song.\nAssistant:", mode="verified", temperature=0.8, top_p=0.95, seed=seed)
        for seed in range(5)
    ),
]

for number, output in enumerate(llm.generate(requests)):  # in the order of the requests
    print(f"{number} {output.mode:<9} {output.finish_reason:<6} {output.text.strip()!r}")
print(f"{len(requests)} requests took {llm.denoiser_passes} denoising passes; requests share passes")
