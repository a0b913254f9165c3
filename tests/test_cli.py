"""The command line: stdout, stderr, exit codes, and the time of `--help`."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command import Result, assert_one_line_error
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from twotower import TwoTowerForCausalLM, bundled_model
from twotower.checkpoint.convert import convert
from twotower.checkpoint.export import export_one_tower
from twotower.cli.colours import colour
from twotower.cli.generate import generate as generate_command
from twotower.cli.pass_picture import block_title, picture_lines
from twotower.cli.watch import Frame, LiveView, NullView, TokenNames, Watcher, block_text
from twotower.decoding.params import GenerationParams

PROMPT = "Once upon a time"
SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>"]


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte for the 256 ids of the tiny golden model (without four rare bytes)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: 256 - len(SPECIAL)]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", mask_token="<mask>"
    )


@pytest.fixture(scope="session")
def checkpoint(
    golden_dir: Path, byte_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny golden model with a tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden_dir / "tiny-hybrid" / name, directory / name)
    byte_tokenizer.save_pretrained(directory)
    return directory


# --- the group ------------------------------------------------------------------------------------------------------


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_help_is_quick() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        python("from twotower.cli.main import run_cli; run_cli(['--help'])")
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 1.0


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["info", "--help"], ["demo", "--help"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = f"import sys; from twotower.cli.main import run_cli; run_cli({args}); print(*sorted(sys.modules))"
    loaded = python(code).splitlines()[-1].split()
    assert not {"torch", "transformers", "numpy", "rich.console"} & set(loaded)


def test_a_wrong_option_is_reported_without_heavy_imports() -> None:
    code = "import sys; from twotower.cli.main import run_cli; code = run_cli(['x', '--mode', 'foo']); "
    code += "print(code, 'torch' in sys.modules)"
    assert python(code) == "2 False\n"


def test_defaults_are_those_of_the_api() -> None:
    """The command line repeats them, so that `--help` does not import torch."""
    shown = {option.name: option.default for option in generate_command.params}
    api = GenerationParams()
    assert shown["mode"] == api.mode
    assert shown["max_new_tokens"] == api.max_new_tokens
    assert shown["threshold"] == api.confidence_threshold
    assert shown["block_size"] == api.block_size
    assert shown["steps"] == api.steps_per_block
    assert shown["policy"] == api.policy
    assert shown["acceptance"] == api.acceptance
    assert shown["temperature"] == api.temperature


def test_version(cli: Callable[..., Result]) -> None:
    assert re.fullmatch(r"twotower \d+\.\d+\.\d+\n", cli("--version").out)


def test_the_verb_may_be_left_out(cli: Callable[..., Result], checkpoint: Path) -> None:
    named = cli("generate", PROMPT, "-m", checkpoint, "-n", "8")
    for args in ([PROMPT, "-m", checkpoint, "-n", "8"], ["-n", "8", "-m", checkpoint, PROMPT]):
        assert cli(*args).out == named.out
    assert named.out


def test_a_misspelt_verb_is_mentioned(cli: Callable[..., Result], checkpoint: Path) -> None:
    result = cli("infoo", "-m", checkpoint, "-n", "1")
    assert result.code == 0
    assert "'info'" in result.err


# --- generate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["diffusion", "ar", "mock_ar", "verified"])
def test_stdout_is_the_text_and_nothing_else(cli: Callable[..., Result], checkpoint: Path, mode: str) -> None:
    model = TwoTowerForCausalLM.from_pretrained(checkpoint, towers="context" if mode == "ar" else "both")
    *_, last = model.stream(PROMPT, mode, max_new_tokens=20, eos_token_id=2)
    assert last.result is not None
    result = cli(PROMPT, "-m", checkpoint, "-n", "20", "--mode", mode)
    assert result.code == 0
    assert result.out == last.result.text + "\n"
    assert result.err.count("\n") == 1
    for words in (mode, "tokens/pass", "tokens/s", "prefill", "ended by"):
        assert words in result.err


def test_prompts_from_stdin_file_and_argument_agree(
    cli: Callable[..., Result], checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    options = ["-m", checkpoint, "-n", "8", "--json"]
    answers = [
        cli(PROMPT, *options),
        cli("-f", file, *options),
        cli(*options, stdin=f"{PROMPT}\r\n".encode()),
        cli("-", *options, stdin=PROMPT.encode()),
    ]
    parsed = [json.loads(answer.out) for answer in answers]
    assert [one["prompt"] for one in parsed] == [PROMPT] * 4
    assert all(one["tokens"] == parsed[0]["tokens"] for one in parsed)


def test_json_is_one_object(cli: Callable[..., Result], checkpoint: Path) -> None:
    result = cli(PROMPT, "-m", checkpoint, "-n", "20", "--json", "--temperature", "0.7", "--dtype", "float64")
    assert result.err == ""
    answer = json.loads(result.out)
    assert answer["prompt"] == PROMPT
    assert answer["model"] == str(checkpoint)
    assert (answer["dtype"], answer["context_device"]) == ("float64", "cpu")
    assert len(answer["tokens"]) == len(answer["confidence"]) == len(answer["committed_at"]) <= 20
    assert answer["denoiser_passes"] > 0
    again = cli(PROMPT, "-m", checkpoint, "-n", "20", "--json", "--temperature", "0.7", "--dtype", "float64", "--seed",
                str(answer["seed"]))  # fmt: skip
    assert json.loads(again.out)["tokens"] == answer["tokens"]


def test_stop_strings(cli: Callable[..., Result], checkpoint: Path) -> None:
    whole = cli(PROMPT, "-m", checkpoint, "-n", "20").out
    cut = cli(PROMPT, "-m", checkpoint, "-n", "20", "--stop", whole[3:5], "--stop", "nowhere")
    assert cut.out == whole[: whole.index(whole[3:5])] + "\n"
    assert "ended by stop" in cut.err


def test_options_without_effect_give_a_warning(cli: Callable[..., Result], checkpoint: Path) -> None:
    options = ["--threshold", "0.5", "--watch", "--denoiser-device", "cpu", "--seed", "1"]
    result = cli(PROMPT, "-m", checkpoint, "-n", "2", "--mode", "ar", *options)
    assert result.code == 0
    warned = re.findall(r"^Warning: (--\S+) has no effect", result.err, re.M)
    assert warned == ["--threshold", "--watch", "--denoiser-device", "--seed"]
    assert "Warning" not in cli(PROMPT, "-m", checkpoint, "-n", "2", "--threshold", "0.5").err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["x", "-m", "/no/such/model"], "/no/such/model"),
        (["x", "--threshold", "1.5"], "--threshold"),
        (["x", "--threshold", "nan"], "confidence_threshold"),
        (["x", "--mode", "fast"], "'fast' is not one of"),
        (["x", "-n", "0"], "--max-new-tokens"),
        (["x", "--no-such-option"], "--no-such-option"),
        (["x", "--stop", ""], "stop"),
        (["x", "--context-device", "warp:9"], "warp:9"),
        (["x", "-f", "/no/such/file"], "/no/such/file"),
        (["x", "--trace", "/no/such/dir/a.svg"], "/no/such/dir"),
        (["x", "--trace", "a.gif"], "choose one of .svg, .html, .png"),
        (["x", "surplus"], "surplus"),
        ([""], "empty"),
        ([" \n"], "empty"),
        ([], "empty"),
        (["-"], "empty"),
        (["info", "/no/such/config.json"], "/no/such/config.json"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_exit_code_2(
    cli: Callable[..., Result], checkpoint: Path, args: list[str], said: str
) -> None:
    if args[:1] != ["info"] and "-m" not in args:
        args = [*args, "-m", str(checkpoint)]
    assert_one_line_error(cli(*args), said)


def test_two_prompts_are_an_error(cli: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("x")
    assert_one_line_error(cli("x", "-f", file), "--file")


def test_a_prompt_that_is_not_utf8(cli: Callable[..., Result]) -> None:
    assert_one_line_error(cli(stdin=b"caf\xe9"), "stdin", "UTF-8", "byte 3")


def test_a_model_without_tokenizer(cli: Callable[..., Result], golden_dir: Path) -> None:
    assert_one_line_error(cli("x", "-m", golden_dir / "tiny-hybrid"), "tokenizer")


def test_no_traceback_in_a_real_process() -> None:
    script = "from twotower.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "x", "-m", "/no/such/model"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert_one_line_error(Result(done.returncode, done.stdout, done.stderr), "/no/such/model")


# --- watch and trace ------------------------------------------------------------------------------------------------


def test_a_setting_is_not_an_option_of_generate(cli: Callable[..., Result]) -> None:
    for name in ("-s", "--setting"):
        failed = cli("generate", PROMPT, name, "diffusion:0.8")
        assert failed.code == 2
        assert name in failed.err
        assert failed.err.endswith("; generate takes --mode and one option for each parameter\n")


def test_watch_marks_the_check_of_a_draft(cli: Callable[..., Result], checkpoint: Path) -> None:
    watched = cli(PROMPT, "-m", checkpoint, "-n", "20", "--watch", "--mode", "verified", "--draft-steps", "1")
    lines = [line for line in watched.err.splitlines() if line.startswith("block")]
    assert [line.split()[2] for line in lines[:3]] == ["pass", "pass", "check"]


def test_watch_writes_a_line_a_pass_to_stderr(cli: Callable[..., Result], checkpoint: Path) -> None:
    quiet = cli(PROMPT, "-m", checkpoint, "-n", "20")
    watched = cli(PROMPT, "-m", checkpoint, "-n", "20", "--watch")
    assert watched.out == quiet.out
    lines = [line for line in watched.err.splitlines() if line.startswith("block")]
    passes = int(re.search(r"(\d+) passes", quiet.err)[1])  # type: ignore[index]
    assert len(lines) == passes + 2  # and one line before the first pass of each of the two blocks
    assert lines[0].endswith("t 1.00  " + "░" * 16)
    assert "░" not in lines[-1]


def recorded(checkpoint: Path, view: object, tokens: int = 20) -> tuple[Watcher, list[int], list[float]]:
    model = TwoTowerForCausalLM.from_pretrained(checkpoint)
    watcher = Watcher(model.tokenizer, model.config.mask_token, view)  # type: ignore[arg-type]
    with watcher:
        events = model.stream(PROMPT, max_new_tokens=tokens, step_callback=watcher.on_pass)
        *_, last = watcher.watch(events)
    assert last.result is not None
    return watcher, last.result.tokens, last.result.confidence


def test_frames_record_the_run(checkpoint: Path) -> None:
    """Every token appears in the pass that commits it, with its confidence at the commit."""
    watcher, tokens, confidence = recorded(checkpoint, NullView())
    finals = [frames[-1] for frames in watcher.blocks]
    assert [token for frame in finals for token in frame.tokens] == tokens
    seen = [probability for frame in finals for probability in frame.confidence[: len(frame.tokens)]]
    assert seen == pytest.approx(confidence, abs=1e-6)
    for frames in watcher.blocks:
        assert frames[0].t == 1.0
        assert frames[0].confidence == [None] * 16
        assert frames[-1].t == 0.0
        fresh = [sum(frame.fresh[i] for frame in frames) for i in range(len(frames[-1].tokens))]
        assert fresh == [1] * len(frames[-1].tokens)
    assert finals[-1].total_tokens == 20


def test_frames_record_a_verified_run() -> None:
    """Drafts, accepted tokens, and rounds without a draft, with a trained model."""
    model = TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32")
    for steps in (0, 1, 2, None):
        watcher = Watcher(model.tokenizer, model.config.mask_token, NullView(), "verified")
        with watcher:
            options = {"mode": "verified", "max_new_tokens": 30, "draft_steps": steps}
            stream = model.stream("User: I want to", step_callback=watcher.on_pass, **options)
            events = list(watcher.watch(stream))
        result = events[-1].result
        assert result is not None
        assert [token for frames in watcher.blocks for token in frames[-1].tokens] == result.tokens
        assert all(frames[-1].verified for frames in watcher.blocks)
        assert sum(frames[-1].passes for frames in watcher.blocks) == result.passes
        drafted = kept = 0
        for frames, event in zip(watcher.blocks, events, strict=True):
            if not event.draft:
                assert len(frames) == 2
                assert "of the context tower" in block_title(frames)
                continue
            draft, final = frames[-2].tokens, frames[-1].tokens
            assert draft == list(event.draft)
            assert final[:-1] == draft[: len(final) - 1]
            drafted, kept = drafted + len(draft), kept + len(final) - 1
            assert f"of {len(draft)} drafted tokens accepted" in block_title(frames)
            assert frames[-1].fresh[:-1] == [False] * (len(final) - 1)
        assert drafted == result.drafted
        assert kept == result.accepted
        titles = [line[0].text for line in picture_lines(watcher.blocks, watcher.names) if line and line[0].bold]
        if steps == 0:
            assert titles == ["rounds 1 to 30: 30 tokens of the context tower"]
        if steps:
            assert len(titles) == len(watcher.blocks)
            assert kept > 0


def test_the_live_view_shows_masks_and_final_text(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.cli.watch.FRAME_SECONDS", 0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=12, color_system="truecolor")
    recorded(checkpoint, LiveView(console, PROMPT, keep=True))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "░" in shown
    assert "tokens/pass" in shown
    assert "\x1b[48;2;" in shown or ";48;2;" in shown  # a newly committed token, in colour
    assert "░" not in shown.rsplit(PROMPT, 1)[1]


def test_token_names(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    names = TokenNames(byte_tokenizer)
    newline, a, e_acute = (byte_tokenizer(text)["input_ids"] for text in ("\n", "a", "é"))
    assert [names(2), names(3), names(newline[0]), names(a[0])] == ["<eos>", "<mask>", "↵", "a"]
    assert [names(token) for token in e_acute] == ["·"] * len(e_acute)  # parts of a character


def test_a_new_token_has_the_colour_of_its_confidence(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    (a,) = byte_tokenizer("a")["input_ids"]
    frame = Frame(
        block=0,
        size=2,
        passes=1,
        tokens=[a, None],
        fresh=[True, False],
        confidence=[0.2, 0.1],
        total_passes=1,
        total_tokens=1,
    )
    text = block_text(frame, TokenNames(byte_tokenizer))
    assert text.plain == "a ░░"
    assert text.spans[0].style.bgcolor.get_truecolor() == colour(0.2)  # type: ignore[union-attr]


def test_trace_draws_a_self_contained_picture(cli: Callable[..., Result], checkpoint: Path, tmp_path: Path) -> None:
    picture = tmp_path / "trace.svg"
    result = cli(PROMPT, "-m", checkpoint, "-n", "20", "--trace", picture)
    assert result.code == 0
    drawn = picture.read_text(encoding="utf-8")
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    assert "block&#160;2:" in drawn
    assert not re.search(r"url\((?!#)|href|@font-face", drawn)


def test_trace_as_html_and_png(cli: Callable[..., Result], checkpoint: Path, tmp_path: Path) -> None:
    page, pixels = tmp_path / "trace.html", tmp_path / "trace.png"
    for file in (page, pixels):
        assert cli("<b>" + PROMPT, "-m", checkpoint, "-n", "20", "--trace", file).code == 0
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;" in text
    assert "block&#160;2:" in text
    assert "tokens/pass" in text
    assert not re.search(r"url\((?!#)|href|src=|@font-face|<script", text)
    assert pixels.read_bytes().startswith(b"\x89PNG")


# --- info -----------------------------------------------------------------------------------------------------------


def test_info_gives_the_published_figures(cli: Callable[..., Result], golden_dir: Path) -> None:
    started = time.perf_counter()
    facts = json.loads(cli("info", golden_dir / "released" / "config.json", "--json").out)
    assert time.perf_counter() - started < 6.0
    assert facts["layers"] == {"Mamba-2": 23, "attention": 6, "MoE": 23}
    count = facts["parameters"]
    assert round(count["per_tower"] / 1e9, 1) == 31.6
    assert round(count["active"] / 1e9, 1) == 3.6
    assert round(count["moe_share"] * 100, 1) == 94.5
    assert round(count["routed_expert_share"] * 100) == 93
    memory = facts["memory"]
    assert round(memory["bfloat16"]["context"] / 2**30, 1) == 58.8
    assert memory["bfloat16"]["both"] / 2**30 == pytest.approx(117.6, abs=0.1)
    assert memory["float32"]["both"] / memory["bfloat16"]["both"] == pytest.approx(2, abs=1e-4)
    # K/V: 6 layers × 2 × 2 heads × 128 × 2 bytes. State: 23 layers, window 3 × 6144 in bf16, 64 × 64 × 128 in fp32.
    assert facts["state"]["per_token"] == 6 * 2 * 2 * 128 * 2
    assert facts["state"]["per_row"] == 23 * (3 * 6144 * 2 + 64 * 64 * 128 * 4)
    nothing = {"present": False, "files": [], "dtypes": {}, "quantization": "none", "problem": None}
    assert facts["weights"] == nothing
    assert facts["computes_in"]["cpu"] == "bfloat16"  # too large for fp32 under --dtype auto
    ops = {row["op"] for row in facts["backends"]["cpu"]}
    assert ops >= {"attention", "mamba_block", "experts", "linear_int8", "pass", "weights", "torch.compile"}


def test_info_page_of_the_released_config(cli: Callable[..., Result], golden_dir: Path) -> None:
    result = cli("info", golden_dir / "released" / "config.json")
    assert (result.code, result.err) == (0, "")
    for words in ("31.58 B", "3.58 B active", "94.5%", "58.8", "23 Mamba-2", "6.0 KiB per token"):
        assert words in result.out
    assert max(map(len, result.out.splitlines())) <= 100


def test_info_of_a_checkpoint(cli: Callable[..., Result], checkpoint: Path) -> None:
    result = cli("info", checkpoint, "--json")
    assert (result.code, result.err) == (0, "")
    facts = json.loads(result.out)
    assert facts["weights"]["problem"] is None
    assert [file["name"] for file in facts["weights"]["files"]] == ["model.safetensors"]
    assert set(facts["weights"]["dtypes"]) == {"F32"}
    assert "tokenizer.json" in facts["tokenizer"]


def test_info_counts_what_loading_allocates(cli: Callable[..., Result], checkpoint: Path) -> None:
    model = TwoTowerForCausalLM.from_pretrained(checkpoint)
    tensors = [*model.parameters(), *model.buffers()]
    facts = json.loads(cli("info", checkpoint, "--json").out)
    assert facts["memory"]["float32"]["both"] == sum(tensor.nbytes for tensor in tensors)
    assert facts["parameters"]["both_towers"] == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("args", [[], ["--json"]])
def test_info_reports_damaged_weights(
    cli: Callable[..., Result], checkpoint: Path, tmp_path: Path, args: list[str]
) -> None:
    """The facts are printed; the damage comes last, as an error."""
    shutil.copytree(checkpoint, tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = cli("info", tmp_path / "half", *args)
    assert result.code == 2
    assert "MEM*EME" in result.out
    assert result.err.startswith("Error: ")
    assert result.err.count("\n") == 1
    assert "model.safetensors" in result.err


# --- demo -----------------------------------------------------------------------------------------------------------


def test_demo_compares_the_three_modes(
    cli: Callable[..., Result], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.cli.demo.NEW_TOKENS", 20)
    result = cli("demo", "-m", checkpoint)
    assert result.code == 0
    for words in (
        "ar ",
        "mock_ar",
        "verified",
        "diffusion, threshold 0.8",
        "tokens/pass",
        "tokens/s",
        "× AR",
        "than AR here",
    ):
        assert words in result.out
    assert "\x1b" not in result.out
    assert result.err == ""


def test_demo_of_adapters_shows_verified_decoding(
    cli: Callable[..., Result], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.cli.demo.NEW_TOKENS", 12)
    monkeypatch.setattr("twotower.cli.demo.ROUNDS", 1)
    export_one_tower(checkpoint, tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "adapters", denoiser_lora=2)
    result = cli("demo", "-m", tmp_path / "adapters")
    assert result.code == 0, result.err
    assert "one tower with adapters" in result.out
    assert "check " in result.out
    assert "diffusion, threshold 0.95" in result.out
    assert "Verified is " in result.out
    assert "for which it was not trained" not in result.out


def test_demo_of_the_bundled_model(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.cli.demo.ROUNDS", 1)
    if not bundled_model("small").is_dir():
        pytest.skip("the bundled model is not in this tree")
    answer = json.loads(cli("demo", "--json").out)
    assert answer["dtype"] == "float32"
    modes = {one["mode"]: one for one in answer["modes"]}
    assert set(modes) == {"diffusion", "verified", "ar", "mock_ar"}
    assert modes["ar"]["times_ar"] == 1.0
    for one in modes.values():
        assert one["tokens_per_second"] == pytest.approx(len(one["tokens"]) / one["decode_seconds"])
