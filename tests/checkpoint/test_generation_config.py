"""Files beside the weights: `generation_config.json` and chat templates are read, copied and saved, from everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from command import Result, assert_one_line_error
from hub import FakeHub
from serving import serving

from twotower import TwoTowerForCausalLM, model_loading
from twotower.checkpoint.convert import convert
from twotower.checkpoint.tokenizer_files import copy_model_files
from twotower.errors import ConfigError
from twotower.server.building import sampling_defaults

NEMOTRON = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [2, 11],
    "temperature": 0.6,
    "top_p": 0.95,
    "length_penalty": 1.1,
    "transformers_version": "4.55.4",
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CARRIED = ("generation_config.json", "chat_template.jinja", "additional_chat_templates/brief.jinja")
Cli = Callable[..., Result]


def add_files(directory: Path, **changes: Any) -> Path:
    """Adds the files of `CARRIED` to a checkpoint."""
    (directory / "generation_config.json").write_text(json.dumps(NEMOTRON | changes))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "additional_chat_templates").mkdir(exist_ok=True)
    (directory / "additional_chat_templates/brief.jinja").write_text("brief {{ messages[0].content }}")
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return add_files(tiny_run.two_towers(tmp_path / "two"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(tmp_path / "hub", monkeypatch)


def assert_carried(directory: Path) -> None:
    """The model in a directory has the EOS list, both templates, and the values of the original file."""
    model = TwoTowerForCausalLM.from_pretrained(directory)
    assert model_loading.eos_of(model) == (2, 11)
    assert model.tokenizer.chat_template == {"default": TEMPLATE, "brief": "brief {{ messages[0].content }}"}
    assert json.loads((directory / "generation_config.json").read_text()) == NEMOTRON


def test_a_directory_and_a_hub_id_give_the_same(checkpoint: Path, hub: FakeHub) -> None:
    assert_carried(checkpoint)
    model = TwoTowerForCausalLM.from_pretrained(hub.publish("someone/two", checkpoint))
    assert model_loading.eos_of(model) == (2, 11)
    chat = [{"role": "user", "content": "hi"}]
    assert model.tokenizer.apply_chat_template(chat, tokenize=False) == "<user>hi"
    assert "brief" in model.tokenizer.chat_template


def test_save_pretrained_writes_the_files(checkpoint: Path, hub: FakeHub, tmp_path: Path) -> None:
    for source in (checkpoint, hub.publish("someone/two", checkpoint)):
        TwoTowerForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved")
        assert_carried(tmp_path / "saved")


def test_init_copies_the_files(hub: FakeHub, tmp_path: Path) -> None:
    from test_conversion import backbone

    source = tmp_path / "source"
    backbone(source)
    tiny_run.tokenizer().save_pretrained(source)
    _fit_vocabulary(source)
    add_files(source)
    for origin in (source, hub.publish("someone/one", source)):
        convert(origin, tmp_path / "made", overwrite=True)  # the second time over a folder with templates
        assert model_loading.eos_of(TwoTowerForCausalLM.from_pretrained(tmp_path / "made")) == (2, 11)
        for name in CARRIED:
            assert (tmp_path / "made" / name).read_bytes() == (source / name).read_bytes()
    with pytest.raises(ValueError, match="the mask token id is 11, which is the eos token"):
        convert(source, tmp_path / "other", mask_token=11)


def _fit_vocabulary(source: Path) -> None:
    """Replaces the tokenizer by that of the conversion tests, whose ids fit the small vocabulary."""
    from test_conversion import write_tokenizer

    for file in source.glob("tokenizer*"):
        file.unlink()
    write_tokenizer(source, additional_special_tokens=["<other>"])


def test_train_copies_the_files(checkpoint: Path, tmp_path: Path) -> None:
    args = tiny_run.given().train(tmp_path / "run", "--stages", "32:2", model=checkpoint)
    assert tiny_run.run_cli(args) == 0
    assert_carried(tmp_path / "run/model")
    for name in CARRIED:
        assert (tmp_path / "run/model" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_every_file_of_a_tokenizer_is_copied(tmp_path: Path) -> None:
    names = ["tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", *CARRIED]
    for name in [*names, "model.safetensors", "config.json", "modeling.py"]:
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(name)
    (tmp_path / "b").mkdir()
    copy_model_files(tmp_path / "a", tmp_path / "b")
    assert sorted(str(f.relative_to(tmp_path / "b")) for f in (tmp_path / "b").rglob("*") if f.is_file()) == sorted(
        names
    )


# --- EOS tokens ----------------------------------------------------------------------------------------------------


def test_every_eos_token_of_the_list_ends_a_text(checkpoint: Path, cli: Cli) -> None:
    """The second id of the list is a token that the model writes; CLI, batch and `generate` stop there."""
    model = TwoTowerForCausalLM.from_pretrained(checkpoint)
    prompt = torch.tensor([model.tokenizer("Sort: Bo Ada")["input_ids"]])
    written = model.generate_ar(prompt, 24)[0, prompt.shape[1] :].tolist()
    place = next(i for i in range(1, 24) if written[i] not in written[:i])
    add_files(checkpoint, eos_token_id=[2, written[place]])
    again = TwoTowerForCausalLM.from_pretrained(checkpoint)
    assert again.generate(prompt, max_new_tokens=24)[0, prompt.shape[1] :].tolist()[place:] == [written[place]]
    assert again.generate_ar(prompt, 24).shape[1] == prompt.shape[1] + 24  # the published default: no EOS
    args = ("generate", "Sort: Bo Ada", "-m", checkpoint, "--mode", "ar", "-n", "24", "--dtype", "float32", "--json")
    result = json.loads(cli(*args).out)
    assert result["finish_reason"] == "eos", result
    (checkpoint / "generation_config.json").unlink()
    assert json.loads(cli(*args).out)["finish_reason"] == "length"


# --- sampling defaults ---------------------------------------------------------------------------------------------


def test_sampling_defaults_apply_in_the_server_only(checkpoint: Path, tmp_path: Path) -> None:
    model = TwoTowerForCausalLM.from_pretrained(add_files(checkpoint, do_sample=False))
    sampling = sampling_defaults(model, None, print)
    assert sampling == {"temperature": 0.0}
    with serving(model=model, decoding={"mode": "ar"}, sampling=sampling) as server:
        texts = {server.complete("Sort:", max_tokens=12).json()["choices"][0]["text"] for _ in range(3)}
        assert len(texts) == 1  # greedy, although the API's default temperature is 1
        sampled = {server.complete("Sort:", max_tokens=12, temperature=2.0).json()["choices"][0]["text"] for _ in "abc"}
        assert len(sampled) > 1
    with serving(model=model, decoding={"mode": "ar"}, sampling=sampling_defaults(model, "none", print)) as server:
        assert len({server.complete("Sort:", max_tokens=12).json()["choices"][0]["text"] for _ in range(3)}) > 1


def test_generation_config_of_the_server(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TwoTowerForCausalLM.from_pretrained(checkpoint)
    assert sampling_defaults(model, None, print) == {"temperature": 0.6, "top_p": 0.95}
    said = capsys.readouterr().out
    assert "temperature 0.6, top_p 0.95" in said
    assert "length_penalty has no effect" in said
    assert sampling_defaults(model, "none", print) == {}
    other = tmp_path / "other.json"
    other.write_text('{"top_k": 20, "temperature": null, "repetition_penalty": 1.2, "min_p": 0.1}')
    assert sampling_defaults(model, str(other), print) == {"top_k": 20, "repetition_penalty": 1.2, "min_p": 0.1}
    assert model_loading.eos_of(model) == (2, 11)  # the given file has none
    other.write_text('{"eos_token_id": 5}')
    assert sampling_defaults(model, str(other), print) == {}
    assert model_loading.eos_of(model) == (5,)
    for given in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match=r"generation.config"):
            sampling_defaults(model, str(given), print)


# --- errors and info -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not readable as JSON"),
        ("[]", "contains a list"),
        ('{"eos_token_id": [2, 999]}', "eos_token_id is [2, 999]; it must have token ids from 0 to 300"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>'"),
    ],
)
def test_a_damaged_file(checkpoint: Path, cli: Cli, text: str, said: str) -> None:
    (checkpoint / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        TwoTowerForCausalLM.from_pretrained(checkpoint)
    assert_one_line_error(cli("info", checkpoint), "generation_config.json", said)
    assert_one_line_error(cli("generate", "a", "-m", checkpoint), said)


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_p": 0}, {"top_k": 1.5}, {"temperature": "hot"}])
def test_a_sampling_default_that_is_not_allowed(checkpoint: Path, cli: Cli, values: dict[str, Any]) -> None:
    add_files(checkpoint, **values)
    (name,) = values
    assert_one_line_error(cli("info", checkpoint), f"{name} is {values[name]!r}; it must be")
    assert cli("generate", "a", "-m", checkpoint, "-n", "2").code == 0


def test_info_shows_values_and_their_files(checkpoint: Path, cli: Cli) -> None:
    facts = json.loads(cli("info", checkpoint, "--json").out)
    assert facts["generation"] == {
        "eos_token_id": [2, 11],
        "eos_source": "generation_config.json",
        "sampling": {"temperature": 0.6, "top_p": 0.95},
        "unused": ["length_penalty"],
        "chat_template": "chat_template.jinja",
        "chat_templates": ["brief"],
        "mask_token_id": 3,
        "mask_token": "<mask>",
    }
    page = cli("info", checkpoint).out
    assert "EOS tokens: 2, 11 (generation_config.json)" in page
    assert "temperature 0.6, top_p 0.95 (generation_config.json)" in page
    assert "chat_template.jinja, also brief" in page
    (checkpoint / "generation_config.json").unlink()
    facts = json.loads(cli("info", checkpoint, "--json").out)
    assert facts["generation"]["eos_source"] == "config.json"
