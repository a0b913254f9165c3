"""vLLM in the environment of `make test-vllm`: a server, or models one after the other."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from twotower_vllm.draft_settings import DRAFTER

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("vllm_child.py")
START = 600  # seconds until a server must answer
DRAFTED = 7  # tokens of a draft
SPECULATIVE = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": DRAFTED}
VERIFIED = ("--no-enable-prefix-caching", "--speculative-config", json.dumps(SPECULATIVE))


@dataclass(frozen=True)
class Vllm:
    """A Python with vLLM, and a folder with the installed plugin."""

    python: str
    site: Path

    @classmethod
    def install(cls, python: str, folder: Path) -> Vllm:
        """Builds the plugin from a copy of its sources, and installs the wheel into a folder of its own."""
        source = folder / "source"
        shutil.copytree(ROOT / "integrations" / "vllm", source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
        subprocess.run(wheel, check=True, env=_clean())
        (built,) = folder.glob("*.whl")
        subprocess.run(
            [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(built)], check=True, env=_clean()
        )
        return cls(python, folder / "site")

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process of vLLM."""
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # else two workers need two NUMA nodes
        return _clean() | own | {"PYTHONPATH": os.pathsep.join([str(self.site), str(ROOT / "src")])}

    def command(self, model: Path, port: int, *options: str) -> list[str]:
        """The command that serves a model in fp32. The program `vllm` itself does not run with the CPU package."""
        module = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        plain = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--port", str(port)]
        return [*module, *plain, "--host", "127.0.0.1", *options]

    @contextmanager
    def serving(self, model: Path, log: Path, *options: str) -> Iterator[Server]:
        """A server of a model."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with log.open("w") as output:
            process = subprocess.Popen(
                self.command(model, port, *options), stdout=output, stderr=subprocess.STDOUT, env=self.environment
            )
            try:
                yield Server(f"http://127.0.0.1:{port}", str(model)).started(process, log)
            finally:
                process.terminate()
                process.wait(timeout=60)

    def refused(self, model: Path, *options: str) -> str:
        """The last line of a server that does not start; its exit code must be 2."""
        command = self.command(model, 1, *options)
        ended = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=START)
        assert ended.returncode == 2, ended.stderr[-3000:]
        assert "Traceback" not in ended.stderr
        return ended.stderr.strip().splitlines()[-1]

    def run(self, jobs: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
        """The answers of `vllm_child.py`."""
        answers = folder / "answers.jsonl"
        with (folder / "child.log").open("w") as log:
            subprocess.run(
                [self.python, str(CHILD), str(answers)], input=json.dumps(list(jobs)), text=True, check=True,
                stdout=log, stderr=subprocess.STDOUT, env=self.environment,
            )  # fmt: skip
        return [json.loads(line) for line in answers.read_text().splitlines()]


@dataclass(frozen=True)
class Server:
    """A server of vLLM at an address."""

    url: str
    model: str

    def started(self, process: subprocess.Popen[bytes], log: Path) -> Server:
        """Waits until the server answers."""
        end = time.monotonic() + START
        while time.monotonic() < end:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                time.sleep(1)
        raise TimeoutError(log.read_text()[-3000:])

    def complete(self, prompt: list[int], new: int, **fields: object) -> list[int]:
        """The new tokens of a completion, greedy unless fields say otherwise."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body | {"return_token_ids": True} | fields, timeout=600)
        answer.raise_for_status()
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens

    def texts(self, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
        """Greedy completions of all prompts, eight at a time."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, new), prompts))

    def count(self, name: str) -> float:
        """The sum of a counter of /metrics."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def _clean() -> dict[str, str]:
    """The environment without the variables of the Python that runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
