"""The server with a model of several denoisers: requests name one, and the model card lists them."""

from __future__ import annotations

from typing import Any

from serving import serving
from several_denoisers import joined, with_one_each
from test_stopping import TOKENIZER

from twotower import GenerationParams
from twotower.engine.generation import generate

PROMPT = [5, 6, 7]


def test_requests_name_a_denoiser_or_have_that_of_their_mode() -> None:
    made = with_one_each("llama", {"drafter": "masks", "writer": "full"})
    model = joined(made, {"diffusion": "writer"})
    model.tokenizer = TOKENIZER
    with serving(model=model) as served:
        card = served.get("/v1/models").json()["data"][0]
        assert card["denoisers"] == {"drafter": ["verified", "mock_ar", "auto"], "writer": ["diffusion"]}

        def text(**fields: Any) -> str:
            answer = served.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 9, "temperature": 0} | fields)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        def alone(name: str) -> str:
            params = GenerationParams.of(mode="diffusion", max_new_tokens=9, confidence_threshold=0.2, eos_token_id=2)
            made[name].tokenizer = TOKENIZER
            return generate(made[name], [PROMPT], params)[0].text

        fields = {"mode": "diffusion", "threshold": 0.2}
        assert text(**fields) == text(**fields, denoiser="writer") == alone("writer")
        assert text(**fields, denoiser="drafter") == alone("drafter") != alone("writer")
        for wrong, words in (
            (
                {"denoiser": "none", "mode": "verified"},
                "denoiser is 'none'; this model has the denoisers drafter and wr",
            ),
            ({"denoiser": "drafter", "mode": "ar"}, "denoiser has no effect in mode ar"),
            ({"denoiser": 3}, "denoiser"),
        ):
            answer = served.post("/v1/completions", {"prompt": PROMPT} | wrong)
            assert answer.status_code == 400
            assert words in answer.json()["error"]["message"]
            assert answer.json()["error"]["param"] == "denoiser"


def test_a_model_with_one_denoiser_has_no_names() -> None:
    with serving() as served:
        assert served.get("/v1/models").json()["data"][0]["denoisers"] == {}
        answer = served.complete([5, 6], denoiser="drafter", mode="diffusion")
        assert answer.status_code == 400
        assert "this model has one denoiser, without a name" in answer.json()["error"]["message"]
