"""The on-policy stages of a run, from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from twotower.decoding.block_rule import BlockRule
from twotower.decoding.params import GenerationParams
from twotower.decoding.presets import parse_setting
from twotower.errors import ArgumentError
from twotower.modeling_twotower import TwoTowerForCausalLM
from twotower.training.data import Encoder
from twotower.training.fsdp import World
from twotower.training.on_policy.stage import OnPolicy, OnPolicyOptions
from twotower.training.run_settings import DenoiserSettings, OnPolicySettings
from twotower.training.validation.samples import unsharded


def on_policy_stages(
    model: TwoTowerForCausalLM,
    objective: nn.Module,
    settings: DenoiserSettings,
    encoder: Encoder,
    eos_token_id: int | Sequence[int],
    shift: int,
    directory: Path,
    world: World,
) -> OnPolicy:
    """eos_token_id: the tokens that end a rollout. shift: of the predictions.

    Raises:
        ArgumentError: the model cannot decode in this setting, or its states cannot be trained.
    """
    own = settings.on_policy
    assert own is not None
    params = _params(model, own, settings.stages[-1].block_size, eos_token_id)
    room = model.spec.max_position_embeddings - own.tokens
    if room < 1 or own.tokens >= settings.row_length:
        raise ArgumentError(
            f"on_policy_tokens is {own.tokens}, which leaves no room for a prompt in rows of {settings.row_length} "
            "tokens; give fewer"
        )
    options = OnPolicyOptions(
        every=own.every,
        prompts=own.prompts,
        rows=own.rows,
        replay=own.replay,
        params=params,
        row_length=settings.row_length,
        shift=shift,
        seed=settings.seed,
        eos=encoder.eos_token_id,
        pad=encoder.pad_token_id,
    )
    return OnPolicy(model, lambda: unsharded(objective.modules()), options, directory, world)


def _params(
    model: TwoTowerForCausalLM, own: OnPolicySettings, block_size: int, eos_token_id: int | Sequence[int]
) -> GenerationParams:
    rule = BlockRule.of(model.config.denoiser)
    values = parse_setting(own.setting or ("verified" if rule.one_pass else "diffusion:0.9")).values
    if values["mode"] not in ("verified", "diffusion"):
        raise ArgumentError(f"on_policy_setting is {own.setting!r}; the mode must be verified or diffusion")
    if values["mode"] == "verified":
        values = {"draft_steps": 1} | values  # the adaptive depth depends on measured times
        if not values["draft_steps"]:
            raise ArgumentError(f"on_policy_setting is {own.setting!r}, which drafts nothing; give draft_steps=1")
    given = {
        "block_size": block_size,
        "max_new_tokens": own.tokens,
        "mask_token_id": model.config.mask_token,
        "eos_token_id": eos_token_id,
        "deterministic": True,  # widths of drafts must not depend on measured times
    }
    if values.get("block_size", block_size) != block_size:
        raise ArgumentError(f"on_policy_setting is {own.setting!r}; its block size is that of training, {block_size}")
    params = GenerationParams.from_mapping({**values, **given})
    if not rule.predictions(block_size, params.mode):
        raise ArgumentError(
            f"a block of {block_size} has no open prediction in mode {params.mode}; give --block-size 2 or more"
        )
    params.check_against(model.spec, [1])
    return params
