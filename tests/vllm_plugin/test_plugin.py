"""The parts of `integrations/vllm` that need no vLLM: names, configurations, refusals, layouts, drafts, rollback."""

from __future__ import annotations

import importlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build_random_model
from tiny_backbones import hf_config, two_tower
from torch import Tensor
from twotower_vllm import kv_layouts, rollback
from twotower_vllm.architectures import CLASSES, RELEASED, autoregressive_name, class_of, served
from twotower_vllm.backbone_config import SOURCE, backbone_of, is_two_tower, two_tower_config
from twotower_vllm.draft_settings import DRAFTER, DraftSettings
from twotower_vllm.drafter import DenoiserDrafter
from twotower_vllm.release import VERSION, VLLM, version_refusal
from twotower_vllm.verified import VllmSettings, model_refusal, settings_refusal
from twotower_vllm.vllm_states import DraftRow, context_view, mamba_state

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.checkpoint.names import DiskLayout, one_tower_entries, tensor_entries
from twotower.config import GenericTwoTowerConfig, TwoTowerConfig
from twotower.denoiser_fields import AdapterConfig, DenoiserConfig, DraftHeadConfig
from twotower.errors import ArgumentError, ConfigError
from twotower.families import BY_MODEL_TYPE, family_of
from twotower.model.towers import TwoTowerModel
from twotower.named_denoisers import NamedDenoiser
from twotower.specs import AttentionSpec, Mamba2Spec

PACKAGE = Path(__file__).parents[2] / "integrations" / "vllm"


def raw_of(name: str) -> dict[str, Any]:
    """The keys of the config.json of a bundled model."""
    return dict(json.loads((bundled_model(name) / "config.json").read_text()))


# --- the package ----------------------------------------------------------------------------------------------------


def test_the_package() -> None:
    """Its entry point exists, and all of its modules are in the package that is built."""
    made = tomllib.loads((PACKAGE / "pyproject.toml").read_text())
    assert made["project"]["entry-points"]["vllm.general_plugins"] == {"twotower": "twotower_vllm:register"}
    assert callable(importlib.import_module("twotower_vllm").register)
    folders = {str(file.parent.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py")}
    assert folders - {"build"} == set(made["tool"]["setuptools"]["packages"])
    pins = [pin for extra in made["project"]["optional-dependencies"].values() for pin in extra]
    assert all(f">={VLLM},<0.{int(VLLM.split('.')[1]) + 1}" in pin for pin in pins)
    module, _, name = DRAFTER.rpartition(".")
    assert f"class {name}:" in (PACKAGE / f"{module.replace('.', '/')}.py").read_text()


@pytest.mark.parametrize(
    ("version", "fits"), [("0.32.0", True), ("0.32.7+cpu", True), ("0.33.0", False), ("0.3", False)]
)
def test_only_one_minor_version_of_vllm(version: str, fits: bool) -> None:
    reason = version_refusal(version)
    if fits:
        assert reason is None
    else:
        assert reason is not None
        assert f"{version} is installed" in reason
        assert VERSION in reason
        assert f"'vllm=={VLLM}.*'" in reason
        assert "\n" not in reason


# --- names of tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_names_of_tensors(kind: str) -> None:
    """The names of the context tower's tensors are those of the autoregressive checkpoint; others have none."""
    config = GenericTwoTowerConfig(backbone=hf_config(kind).to_dict(), mask_token_id=3)
    with torch.device("meta"):
        model = TwoTowerModel(config)
    names = {entry.disk for entry in tensor_entries(model)}
    found = {autoregressive_name(name, CLASSES[kind]) for name in names}
    root, head = family_of(config).roots[0]
    assert found - {None} == {entry.disk for entry in one_tower_entries(model, DiskLayout(root, head))}
    denoiser = [name for name in names if not name.startswith("context_")]
    assert denoiser
    assert all(autoregressive_name(name, CLASSES[kind]) is None for name in denoiser)


def test_names_of_adapters_and_of_several_denoisers() -> None:
    for name in ("adapters.0.mixer.q_proj.a", "denoisers.writer.denoiser_tower.norm_f.weight", "lm_head.weight"):
        assert autoregressive_name(name, CLASSES["llama"]) is None


def test_every_family_is_served_or_refused() -> None:
    assert set(CLASSES) - {"nemotron_h"} <= set(BY_MODEL_TYPE)
    missing = {name for name in BY_MODEL_TYPE if class_of(name) is None}
    assert missing == {"bamba", "ministral"}
    assert len(served()) == len(CLASSES) + 1


# --- configurations -------------------------------------------------------------------------------------------------


def test_configuration_of_the_released_layout() -> None:
    raw = raw_of("small")
    assert is_two_tower(raw)
    config: Any = backbone_of(raw)
    assert type(config).__name__ == "NemotronHConfig"
    assert config.architectures == [RELEASED]
    # vLLM reads these, and the file has none of them.
    assert (config.mamba_hidden_act, config.mlp_hidden_act, config.n_shared_experts) == ("silu", "relu2", 1)
    assert config.num_hidden_layers == len(raw["hybrid_override_pattern"])
    assert two_tower_config(getattr(config, SOURCE)).to_dict() == TwoTowerConfig.read(bundled_model("small")).to_dict()


def test_configuration_of_adapters() -> None:
    config: Any = backbone_of(raw_of("adapters"))
    assert config.architectures == ["TwoTowerNemotronHForCausalLM"]
    assert config.hidden_size == 256
    assert str(config.dtype).removeprefix("torch.") == "bfloat16"
    assert two_tower_config(getattr(config, SOURCE)).denoiser.adapters == AdapterConfig(32)


def generic(kind: str, **keys: object) -> dict[str, Any]:
    """The config.json of a two-tower checkpoint of a family."""
    config = GenericTwoTowerConfig(backbone=hf_config(kind).to_dict(), mask_token_id=3)
    return {**config.to_dict(), "model_type": "two_tower", **keys}


def test_configuration_of_another_backbone() -> None:
    config: Any = backbone_of(generic("llama"))
    assert config.model_type == "llama"
    assert config.architectures == ["TwoTowerLlamaForCausalLM"]
    assert not is_two_tower(hf_config("llama").to_dict())
    assert not is_two_tower({"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"]})


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (generic("bamba"), "'bamba', which vLLM has no class for"),
        (generic("ministral"), "'ministral', which vLLM has no class for"),
        (generic("llama", quantization_config={"quant_method": "compressed-tensors"}), "serve the original checkpoint"),
        (generic("llama", prediction_shift=7), "prediction_shift is 7"),
        (raw_of("small") | {"time_step_limit": [0.001, 1.0]}, "time_step_limit is [0.001, 1.0]"),
        (raw_of("small") | {"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_configurations(raw: Mapping[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        backbone_of(raw)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


# --- what verified decoding refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (VllmSettings(), None),
        (VllmSettings(attention="FLASH_ATTN", cache_dtype="bfloat16"), None),
        (VllmSettings(devices=2), "it runs on one device, not 2"),
        (VllmSettings(prefix_caching=True), "--no-enable-prefix-caching"),
        (VllmSettings(cache_dtype="fp8_e4m3"), "--kv-cache-dtype is 'fp8_e4m3'"),
        (VllmSettings(quantization="fp8"), "--quantization is 'fp8'"),
        (VllmSettings(lora=True), "--enable-lora"),
        (VllmSettings(attention="FLASHINFER"), "the attention backend is FLASHINFER"),
    ],
)
def test_refused_settings(settings: VllmSettings, named: str | None) -> None:
    reason = settings_refusal(settings, two_tower_config(raw_of("small")), DraftSettings())
    if named is None:
        assert reason is None
    else:
        assert reason is not None
        assert named in reason


VERIFIED = {
    "llama", "qwen2", "qwen3", "smollm3", "phi3", "gemma", "olmo2", "granite", "glm4", "mixtral", "qwen2_moe",
    "qwen3_moe", "olmoe", "nemotron_h",
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
def test_backbones_of_verified_decoding(kind: str) -> None:
    """Attention without windows and Nemotron-H are supported; another backbone is refused by the name of a layer."""
    options = {"use_sliding_window": False} if kind == "qwen2" else {}
    backbone = hf_config(kind).to_dict() | options
    if kind == "qwen2":
        backbone["layer_types"] = ["full_attention"] * backbone["num_hidden_layers"]
    config = GenericTwoTowerConfig(backbone=backbone, mask_token_id=3)
    reason = model_refusal(config, DraftSettings())
    assert (reason is None) == (kind in VERIFIED), reason
    if reason is not None:
        assert kind in reason
        assert any(word in reason for word in ("sliding windows", "Mamba-2", "gated DeltaNet"))


def test_denoisers_of_verified_decoding() -> None:
    """Every kind of denoiser drafts. Adapters gated to masks draft in one pass."""
    backbone = hf_config("nemotron_h").to_dict()
    kinds = [
        DenoiserConfig(), DenoiserConfig(prediction_shift=1), DenoiserConfig(first_from_ar=True),
        DenoiserConfig(block_attention="prefix_causal"), DenoiserConfig(denoiser_layers=(0, 2, 3)),
        DenoiserConfig.with_adapters(4, "everywhere"),
    ]  # fmt: skip
    for choices in kinds:
        config = GenericTwoTowerConfig(backbone=backbone, mask_token_id=3, **choices.to_json())
        assert model_refusal(config, DraftSettings(draft_passes=2)) is None
    gated = GenericTwoTowerConfig(backbone=backbone, mask_token_id=3, **DenoiserConfig.with_adapters(4).to_json())
    assert model_refusal(gated, DraftSettings()) is None
    assert "draft_passes is 2, and adapters gated to masks" in str(model_refusal(gated, DraftSettings(draft_passes=2)))
    several = GenericTwoTowerConfig(
        backbone=backbone,
        mask_token_id=3,
        denoisers={"drafter": NamedDenoiser(DenoiserConfig.with_adapters(4)).to_json(), "writer": {}},
        denoiser_for={"diffusion": "writer", "verified": "drafter", "mock_ar": "writer"},
        format=2,
    )
    assert "draft_passes is 2" in str(model_refusal(several, DraftSettings(draft_passes=2)))


def test_longrope_is_refused() -> None:
    config = GenericTwoTowerConfig(backbone=hf_config("phi3:longrope").to_dict(), mask_token_id=3)
    assert "has LongRoPE" in str(model_refusal(config, DraftSettings()))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"draft_passes": 0}, "draft_passes is 0"),
        ({"draft_passes": True}, "draft_passes is True"),
        ({"draft_passes": 17}, "from 1 to 16"),
        ({"threshold": 2}, "threshold is 2"),
        ({"passes": 1}, "its keys are draft_passes, threshold"),
        (3, "its keys are draft_passes, threshold"),
    ],
)
def test_refused_settings_of_the_drafter(given: object, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        DraftSettings.of({"twotower": given})
    assert DraftSettings.of({}) == DraftSettings.of({"twotower": {}}) == DraftSettings()
    assert DraftSettings.of({"twotower": {"draft_passes": 2}}).draft_passes == 2


# --- vLLM's caches --------------------------------------------------------------------------------------------------


class Layer:
    """A layer of vLLM: its cache."""

    def __init__(self, cache: Tensor | tuple[Tensor, Tensor]) -> None:
        self.kv_cache = cache


def blocks_of(k: Tensor, v: Tensor, size: int, name: str) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, T, D) as vLLM keeps them: blocks (blocks, H, N, 2·D), in a random order, and the table."""
    rows, _, tokens, _ = k.shape
    each = -(-tokens // size)
    padded = (
        F.pad(part, (0, 0, 0, each * size - tokens), value=torch.nan).unflatten(2, (each, size)) for part in (k, v)
    )
    keys, values = (part.transpose(1, 2).flatten(0, 1) for part in padded)  # (blocks, H, N, D)
    if name == "CPU_ATTN":  # as `CPUAttentionBackendImpl` views a block: keys as (D, N), then values as (N, D)
        own = torch.cat([keys.transpose(-1, -2).flatten(-2), values.flatten(-2)], -1).unflatten(-1, (size, -1))
    else:
        own = torch.cat([keys, values], -1)
    order = torch.randperm(len(own))
    cache = torch.full((len(own) + 3, *own.shape[1:]), torch.nan)
    cache[order + 2] = own
    return cache, (order + 2).view(rows, each)


@pytest.mark.parametrize("name", kv_layouts.LAYOUTS)
def test_states_in_vllms_caches(name: str) -> None:
    """A denoiser pass over the states in vLLM's layout equals the pass over those of the engine."""
    model = build_random_model("M*E-M", head_dim=16)
    tokens, lengths = torch.randint(4, 64, (2, 45)), torch.tensor([45, 31])
    state = model.new_state(2, 64)
    layers: dict[str, Layer] = {}
    tables: dict[str, Tensor] = {}
    with torch.inference_mode():
        model.prefill(tokens, lengths, state)
        own = state.view()
        for number, (layer, cache) in enumerate(zip(model.spec.layers, own.past, strict=True)):
            path = f"model.layers.{number}.mixer"
            if isinstance(layer.mixer, AttentionSpec):
                k, v, _ = cache.dense(layer.mixer.num_kv_heads)  # type: ignore[union-attr]
                path += ".attn"
                memory, tables[path] = blocks_of(k[:, :, :45], v[:, :, :45], 16, name)
                layers[path] = Layer(memory)
            elif isinstance(layer.mixer, Mamba2Spec):
                layers[path], tables[path] = mamba_layer(cache)
        rows = [DraftRow(0, 45, 2), DraftRow(1, 31, 0)]
        view = context_view(model.spec, layers, tables, rows, kv_layouts.LAYOUTS[name], dim_first=False)
        block = torch.randint(4, 64, (2, 6))
        t = torch.tensor([0.5, 0.5])
        expected, found = model.denoise(block, t, own), model.denoise(block, t, view)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def mamba_layer(cache: Any) -> tuple[Layer, Tensor]:
    """States of two rows as vLLM keeps them, after steps of 4 tokens. Row 0 kept 2 drafted tokens, row 1 none."""
    window, state = cache.conv_window, cache.ssm_state
    windows = torch.full((9, window.shape[1] + 3, window.shape[2]), torch.nan)  # (slots, W, C)
    states = torch.full((9, *state.shape[1:]), torch.nan)
    table = torch.tensor([[4, 1, 7, 2], [8, 3, 5, 6]])
    for row, accepted in enumerate((2, 0)):
        windows[table[row, 0], accepted : accepted + window.shape[1]] = window[row]
        states[table[row, accepted]] = state[row]
    return Layer((windows, states)), table


def test_the_window_of_a_row_without_drafts() -> None:
    windows, states = torch.arange(24.0).view(2, 3, 4), torch.arange(2.0).view(2, 1, 1, 1)
    found = mamba_state(windows, states, torch.tensor([[1]]), [0], 3)
    assert found.conv_window.tolist() == [[[12, 16, 20], [13, 17, 21]]]
    assert found.ssm_state.tolist() == [[[[1]]]]


# --- drafts ---------------------------------------------------------------------------------------------------------


def denoiser_model(choices: DenoiserConfig, draft_rank: int | None = None) -> TwoTowerForCausalLM:
    return two_tower("nemotron_h", denoiser=choices, draft_rank=draft_rank)


@torch.inference_mode()
def draft(model: TwoTowerForCausalLM, prompts: Tensor, length: int, passes: int = 1) -> Tensor:
    """Drafts after prompts (B, S), whose last token is pending."""
    state = model.new_state(len(prompts), 64)
    model.prefill(prompts[:, :-1], torch.full((len(prompts),), prompts.shape[1] - 1), state)
    drafter = DenoiserDrafter(model, length, DraftSettings(draft_passes=passes))
    return drafter.draft(prompts[:, -1], state.view())


@pytest.mark.parametrize("shift", [0, 1])
def test_a_draft_of_one_pass(shift: int) -> None:
    """The best tokens of one pass over the pending token and masks."""
    model = denoiser_model(DenoiserConfig(prediction_shift=shift))
    prompts = torch.randint(4, 140, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        state = model.new_state(2, 64)
        model.prefill(prompts[:, :-1], torch.tensor([19, 19]), state)
        block = torch.full((2, 6), 3)
        block[:, 0] = prompts[:, -1]
        t = torch.full((2,), 5 / (6 - shift))
        logits = model.denoise(block, t, state.view())
        logits[..., 3] = -torch.inf
    expected = logits.argmax(-1)[:, 1 - shift : 6 - shift]
    assert torch.equal(draft(model, prompts, 5), expected)
    several = draft(model, prompts, 5, passes=3)
    assert several.shape == (2, 5)
    assert not (several == 3).any()
    assert not torch.equal(several, expected)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_draft_head_draws_a_draft_from_the_left(shift: int) -> None:
    """Each token follows the one before, the first one the pending token."""
    model = denoiser_model(DenoiserConfig(prediction_shift=shift, draft_head=DraftHeadConfig(8)))
    head = model.draft_head
    assert head is not None
    prompts = torch.randint(4, 140, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        state = model.new_state(2, 64)
        model.prefill(prompts[:, :-1], torch.tensor([19, 19]), state)
        block = torch.full((2, 6), 3)
        block[:, 0] = prompts[:, -1]
        logits = model.denoise(block, torch.full((2,), 5 / (6 - shift)), state.view())[:, 1 - shift : 6 - shift]
        for row in range(2):
            for place in range(5):
                scores = logits[row, place] + head.following @ head.previous[block[row, place]]
                scores[3] = -torch.inf
                block[row, place + 1] = scores.argmax()
    assert torch.equal(draft(model, prompts, 5), block[:, 1:])
    several = draft(model, prompts, 5, passes=3)
    assert torch.equal(several[:, 0], block[:, 1])  # the first pass keeps a token from the left
    assert not (several == 3).any()


def test_the_first_token_of_adapters_is_that_of_ar() -> None:
    """Adapters gated to masks leave the first prediction to the AR model; a draft head changes only the others."""
    choices = DenoiserConfig.with_adapters(4)
    prompts = torch.randint(4, 140, (3, 20), generator=torch.Generator().manual_seed(1))
    with_head = denoiser_model(choices, draft_rank=8)
    own, head = draft(denoiser_model(choices), prompts, 5), draft(with_head, prompts, 5)
    for model, found in ((denoiser_model(choices), own), (with_head, head)):
        ar = model.generate_ar(prompts, max_new_tokens=1, eos_token_id=None)[:, -1]
        assert torch.equal(found[:, 0], ar)
    assert not torch.equal(own, head)


# --- rollback on a CPU ----------------------------------------------------------------------------------------------


def test_a_convolution_after_rejected_tokens() -> None:
    """Steps of 3 tokens, of which 1 to 3 count: the outputs are those of one convolution over the tokens that count."""
    torch.manual_seed(0)
    channels, kernel, steps = 4, 4, [3, 1, 2, 3]  # tokens of each step that count
    weight, bias = torch.randn(channels, kernel), torch.randn(channels)
    windows, text, accepted = torch.zeros(3, channels, kernel - 1 + 2), torch.zeros(kernel - 1, channels), 1
    for counted in steps:
        x = torch.randn(3, channels)
        with_padding = torch.cat([x, torch.randn(1, channels)])
        slots, counts, starts = (torch.tensor(part) for part in ([[2, 9], [0, 9]], [accepted, 1], [0, 3, 4]))
        out = rollback.convolve(with_padding, windows, weight, bias, True, slots, counts, starts)
        whole = torch.cat([text, x]).t()[None]
        expected = F.silu(F.conv1d(whole, weight[:, None], bias, groups=channels))[0, :, -3:].t()
        torch.testing.assert_close(out[:3], expected)
        text, accepted = torch.cat([text, x[:counted]]), counted
    assert not windows[:2].any()  # slots of padding and of other rows


def test_a_scan_after_rejected_tokens() -> None:
    """As above, for the state space: the state continues after the tokens that count."""
    torch.manual_seed(0)
    heads, width, size = 4, 3, 5
    decay, skip, offset = -torch.rand(heads), torch.randn(heads), torch.randn(heads)
    states, kept, accepted = torch.zeros(9, heads, width, size), torch.zeros(heads, width, size), 1
    slots = torch.tensor([[5, 2, 8]])
    for counted in (3, 1, 2, 3):
        x, dt, b, c = (
            torch.randn(3, heads, width),
            torch.randn(3, heads),
            torch.randn(3, 2, size),
            torch.randn(3, 2, size),
        )
        out = torch.zeros_like(x)

        def spread(part: Tensor, *sizes: int) -> Tensor:
            return part.view(*part.shape, *[1] * len(sizes)).expand(*part.shape, *sizes)

        rollback.scan(
            states, x, spread(dt, width), spread(decay, width, size), b, c, spread(skip, width), spread(offset, width),
            slots, slots, torch.tensor([accepted]), torch.tensor([0, 3]), out,
        )  # fmt: skip
        after = []
        for token in range(3):
            step = F.softplus(dt[token] + offset)
            state = (after or [kept])[-1] * torch.exp(step * decay)[:, None, None]
            state = state + torch.einsum("h,hp,hn->hpn", step, x[token], b[token].repeat_interleave(2, 0))
            expected = torch.einsum("hpn,hn->hp", state, c[token].repeat_interleave(2, 0)) + skip[:, None] * x[token]
            torch.testing.assert_close(out[token], expected)
            after.append(state)
        kept, accepted = after[counted - 1], counted
