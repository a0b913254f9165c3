"""`twotower lm-eval`: the command line of lm-evaluation-harness, with `--model twotower`."""

from __future__ import annotations

import sys

import click

from twotower.cli.published_tasks import require_lm_eval
from twotower.process import configure_process


@click.command("lm-eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness with --model twotower.

    \b
    twotower lm-eval run --model twotower --model_args setting=verified --tasks lambada_openai
    twotower lm-eval run --model twotower --model_args pretrained=DIR,setting=diffusion:0.8 --tasks gsm8k_cot --limit 50

    model_args: pretrained, setting, likelihood (context or bound), samples, batch_size, max_length, dtype,
    quantization (int8, int4, or pairs with + between them: experts=int4+rest=int8), device, denoiser_device.
    """
    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    import twotower.evaluation.lm_eval.model  # noqa: F401  registers the model

    configure_process()
    before = sys.argv
    sys.argv = ["twotower lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
