"""`TwoTowerPredictor`: continues the prompts of a Ray dataset. One model and one engine an actor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import numpy as np

    from twotower.engine.jobs import Line

DEFAULT_LENGTH = 8192  # limit of the default length, as of the server
# Columns of the result of a prompt, with their values for a prompt that cannot be answered.
RESULT: dict[str, object] = {
    "text": "",
    "mode": "",
    "mode_reason": "",
    "finish_reason": "error",
    "prompt_tokens": 0,
    "new_tokens": 0,
    "denoiser_passes": 0,
    "context_passes": 0,
    "tokens_per_pass": 0.0,
    "error": "",
}


class EngineArguments(TypedDict, total=False):
    """Arguments of `TwoTowerPredictor` about the model and its engine."""

    model: str | None
    rows: int
    length: int | None
    block_size: int
    memory: int | None
    dtype: str
    quantization: str | None
    context_device: str | None
    denoiser_device: str | None
    threads: int | None


class TwoTowerPredictor:
    """A class for `ray.data.Dataset.map_batches`, with batches in the format "numpy", Ray's default.

    An actor gets names and numbers, and loads the model itself. A batch has a column of prompts. It may have columns
    with the names of the fields of `twotower batch` (mode, max_new_tokens, temperature, seed, stop, …); a null means
    the predictor's own value. The result has all columns of the batch and those of `RESULT`. A prompt that cannot be
    answered has its "error".

    model: checkpoint directory, which every node needs, hub id or bundled/NAME; None: the bundled model. setting: as
    `twotower batch --setting`. seed: of rows without one. rows: prompts that the engine runs at once; fewer if the
    memory is short. length: tokens of a prompt and its text. block_size: of the longest block. memory: bytes of states.
    dtype: "auto" depends on the node, so texts can; name the dtype if nodes differ. threads: CPU threads.

    Raises:
        TwoTowerError: an argument is wrong, or the model cannot be loaded. Ray reports it from the actor.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        setting: str = "verified",
        max_new_tokens: int = 128,
        seed: int = 0,
        prompt_column: str = "prompt",
        deterministic: bool = False,
        rows: int = 16,
        length: int | None = None,
        block_size: int = 16,
        memory: int | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        context_device: str | None = None,
        denoiser_device: str | None = None,
        threads: int | None = None,
    ) -> None:
        # Imported where the actor runs: what Ray ships is the name of this class.
        from twotower import model_loading
        from twotower.decoding.presets import parse_setting
        from twotower.engine.jobs import longest_prompt
        from twotower.engine.llm import LLM
        from twotower.process import configure_process

        values = parse_setting(setting).values | ({"deterministic": True} if deterministic else {})
        self.prompt_column = prompt_column
        configure_process(threads)
        self.model = model_loading.load_text_model(
            model_loading.source_of(model),
            "prompts cannot be encoded; add a tokenizer",
            dtype=dtype,
            quantization=quantization,
            context_device=context_device,
            denoiser_device=denoiser_device,
        )
        self.longest = longest_prompt(self.model)
        self.shared = model_loading.job_parameters(self.model, values, max_new_tokens, seed)
        window = min(self.model.spec.max_position_embeddings, DEFAULT_LENGTH)
        self.engine = LLM.fitting_length(self.model, length or window, block_size, rows, memory)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, object]:
        """batch: columns of n values → the same columns, and those of the results."""
        import numpy as np

        from twotower.engine.jobs import engine_steps
        from twotower.errors import ArgumentError

        if self.prompt_column not in batch:
            raise ArgumentError(
                f"the dataset has no column {self.prompt_column!r}; its columns are {', '.join(batch)}: give "
                "prompt_column"
            )
        lines = self._lines(batch)
        answers: dict[int, dict[str, object]] = {}
        for step in engine_steps(self.engine, lines):
            answers.update(step.answers)
        rows = [RESULT | answers[place] for place in range(len(lines))]
        results = {name: np.array([row[name] for row in rows], dtype=_dtype(value)) for name, value in RESULT.items()}
        return {**batch, **results}

    def _lines(self, batch: Mapping[str, np.ndarray]) -> list[Line]:
        from twotower.engine.jobs import LINE_FIELDS, Line, request_of
        from twotower.errors import TwoTowerError

        columns = {name: batch[name].tolist() for name in LINE_FIELDS if name in batch}
        lines = []
        for number, prompt in enumerate(batch[self.prompt_column].tolist(), 1):
            given = {name: _value(name, column[number - 1]) for name, column in columns.items()}
            fields = {name: value for name, value in given.items() if value is not None}
            if not isinstance(prompt, str):
                lines.append(Line(number, "", error=f"the prompt is {prompt!r}; give a string"))
                continue
            try:
                request = request_of(prompt, fields, self.model, self.shared, self.longest)
            except (TwoTowerError, UnicodeError) as error:
                lines.append(Line(number, "", error=str(error)))
            else:
                lines.append(Line(number, "", request=request))
        return lines


def _value(name: str, value: object) -> object:
    """A value of a column. A column of whole numbers with nulls has floats and NaN."""
    from twotower.decoding.presets import WHOLE

    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer() and name in (*WHOLE, "max_new_tokens"):
        return int(value)
    return value.tolist() if hasattr(value, "tolist") else value  # a list in a column is an array


def _dtype(value: object) -> str:
    """The dtype of a column, so that batches with errors only have the same one."""
    return {int: "int64", float: "float64"}.get(type(value), "object")
