"""`twotower batch` continues the prompts of a file; `twotower generate-data` makes training data of them."""

from __future__ import annotations

from pathlib import Path

import click

from twotower import model_loading
from twotower.cli import model_options as models
from twotower.errors import ArgumentError

NO_TOKENIZER = "prompts cannot be encoded; add a tokenizer"

rows_option = click.option(
    "--rows", metavar="N", type=click.IntRange(min=1), default=16, show_default=True, help="Rows of a batch."
)
memory_option = click.option(
    "--memory",
    metavar="GIB",
    type=click.FloatRange(min=0, min_open=True),
    help="Maximum memory for KV caches and Mamba states, in GiB.  [default: enough for --rows rows]",
)


@click.command()
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--out",
    required=True,
    type=models.OUTPUT_FILE,
    help="File for the results, one JSON line for each prompt.",
)
@models.model_option
@click.option(
    "-s",
    "--setting",
    default="verified",
    show_default=True,
    metavar="MODE[:VALUE,NAME=X…]",
    help="Decoding setting of lines that do not name their own, e.g. ar, diffusion:0.8, verified:draft_steps=1.",
)
@click.option(
    "-n",
    "--max-new-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Maximum number of new tokens of lines that do not name their own.",
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0, 2**62),
    default=0,
    show_default=True,
    help="The seed of a line is N plus the number of the line.",
)
@rows_option
@memory_option
@click.option(
    "--with-prompt",
    is_flag=True,
    help="Repeat the prompt in each result. The results are then training data for twotower train.",
)
@models.deterministic_option
@models.dtype_option
@models.quantization_option
@models.threads_option
@click.option(
    "--ray",
    is_flag=True,
    help="Run on a Ray cluster: that of RAY_ADDRESS, else one of this machine. Needs the extra ray.",
)
@click.option(
    "--actors",
    metavar="N",
    type=click.IntRange(min=1),
    help="With --ray: processes that load the model.  [default: one for each GPU, without GPUs one for each node]",
)
def batch(
    prompts: Path,
    out: Path,
    model: str | None,
    setting: str,
    max_new_tokens: int,
    seed: int,
    rows: int,
    memory: float | None,
    with_prompt: bool,
    deterministic: bool,
    dtype: str,
    quantization: str | None,
    threads: int | None,
    ray: bool,
    actors: int | None,
) -> None:
    """Continue every prompt of a JSONL file.

    A line of PROMPTS is a JSON object with a "prompt". It may have an "id", which the result repeats, and parameters:
    mode, max_new_tokens, temperature, top_p, seed, stop and others. If a line cannot be answered, its result has an
    "error". After an interruption, the same command continues. PROMPTS is UTF-8. If no line is answered, the exit
    code is 1.
    """
    from twotower.cli import batch_run
    from twotower.engine.jobs import read_lines
    from twotower.file_lock import exclusive_lock

    if actors is not None and not ray:
        raise ArgumentError(f"--actors is {actors}, and the job runs in this process; add --ray, or leave it out")
    values = models.setting_values(setting, deterministic)
    job: batch_run.Job
    if ray:
        job, loaded, source = batch_run.cluster_job(
            model, NO_TOKENIZER, actors, rows, bytes_of(memory), dtype=dtype, quantization=quantization, threads=threads
        )
    else:
        loaded, source = models.load_text_model(
            model, NO_TOKENIZER, dtype=dtype, quantization=quantization, threads=threads
        )
        job = batch_run.EngineJob(loaded, rows, bytes_of(memory))
    shared = model_loading.job_parameters(loaded, values, max_new_tokens, seed)
    lines = read_lines(prompts, loaded, shared, model_loading.name_of(source))
    with exclusive_lock(out, out):
        batch_run.run_with_progress(job, lines, out, with_prompt=with_prompt)


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
    type=models.OUTPUT_FILE,
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
    from twotower.cli import batch_run
    from twotower.engine.generated_data import DataOptions, data_fields, read_prompts
    from twotower.file_lock import exclusive_lock

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "deterministic": deterministic}
    given = {name: value for name, value in sampling.items() if value is not None}
    parameters: dict[str, object] = {"mode": "ar", "max_new_tokens": max_new_tokens, **given}
    DataOptions(parameters=parameters, samples=samples)  # checked before the weights are read
    loaded, source = models.load_text_model(
        None if model == "bundled" else model,
        NO_TOKENIZER,
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
        job = batch_run.EngineJob(loaded, rows, bytes_of(memory), data_fields)
        batch_run.run_with_progress(job, lines, out, with_prompt=True)


def bytes_of(memory: float | None) -> int | None:
    """The bytes of `--memory`, which is in GiB."""
    return None if memory is None else int(memory * 2**30)
