"""Runs vLLM in the environment of `make test-vllm`, without HTTP: one model after the other.

stdin has a JSON list of jobs: `model`, `options` of `LLM`, `prompts` (token ids), `new` (tokens of each text). For each
job one line goes to the file of the first argument: the texts, or the error, and the numbers of drafts and accepted
tokens.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process for all models


def import_class(directory: str) -> None:
    """Imports the class of a two-tower checkpoint here. vLLM would start a process to look at each class."""
    import twotower_vllm
    from vllm.model_executor.models.registry import ModelRegistry

    twotower_vllm.register()
    from twotower_vllm import models
    from twotower_vllm.backbone_config import backbone_of, is_two_tower

    with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
        raw = json.load(file)
    if is_two_tower(raw):
        (name,) = backbone_of(raw).architectures or ()
        ModelRegistry.register_model(name, getattr(models, name))


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    import_class(job["model"])
    model = LLM(
        model=job["model"], dtype="float32", enforce_eager=True, disable_log_stats=False,
        **job["options"],
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    counts = {metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in model.get_metrics()}
    drafts = [getattr(counts.get(name), "value", 0) for name in ("drafts", "accepted_tokens")]
    return {"texts": [list(output.outputs[0].token_ids) for output in outputs], "drafts": drafts}


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    with open(sys.argv[1], "w", encoding="utf-8") as answers:
        for job in json.load(sys.stdin):
            try:
                answer = run(job)
            except (Exception, SystemExit) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            cleanup_dist_env_and_memory()
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
