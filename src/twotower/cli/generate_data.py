"""`twotower generate-data`: training data that the context tower makes itself."""

from __future__ import annotations

from pathlib import Path

import click

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.cli.batch import bytes_of, memory_option, rows_option, run_with_progress
from twotower.errors import ArgumentError


@click.command(name="generate-data")
@click.argument("model")
@click.option(
    "--prompts",
    required=True,
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSONL file: on each line a JSON object with a "prompt", or with "messages" of a conversation.',
)
@click.option(
    "-o",
    "--out",
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the records. The same command again continues it.",
)
@click.option(
    "-n",
    "--max-new-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Maximum number of tokens of an answer.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0: always the most likely token.",
)
@click.option("--top-k", metavar="N", type=click.IntRange(min=1), help="Sample from the N most likely tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the most likely tokens that together have this probability.",
)
@click.option(
    "--samples",
    metavar="N",
    type=click.IntRange(1, 2**20),
    default=1,
    show_default=True,
    help="Answers to each prompt, with different seeds.",
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0, 2**61),
    default=0,
    show_default=True,
    help="Seed of the file. The seed of an answer depends on it, on the line and on the number of the answer.",
)
@click.option("--prompt-field", default="prompt", show_default=True, help="Field of a line's prompt.")
@click.option("--messages-field", default="messages", show_default=True, help="Field of a line's conversation.")
@click.option(
    "--max-bad-records",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Skip so many lines without a usable prompt; one more is an error.",
)
@rows_option
@memory_option
@models.deterministic_option
@models.dtype_option
@models.quantization_option
@models.threads_option
def generate_data(
    model: str,
    prompts: Path,
    out: Path,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    samples: int,
    seed: int,
    prompt_field: str,
    messages_field: str,
    max_bad_records: int,
    rows: int,
    memory: float | None,
    deterministic: bool,
    dtype: str,
    quantization: str | None,
    threads: int | None,
) -> None:
    """Let a context tower write training data.

    MODEL is a two-tower checkpoint, of which only the context tower is loaded, or an autoregressive model; `bundled` is
    the bundled model. It answers each prompt autoregressively, and each answer is a record for `twotower train`.

    A record repeats the prompt and has the answer as "text", or it repeats the messages with the answer as the last
    turn. A last assistant turn in FILE is replaced; the other fields of a line have no effect. Conversations are
    rendered with the chat template of the tokenizer. A killed job continues with the same command.
    """
    from twotower.engine.generated_data import DataOptions, data_fields, read_prompts
    from twotower.file_lock import exclusive_lock

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "deterministic": deterministic}
    given = {name: value for name, value in sampling.items() if value is not None}
    parameters: dict[str, object] = {"mode": "ar", "max_new_tokens": max_new_tokens, **given}
    DataOptions(parameters=parameters, samples=samples)  # checked before the weights are read
    loaded, source = models.load_text_model(
        None if model == "bundled" else model,
        "prompts cannot be encoded; add a tokenizer",
        towers="context",
        dtype=dtype,
        quantization=quantization,
        threads=threads,
        one_tower=True,
    )
    options = DataOptions(
        parameters=parameters | {"eos_token_id": model_loading.eos_of(loaded)},
        seed=seed,
        samples=samples,
        prompt_field=prompt_field,
        messages_field=messages_field,
        model_name=model_loading.name_of(source),
    )
    lines, bad = read_prompts(prompts, loaded, options)
    if bad:
        what = f"{prompts}: {len(bad)} lines without a usable prompt; the first is line {bad[0].number}: {bad[0].error}"
        if len(bad) > max_bad_records:
            raise ArgumentError(f"{what}; correct them, or raise --max-bad-records, which is {max_bad_records}")
        click.echo(f"Note: {what}", err=True)
    with exclusive_lock(out, out):
        run_with_progress(loaded, lines, out, rows, bytes_of(memory), with_prompt=True, fields=data_fields)
