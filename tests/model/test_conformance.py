"""Every value of the golden data, which the public reference computed, within the tolerances of its README."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from twotower import TwoTowerForCausalLM
from twotower.cache.hybrid_cache import TowerState
from twotower.cache.pools import AttentionPool, MambaPool
from twotower.decoding.sampling import confidence
from twotower.model.conditioning import timestep_sinusoid
from twotower.ops.reference.attention import CachedKV

pytestmark = pytest.mark.code_path
FIXTURES = ("tiny-hybrid", "tiny-groups")
LOGITS, STATES, LOGITS_WITH_T, TIME, CONFIDENCE = 2e-4, 1e-4, 2e-3, 1e-4, 1e-3
PROMPT = 23  # tokens of the prompts of the golden states


class Golden:
    """One fixture: the model, the tensors and the generation cases."""

    def __init__(self, folder: Path) -> None:
        self.model = TwoTowerForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tensors = load_file(folder / "golden.safetensors")
        self.cases = json.loads((folder / "golden.json").read_text())["cases"]
        self.pattern = self.model.config.hybrid_override_pattern

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def prefilled(self, tokens: Tensor, length: int | None = None) -> TowerState:
        state = self.model.new_state(tokens.shape[0], 64)
        self.model.prefill(tokens, torch.full((tokens.shape[0],), length or tokens.shape[1]), state)
        return state

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        return sorted(name for name in self.tensors if name.startswith(prefix) and name.endswith(suffix))


@pytest.fixture(scope="module", params=FIXTURES)
def golden(request: pytest.FixtureRequest, golden_dir: Path) -> Golden:
    return Golden(golden_dir / request.param)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}")


# --- the context tower --------------------------------------------------------------------------------------------


def test_context_logits_of_whole_sequences(golden: Golden) -> None:
    names = golden.names("full/", "/ids")
    assert len(names) == 8
    for name in names:
        close(golden.model(golden[name]).logits, golden[name.replace("ids", "logits")], LOGITS, name)


@pytest.mark.parametrize("path", ["forward", "extend"])
def test_context_layer_by_layer(golden: Golden, path: str) -> None:
    """Whole sequences without state, and the passes that write a state."""
    model, tokens = golden.model, golden["full/b1_len17/ids"]
    inputs: dict[str, Tensor] = {}
    routed: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [model.context.norm_f.register_forward_hook(lambda m, a, out: inputs.update(norm_f_out=out))]
    for i, layer in enumerate(model.context.all_layers()):
        hooks.append(layer.norm.register_forward_hook(lambda m, a, out, i=i: inputs.update({f"in{i}": a[0]})))
        if layer.kind == "E":
            gate = layer.mixer.gate
            hooks.append(gate.register_forward_hook(lambda m, a, out, i=i: routed.update({f"router{i}": out})))
    if path == "forward":
        model(tokens)
    else:
        model.extend(tokens, model.new_state(1, 17))
    for hook in hooks:
        hook.remove()

    assert len(inputs) == len(golden.pattern) + 1
    assert len(routed) == golden.pattern.count("E")
    for name, value in inputs.items():  # `forward` works on whole blocks: 17 tokens, then padding
        close(value[:, :17], golden[f"layers/ctx/{name}"], STATES, name)
    for name, (choice, weight) in routed.items():
        ordered, order = choice[:17].sort(-1)
        assert torch.equal(ordered, golden[f"layers/ctx/{name}/experts_sorted"]), name
        close(weight[:17].gather(-1, order), golden[f"layers/ctx/{name}/weights"], STATES, name)


# --- the state ----------------------------------------------------------------------------------------------------


def check_state(golden: Golden, state: TowerState, where: str) -> None:
    """Every golden tensor under state/<where>/layer* against the pools; at least the Mamba states are there."""
    state.commit_state()
    names = golden.names(f"state/{where}/layer")
    assert len(names) >= 2 * golden.pattern.count("M")
    for name in names:
        layer, kind = name.split("/layer")[1].split("/")
        pool, expected = state.pools[int(layer)], golden[name]
        if kind in "kv":
            assert isinstance(pool, AttentionPool)
            length = expected.shape[2]
            assert state.lengths.tolist() == [length, length]
            past = state.view().past[int(layer)]
            assert isinstance(past, CachedKV)
            keys, values, _ = past.dense(expected.shape[1])
            close((keys if kind == "k" else values)[:, :, :length], expected, STATES, name)
        else:
            assert isinstance(pool, MambaPool)
            if kind == "conv":  # the reference keeps one older column, which it never reads
                close(pool.conv_window.transpose(1, 2), expected[..., 1:], STATES, name)
            else:
                close(pool.ssm_state, expected, STATES, name)


@pytest.mark.parametrize(
    ("where", "length"), [("prefill", PROMPT), ("prefill_minus_last", PROMPT - 1), ("prefill_len2", 2)]
)
def test_state_after_prefill(golden: Golden, where: str, length: int) -> None:
    state = golden.model.new_state(2, 64)
    last = golden.model.prefill(golden["state/prompt_ids"], torch.tensor([length, length]), state)
    check_state(golden, state, where)
    if where != "prefill_minus_last":  # the reference gives no logits there
        close(last, golden[f"state/{where}/last_logits"][:, 0], LOGITS, where)


def test_state_and_logits_after_extending_by_a_block(golden: Golden) -> None:
    state = golden.prefilled(golden["state/prompt_ids"])
    logits = golden.model.extend(golden["state/block_ids"], state)
    check_state(golden, state, "extend16")
    close(logits, golden["state/extend16/logits"], LOGITS)


def test_state_after_extending_by_less_than_the_convolution(golden: Golden) -> None:
    state = golden.prefilled(golden["state/prompt_ids"])
    golden.model.extend(golden["state/small_block_ids"], state, logits=False)
    check_state(golden, state, "extend2")


def test_single_steps_arrive_where_the_block_does(golden: Golden) -> None:
    state = golden.prefilled(golden["state/prompt_ids"])
    for token in golden["state/block_ids"].split(1, dim=1):
        logits = golden.model.extend(token, state)
    check_state(golden, state, "extend16")
    close(logits, golden["state/extend16_single_steps/last_logits"], LOGITS)


# --- the denoiser -------------------------------------------------------------------------------------------------


def test_denoiser_logits_at_every_block_size_and_t(golden: Golden) -> None:
    view = golden.prefilled(golden["den/ctx_ids"]).view()
    names = golden.names("den/", "/logits")
    assert len(names) == 14
    for name in names:
        _, block, level, _ = name.split("/")
        if level == "t_None":
            t = None
        elif level == "t_per_row":
            t = golden[f"den/{block}/t_per_row/t"]
        else:
            t = torch.full((2,), float(level.removeprefix("t_")))
        logits = golden.model.denoise(golden[f"den/{block}/ids"], t, view)
        close(logits, golden[name], LOGITS if t is None else LOGITS_WITH_T, name)


def test_denoiser_layer_by_layer(golden: Golden) -> None:
    denoiser, seen = golden.model.denoiser, {}

    def keep(name: str) -> Callable[..., None]:
        return lambda m, a, out: seen.update({name: out[0] if isinstance(out, tuple) else out})

    hooks = [layer.mixer.register_forward_hook(keep(f"mixer_out{i}")) for i, layer in enumerate(denoiser.all_layers())]
    hooks.append(denoiser.norm_f.register_forward_hook(lambda m, a, out: seen.update(norm_f_in=a[0], norm_f_out=out)))
    view = golden.prefilled(golden["den/ctx_ids"]).view()
    golden.model.denoise(golden["den/block16/ids"], torch.tensor([0.5, 0.5]), view)
    for hook in hooks:
        hook.remove()

    assert len(seen) == len(golden.pattern) + 2
    for name, value in seen.items():
        close(value, golden[f"layers/den_t0.5/{name}"], LOGITS_WITH_T, name)


def test_time_conditioning(golden: Golden) -> None:
    t, time = golden["time/t"], golden.model.time
    # Arguments reach 1000, where the error of fp32 is a few 1e-5.
    close(timestep_sinusoid(t, torch.float32), golden["time/sinusoid"], TIME)
    embedded = time.t_embedder(t)
    close(embedded, golden["time/t_embedder_out"], TIME)
    close(time.t_block(embedded), golden["time/t_block_out"], TIME)


# --- generation ---------------------------------------------------------------------------------------------------


def run(model: TwoTowerForCausalLM, case: dict[str, Any], row: int | None = None, **callback: Any) -> list[list[int]]:
    """The new tokens of a golden case, of all its rows or of one alone."""
    prompts = torch.tensor(case["prompt"] if row is None else [case["prompt"][row]])
    method = {
        "mask_diffusion": model.generate_mask_diffusion,
        "ar": model.generate_ar,
        "mock_ar": model.generate_mock_ar,
    }[case["mode"]]
    names = ("max_new_tokens", "temperature", "eos_token_id")
    if case["mode"] == "mask_diffusion":
        names += ("block_size", "steps_per_block", "mask_token_id", "confidence_threshold")
    out = method(prompts, **{name: case[name] for name in names}, **callback)
    assert torch.equal(out[:, : prompts.shape[1]], prompts)
    return out[:, prompts.shape[1] :].tolist()


def trimmed(tokens: list[int], eos: int | None) -> list[int]:
    """Tokens up to EOS; the reference keeps tokens after EOS, twotower does not."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def cases(golden: Golden, mode: str, rows: int) -> dict[str, dict[str, Any]]:
    found = {name: case for name, case in golden.cases.items() if case["mode"] == mode and len(case["prompt"]) == rows}
    assert len(found) == {1: {"mask_diffusion": 11, "ar": 3, "mock_ar": 3}, 2: dict.fromkeys(MODES, 2)}[rows][mode]
    return found


MODES = ("mask_diffusion", "ar", "mock_ar")


@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_passes_of_every_case_with_one_prompt(golden: Golden, mode: str) -> None:
    for name, case in cases(golden, mode, rows=1).items():
        assert run(golden.model, case) == [trimmed(case["new_tokens"][0], case["eos_token_id"])], name
        expected = {"ar": 0, "mock_ar": len(case["new_tokens"][0])}.get(mode, case.get("nfe"))
        assert golden.model._last_nfe == expected, name


def test_every_denoising_step_of_every_case_with_one_prompt(golden: Golden) -> None:
    """The block before each pass, its t, and for each masked position the prediction and its confidence."""
    mask = 3
    for name, case in cases(golden, "mask_diffusion", rows=1).items():
        steps = []

        def record(step: int, total: int, block: Tensor, t: float, logits: Tensor | None, block_idx: int) -> None:
            if logits is not None:
                logits = logits.clone()
                logits[..., mask] = -torch.inf
                best = logits.argmax(-1)
                row = {"block": block_idx, "step": step, "t": t, "xt": block.tolist()}
                steps.append((row, best, confidence(logits, best), block == mask))  # noqa: B023

        run(golden.model, case, step_callback=record)
        assert [row for row, *_ in steps] == case["trace"], name
        for i, (_, best, sure, masked) in enumerate(steps):
            predicted = golden[f"gen/{name}/predicted"][i]
            assert torch.equal(best[masked], predicted[masked]), f"{name} pass {i}"
            close(sure[masked], golden[f"gen/{name}/confidence"][i][masked], CONFIDENCE, f"{name} pass {i}")
            assert (predicted[~masked] == -1).all()  # the golden values agree which positions are decided


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_gives_each_row_what_it_gets_alone(golden: Golden, mode: str) -> None:
    """The reference couples rows (one t, one commit count, one EOS for the batch); twotower does not."""
    for name, case in cases(golden, mode, rows=2).items():
        eos = case["eos_token_id"]
        for row, tokens in enumerate(run(golden.model, case)):
            kept = trimmed(tokens, eos)
            assert kept == run(golden.model, case, row)[0], f"{name} row {row}"
            assert not any(tokens[len(kept) :]), f"{name} row {row}: more than padding after EOS"
            if mode == "mask_diffusion":
                alone = golden.cases["diffusion_b16_s16_thr0.8"]  # the same request with the first prompt only
                assert row == 1 or kept == trimmed(alone["new_tokens"][0], eos), name
            else:  # the reference's rows do not depend on each other, but that one's EOS ends both
                reference = case["new_tokens"][row]
                assert kept[: len(reference)] == reference, f"{name} row {row}"
                assert (len(kept) > len(reference)) == (eos is not None and row == 1), f"{name} row {row}"


def test_golden_values_are_all_compared(golden: Golden) -> None:
    """Every golden tensor has a test above, so a new kind of golden value fails here."""
    batch_traces = ("gen/diffusion_batch2",)  # in the reference, rows share t there
    compared = ("full/", "layers/ctx/", "layers/den_t0.5/", "state/", "den/", "time/", "gen/")
    assert all(name.startswith(compared) for name in golden.tensors)
    traced = {name.split("/")[1] for name in golden.names("gen/", "/predicted") if not name.startswith(batch_traces)}
    assert traced == set(cases(golden, "mask_diffusion", rows=1))
