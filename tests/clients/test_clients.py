"""Real clients with the server: each in its own environment, by `make test-clients`.

The bundled model serves them. Texts that the model would choose come from a script, and forced calls from the model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import environments
import pytest
from chat_templates import TEMPLATES
from scripted import ScriptedLLM
from serving import RunningServer, serving, wait_until

from twotower import LLM, TwoTowerForCausalLM, bundled_model
from twotower.server.service import Service
from twotower.server.settings import ServerSettings

# The bundled model, which writes constrained texts, would not end its reasoning.
NO_REASONING = '{% if messages[-1].content != "think" %}<think></think>{% endif %}'
FOLDER = os.environ.get("CLIENT_ENVIRONMENTS")  # of the environments
SECONDS = 300  # of one client

if not FOLDER:
    pytest.skip("`make test-clients` runs the clients: it installs their packages", allow_module_level=True)


def reply(prompt: str) -> str:
    """A call of `weather` if there are tools, and an answer after its result."""
    turn = prompt.rpartition("<|im_start|>user")[2]
    if "<|im_start|>tool" in turn:
        return "It is 21 degrees in Ulm."
    if "<tools>" in prompt:
        return 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
    return "<think>\nUlm is a city.\n</think>\n\nYes."


@pytest.fixture(scope="module")
def served() -> Iterator[RunningServer]:
    model = TwoTowerForCausalLM.from_pretrained(bundled_model("small"), dtype="float32")
    model.tokenizer.chat_template = TEMPLATES["hermes"] + NO_REASONING
    engine = ScriptedLLM(LLM(model, rows=2, length=4096), reply)
    with serving(service=Service(engine, ServerSettings(name="small", decoding={"mode": "verified"}))) as found:
        yield found
        wait_until(found.is_idle)


@pytest.mark.parametrize("group", sorted(path.name for path in environments.GROUPS.iterdir()))
@pytest.mark.timeout(900)
def test_client(served: RunningServer, group: str) -> None:
    if environments.is_npm(group) and not shutil.which("npm"):
        pytest.skip("node and npm are not installed")
    command = environments.command(group, Path(FOLDER or "").resolve())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI_"))}
    done = subprocess.run(
        [*command, f"{served.address}/v1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
