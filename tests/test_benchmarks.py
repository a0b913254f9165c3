"""Each benchmark runs in its quick form, prints its documented output, and gives plausible figures."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import MASK, case
from preloaded import run_script
from tiny_backbones import save, two_tower

from twotower import LLM, GenerationParams, TwoTowerConfig, TwoTowerForCausalLM, bundled_model
from twotower.checkpoint.convert import convert
from twotower.decoding.unmasking import Pass
from twotower.engine import Request
from twotower.training.objective import DenoisingOptions

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def bench(program: str, *arguments: str) -> dict[str, Any]:
    """Runs one benchmark ("script" or "script subcommand") on one thread; returns its JSON, its only stdout."""
    script, *subcommand = program.split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = run_script(BENCHMARKS / f"{script}.py", *subcommand, *arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert done.stderr.strip()  # the tables
    facts: dict[str, Any] = json.loads(line)
    assert facts["benchmark"] == program
    return facts


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the benchmarks importable by their names, inside the test only."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_rates_and_rooflines() -> None:
    facts = bench("passes", "--rates-only", "--quick", "--dtype", "float32")
    rates = facts["rates"]
    assert rates["bytes_per_second"] == max(rates["reads"].values()) > 1e8
    assert rates["operations_per_second"] == max(rates["products"].values()) > 1e8
    for name, roofline in facts["rooflines"].items():
        work = facts["work"][name]
        reading = sum(work["parts"].values()) / rates["bytes_per_second"]
        computing = work["operations"] / rates["operations_per_second"]
        assert roofline == pytest.approx(max(reading, computing))
    assert facts["rooflines"]["AR step"] < facts["rooflines"]["denoiser pass"]
    by_rows = facts["times AR by rows"]["3"]
    one = 16 * facts["rooflines"]["AR step"]
    one /= 16 / 3 * facts["rooflines"]["denoiser pass"] + facts["rooflines"]["commit"]
    assert by_rows["1"] == pytest.approx(one)
    assert list(by_rows) == ["1", "8", "64"]


@pytest.mark.parametrize("rate", [1.5, 3.0, 5.0])
def test_a_forced_rate_does_not_count_idle_passes(modules: None, rate: float) -> None:
    """Asynchronous scheduling launches a pass over a block that the pass before has finished."""
    from common.forced_rate import forced
    from common.models import config_of, random_model

    model = random_model(config_of(None), torch.float32, torch.device("cpu"))
    settings: dict[str, Any] = {"mode": "diffusion", "block_size": 16, "steps_per_block": 16, "max_new_tokens": 96}
    llm = LLM(model, rows=1, length=128)
    llm.core.async_scheduling = True
    with forced() as schedule:
        schedule.begin()
        params = GenerationParams.of(policy="forced", policy_value=rate, seed=0, **settings)
        (output,) = llm.generate([Request([5, 6, 7], params)])
    assert output.tokens_per_pass == pytest.approx(rate, rel=0.1)


def test_a_forced_rate_reads_nothing_on_the_host(modules: None) -> None:
    """A tensor of the meta device has no values that the host could read."""
    from common.forced_rate import Schedule

    floats, masked = torch.empty(1, 16, device="meta"), torch.empty(1, 16, device="meta", dtype=torch.bool)
    step = torch.empty(1, 1, device="meta")
    schedule, seen = Schedule(), Pass(floats, step, floats, masked, step, step)
    for memory in (None, True):
        assert schedule(seen._replace(memory=memory), step).sure.is_meta


def test_passes() -> None:
    (found,) = bench("passes", "--quick", "--dtype", "float32")["measured"]
    assert found["passes"].keys() == {"AR step", "denoiser pass", "commit"}
    for one in found["passes"].values():
        assert 0 < one["roofline"] < one["best"] <= one["seconds"]
        assert one["times roofline"] == pytest.approx(one["seconds"] / one["roofline"])
        assert one["experts"]["how"] == "counted"
    assert found["passes"]["AR step"]["experts"]["mean"] == 2
    assert found["passes"]["AR step"]["AR steps"] == 1
    assert (
        4 < found["passes"]["denoiser pass"]["experts"]["mean"] <= 8
    )  # not only the few experts that a block of masks selects
    assert found["naive logits differ by"]["largest"] < 1e-4
    assert found["naive"]["times ours"] > 0
    assert [row["asked"] for row in found["diffusion"]] == [1.5, 3, 5]
    for row in found["diffusion"]:
        assert row["tokens per pass"] == pytest.approx(row["asked"], rel=0.15)  # three blocks
        assert row["passes launched"] == pytest.approx(48 / row["tokens per pass"])
        assert row["times AR"] > 0
    assert found["transformers"]["same tokens"]
    assert found["transformers"]["same until"] == found["transformers"]["tokens"] == 48


def test_thirty() -> None:
    """The tiny shape; the published one needs 18 GiB."""
    facts = bench("thirty", "--quick", "--quantization", "experts=int4,rest=int8", "--layers", "4", "--threads", "1")
    assert (facts["layers"], facts["quantization"]) == (4, "experts=int4,rest=int8")
    assert 0 < facts["memory"]["weights"] < facts["memory"]["peak"]
    assert facts["passes"].keys() == {"AR step", "denoiser pass", "commit"}
    step = facts["passes"]["AR step"]
    assert step["experts"] == {"mean": 2, "how": "counted"}
    assert step["parts"]["experts"] == 2 * (48 * 2 + 64 * 2) * 18  # rows × groups of 32 inputs; a group has 18 bytes
    assert step["parts"]["head"] == 512 * (64 + 4)
    for one in facts["passes"].values():
        assert one["bytes"] == sum(one["parts"].values())
        assert one["bytes_per_second"] == pytest.approx(one["bytes"] / one["seconds"])
        assert one["of the read rate"] > 0


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("plan", ["int4", "int8"])
def test_random_quantised_weights_are_valid(plan: str) -> None:
    """Padding is zero, as in quantised weights; passes are finite; plans that leave weights unquantised are refused."""
    import click
    import thirty
    from common import models, quantized_weights

    from twotower.ops.reference import int4, int8

    model = thirty.model_of(models.config_of(None), plan, "float32", both=True)
    if plan == "int4":
        up = model.context.layers[1].mixer.experts.down_proj  # 48 inputs: the last group has 16
        assert (int4.integers(up, 64, 64)[..., 48:] == 0).all()
        assert int4.integers(up, 64, 48).float().std() == pytest.approx(4.6, abs=0.1)
    else:
        into = model.context.layers[0].mixer.in_proj  # 324 rows: the last panel has 4
        assert (into.weight[-1, :, 4:] == 0).all()
        weight = int8.unpack(into.weight, into.weight_scale, torch.float32) * into.weight_scale[:, None]
        assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
    with torch.no_grad():
        state = model.new_state(1, 16)
        logits = model.prefill(torch.arange(4, 12)[None], torch.tensor([8]), state)
    assert logits.isfinite().all()
    assert 0.1 < float(logits.std()) < 10
    assert quantized_weights.weight_bytes(model) == sum(
        tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]
    )
    with pytest.raises(click.UsageError, match=r"leaves context\.heads, context\.projections unquantised"):
        thirty.model_of(models.config_of(None), "experts=int4", "float32", both=False)


@pytest.mark.usefixtures("modules")
def test_thirty_refuses_a_shape_that_does_not_fit() -> None:
    import click
    import thirty
    from common import models

    values = models.config_of(models.PUBLISHED).to_dict() | {"n_routed_experts": 1 << 20}
    config = TwoTowerConfig(**{name: value for name, value in values.items() if name not in models._DERIVED})
    with pytest.raises(
        click.UsageError, match=r"^52 layers in int8 need [\d.]+ GiB and .* is free; give fewer --layers"
    ):
        thirty.model_of(config, "int8", "bfloat16", both=False)


def test_peers(tmp_path: Path) -> None:
    """Against transformers; llama.cpp is a package that the tests do not install."""
    save("llama", tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two", mask_token=3)
    (found,) = bench("peers", "--quick", "--model", str(tmp_path / "two"))["measured"]
    assert found["sides"].keys() == {"twotower", "transformers"}
    assert found["sides"]["transformers"]["same until"] == found["tokens"] == 8
    for name, side in found["sides"].items():
        # A step of AR is the difference of two times, which a short run on a busy machine may turn around.
        assert all(value > 0 for kind, value in side["seconds"].items() if kind != "AR step")
        assert all(value == 1 or name != "twotower" for value in side["ours takes"].values())


@pytest.mark.usefixtures("modules")
def test_throughput_of_texts_that_are_too_short_for_a_rate() -> None:
    """Diffusion writes a text of one block in one step, so no period has all rows; the other figures remain."""
    import throughput

    model = TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32")
    shape: dict[str, Any] = {"texts": 2, "context": 24, "tokens": 16, "rounds": 1, "modes": ("ar", "diffusion")}
    measured = throughput.measure(model, at_once=(1, 4), **shape)["measured"]
    rates = {(row["mode"], row["at once"]): row["tokens/s"] for row in measured}
    assert rates["diffusion", 4] is None
    assert rates["ar", 4] > 0
    assert all(row["overall tokens/s"] > 0 and row["same texts as alone"] == 1 for row in measured)
    assert "diffusion, 4 at once: no rate" in "\n".join(map(str, throughput.tables(
        {"measured": measured, "context": 24, "tokens": 16}
    )))  # fmt: skip


def test_throughput() -> None:
    facts = bench("throughput requests", "--quick", "--dtype", "float32")
    assert [(row["mode"], row["at once"]) for row in facts["measured"]] == [
        (mode, rows) for mode in ("ar", "diffusion", "verified") for rows in (1, 3)
    ]
    assert facts["matmuls cover"] > 0.95
    alone = {row["mode"]: row for row in facts["measured"] if row["at once"] == 1}
    for row in facts["measured"]:
        assert row["same texts as alone"] == 1  # these few texts have no near ties in fp32
        assert 0 < row["first block p50"] <= row["first block p95"] <= row["latency p95"]
        assert row["latency p50"] <= row["latency p95"]
        assert row["tokens per pass"] == pytest.approx(alone[row["mode"]]["tokens per pass"])
        assert row["share of it"] == pytest.approx(row["times one"] / row["matmuls allow"])
    assert alone["ar"]["tokens per pass"] == 1 < alone["verified"]["tokens per pass"]
    assert all(row["times one"] == row["matmuls allow"] == 1 for row in alone.values())
    assert all(row["times one"] > 0.1 for row in facts["measured"])  # reliable only on an idle machine


def test_worst_case_of_drafting() -> None:
    facts = bench("throughput worst-case", "--quick", "--dtype", "float32")
    assert [row["text"] for row in facts["measured"]] == ["noise, temperature 1.5", "noise, greedy", "suite, greedy"]
    for row in facts["measured"]:
        assert row["ratio"] == row["ratios"][0] > 0  # of one round
        assert row["differ"] == 0
        assert 0 <= row["kept"] <= 15 * row["drafts"]


def test_train_step() -> None:
    (found,) = bench("train step", "--quick", "--dtype", "float32")["results"]
    assert found["parameters_per_tower"] == pytest.approx(2.5e6, rel=0.02)
    kept = found["kept_bytes"]
    for kind in ("ar", "denoiser"):
        assert 0 < kept[f"{kind} activation checkpointing"] < kept[kind]
    for label in ("plain", "activation checkpointing"):
        row = found[label]
        assert row["ratio"] == pytest.approx(row["denoiser_seconds"] / row["ar_seconds"])
        assert row["ratio"] == pytest.approx(row["ratio_of_best"])  # of one step


@pytest.mark.usefixtures("modules")
def test_every_variation_of_the_ablations_trains() -> None:
    """Its loss is finite and reaches the denoiser; those that change the passes differ from the base."""
    from common.variations import VARIATIONS, Varied

    step, losses = case("M-*M-*", dtype=torch.float32), {}
    for variation in VARIATIONS:
        model = case("M-*M-*", dtype=torch.float32).model
        if variation.tied:
            model.denoiser = model.context
        objective = Varied(model, variation, DenoisingOptions(mask_token_id=MASK, **variation.options))
        loss = objective(*step[1:])
        loss.backward()
        losses[variation.name] = float(loss.detach())
        assert model.denoiser is not None
        assert all(p.grad is not None for p in model.denoiser.layers[0].parameters()), variation.name
    assert all(map(math.isfinite, losses.values()))
    changed = {name for name, loss in losses.items() if loss != losses["base"]}
    assert changed == {
        "no Mamba seeding", "no time conditioning", "one tied network", "coupling to the last hidden state",
        "half the denoiser layers",
    }  # fmt: skip


def test_memory() -> None:
    facts = bench("context memory", "--quick", "--dtype", "float32")
    states = facts["states"]
    assert [row["length"] for row in states] == [1024, 4096]
    for row in states:
        assert row["scratch"] == row["two-tower"] - row["AR"] == states[0]["scratch"] > 0  # one block of any length
    tokens = facts["state bytes a token"]
    assert tokens["AR"] == tokens["two-tower"] == 2 * 2 * 16 * 4  # K and V of one layer: 2 heads of 16, fp32
    published = facts["published shape, bf16"]
    assert (published[1]["bytes"] - published[0]["bytes"]) / 3072 == 2 * 6 * 2 * 128 * 2
    for one in facts["loads"].values():
        assert one["load seconds"] > 0
        assert one["weights bytes"] < one["peak of the load"] <= one["peak"]
        assert 0 < one["anonymous peak of the load"] <= one["peak of the load"]
        assert 0 < one["first event"] <= one["first block"]


def test_context(tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    facts = bench("context time", "--quick", "--dtype", "float32", "-o", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert facts["lengths"] == [1024, 8192, 32768]
    assert facts["roofline slope"] == pytest.approx(256 * 1e6 / facts["rates"]["bytes_per_second"])
    for name, curve in facts["seconds"].items():
        assert len(curve) == 3
        assert min(curve) > 0
        if name != "AR step":  # after such a long text, attention dominates a block pass of a tiny model
            assert curve[2] > curve[0]
            assert (
                5 * facts["slopes"][name] > facts["own roofline slopes"][name]
            )  # on a busy machine, rates are too low
        assert facts["own roofline slopes"][name] >= facts["roofline slope"] * (1 - 1e-9)


@pytest.mark.usefixtures("modules")
def test_percentiles() -> None:
    from common.timing import percentile

    assert [percentile([1.0, 2.0, 3.0, 4.0], share) for share in (0, 0.25, 0.5, 0.51, 1)] == [1, 1, 2, 3, 4]
    assert percentile([float(i) for i in range(1, 21)], 0.95) == 19
    assert percentile([7.0], 0.5) == 7


@pytest.mark.usefixtures("modules")
def test_bytes_of_a_pass_are_the_bytes_of_a_tower() -> None:
    from common import models, roofline

    config = models.config_of(None)
    model = models.random_model(config, torch.float32, torch.device("cpu"))
    every = [float(config.n_routed_experts)]
    shape: dict[str, Any] = {"rows": 1, "width": 1, "context": 0, "experts": every}
    for tower, more in ((model.context, {}), (model.denoiser, {"denoiser": True})):
        parts = roofline.work(config.layer_fields, torch.float32, **shape, **more).parts
        held = sum(p.nbytes for p in tower.parameters()) - tower.embeddings.weight.nbytes
        if more:
            held += sum(p.nbytes for p in model.time.parameters())
        assert parts["layers"] + parts["experts"] + parts["head"] == pytest.approx(held, rel=0.01)
    row = model.new_state(1, 0)
    state = sum(pool.conv_window.nbytes + pool.ssm_state.nbytes for pool in row.pools if hasattr(pool, "ssm_state"))
    assert parts["Mamba states"] == state
    assert roofline.expected_experts(config.layer_fields, 1) == pytest.approx(config.num_experts_per_tok)
    assert roofline.expected_experts(config.layer_fields, 10**6) == pytest.approx(config.n_routed_experts)


@pytest.mark.usefixtures("modules")
def test_one_set_of_weights_can_serve_both_towers_and_big_shapes_are_cut() -> None:
    from common import models

    from twotower import GenerationParams, generate

    config, cpu = models.config_of(None), torch.device("cpu")
    shared = models.random_model(config, torch.bfloat16, cpu, shared=True)
    assert shared.denoiser is shared.context
    assert shared.context.layers[0].mixer.A_log.dtype == torch.float32  # fp32 tensors stay in fp32
    assert all(math.isfinite(float(p.detach().float().sum())) for p in shared.parameters())
    with models.random_for_masks(shared, 16) as counted:
        (result,) = generate(shared, [[5, 6, 7]], GenerationParams.of(max_new_tokens=20, seed=0))
    assert len(result.tokens) == 20
    assert counted["passes"] == result.denoiser_passes
    whole = models.tower_bytes(config, torch.bfloat16)
    cut = models.cut_to(config, 0.8 * whole, torch.bfloat16)
    assert config.hybrid_override_pattern.startswith(cut.hybrid_override_pattern)
    assert models.tower_bytes(cut, torch.bfloat16) <= 0.8 * whole
    assert models.random_model(cut, torch.bfloat16, cpu).config.num_hidden_layers == cut.num_hidden_layers


def test_serve() -> None:
    facts = bench("serve", "--quick", "--dtype", "float64", "--modes", "ar,verified")
    assert [(row["mode"], row["clients"]) for row in facts["measured"]] == [
        (mode, clients) for mode in ("ar", "verified") for clients in (1, 8)
    ]
    for row in facts["measured"]:
        assert row["differ"] == 0
        assert row["answers"] > 0
        assert row["first_p50"] <= row["last_p50"] <= row["last_p95"]
        assert 0 < row["of_engine"] < 2
    assert facts["busy_at_the_end"] == 0
    assert facts["exit_code"] == 0


def test_round_cost(tmp_path: Path) -> None:
    two_tower("nemotron_h", torch.float32, rank=4).save_pretrained(tmp_path)
    arguments = "--quick", "--width", "2", "--width", "5", "--weights", "float32", "--weights", "int8-activations"
    facts = bench("round_cost", "--model", str(tmp_path), *arguments)
    assert [found["weights"] for found in facts["measured"]] == ["float32", "int8-activations"]
    for found in facts["measured"]:
        assert [row["width"] for row in found["rounds"]] == [2, 5]
        for row in found["rounds"]:
            assert math.isfinite(row["host_ms"])
            assert row["steps"] == pytest.approx(row["ms"] / found["step_ms"])
            assert row["adapters"] > 0


def test_overhead() -> None:
    """Compares this checkout with itself through `generate_*` and through the engine, with a profile."""
    cases = ("ar", "verified x8", "diffusion", "first token")
    chosen = [word for case in cases for word in ("--case", case)]
    chosen += ["--model", str(bundled_model("small")), "--against", str(BENCHMARKS.parent)]
    facts = bench("overhead", "--entry", "engine", "--quick", "--profile", *chosen)
    assert (facts["A"]["entry"], facts["B"]["entry"]) == ("engine", "generate")
    assert facts["A"]["commit"] == facts["B"]["commit"]
    assert list(facts["cases"]) == list(cases)
    for one in facts["cases"].values():
        low, high = one["quartiles"]
        assert min(one["ratios"]) <= low <= one["ratio"] <= high <= max(one["ratios"])
        assert len(one["ratios"]) == facts["pairs"] == 2
        assert one["texts equal"]
        for side in "AB":
            inside = sum(verb["us a token"] for verb in one[side]["verbs"].values())
            assert 0 < inside < 1.01 * one[side]["us a token"]
            assert 0 < one[side]["outside, us a token"] < one[side]["us a token"]
    ar, verified = (facts["cases"][case]["A"]["verbs"] for case in ("ar", "verified x8"))
    assert ar["extend"]["calls"] >= 16 if "extend" in ar else ar["ar_steps"]["calls"] >= 1
    assert (verified.get("denoise") or verified["fill_blocks"])["calls"] >= 1
    assert facts["cases"]["first token"]["prompt tokens"] == 300


def test_quantization_compares_rules_of_rounding(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("User: I want to book a table for two in San Jose.\n" * 20, encoding="utf-8")
    facts = bench("quantization", "--text", str(tmp_path / "text"), "--tokens", "128", "--length", "64")
    found = {each["rule"]: each for each in facts["results"]}
    assert found["int4"]["error"] == pytest.approx(found["best of 3 scales, groups of 32"]["error"], rel=1e-6)
    assert found["int8"]["error"] < 0.01 < found["int4"]["error"] < found["scale m / 7, groups of 32"]["error"] < 0.12
    assert 0 < found["int8"]["kl"] < found["int4"]["kl"] < 0.1


@pytest.mark.slow
def test_ranked_units_are_better_than_random_ones_and_than_the_average() -> None:
    facts = bench("feed_forward", "--tokens", "4096", "--sizes", "480", "--experts", "3")
    (errors,) = facts["errors"].values()
    assert 0 < errors["ranked 480"] < errors["random 480"] < errors["average 576"]
    assert errors["average, fitted 576"] < errors["average 576"]
    assert 0 < errors["3 experts"] < 1
