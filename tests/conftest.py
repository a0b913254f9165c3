"""Fixtures of all tests: golden data, random models without trivial zeros, and the command line."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

import proofs
import pytest
import torch
import triton_mode  # noqa: F401  before anything that imports Triton
from code_paths import PROPERTY
from command import Result
from torch import nn

from twotower import TwoTowerConfig, TwoTowerForCausalLM
from twotower.cli.main import run_cli
from twotower.model.adapters import LowRank, MaskEmbedding
from twotower.model.conditioning import TimeConditioning
from twotower.model.delta_net import GatedDeltaNet
from twotower.model.draft_head import DraftHead
from twotower.model.fp32_tensors import cast
from twotower.model.linear import Linear, TiedHead
from twotower.model.mamba2 import Mamba2
from twotower.model.moe import Experts, Router
from twotower.model.norm import GatedGroupRMSNorm, RMSNorm
from twotower.ops.cpu import library

library.library()  # compiles now, so that the compiler does not write to stderr during a test
torch.set_num_threads(
    1
)  # a second thread slows tiny tensors down, and one thread gives the same results on all machines

GOLDEN = Path(__file__).parent / "golden"
EVERY_KIND = "M*E-M"  # all four layer kinds, and a Mamba layer after the others

SHAPE = {
    "hidden_size": 32,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "mamba_num_heads": 4,
    "mamba_head_dim": 10,
    "ssm_state_size": 8,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 16,
    "intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 28,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}

# Long files come first, so that no worker runs a long file last. `make test` keeps xdist from sorting files anew.
LONG_FILES = (
    "test_benchmarks.py", "test_avx2.py", "test_avx512.py", "test_avx512_bf16.py", "test_none.py", "test_page.py",
    "test_triton_compile.py", "test_goldens_decoding.py", "test_backbones.py", "test_two_processes.py",
    "test_trainer.py", "test_gpu_script.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    proofs.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    proofs.configure(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    proofs.note_proofs(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints which code paths ran, and why others did not."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    said = {value for report in reports for name, value in getattr(report, "user_properties", ()) if name == PROPERTY}
    if said:
        terminalreporter.section("code paths of this processor")
        terminalreporter.write_line("\n".join(sorted(said)))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder with the golden data."""
    return GOLDEN


@pytest.fixture(scope="session")
def random_model() -> Callable[..., TwoTowerForCausalLM]:
    """`random_model(pattern, seed, dtype, **overrides)`: see `build_random_model`."""
    return build_random_model


def build_random_model(
    pattern: str = EVERY_KIND, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object
) -> TwoTowerForCausalLM:
    """A tiny two-tower model with random weights, those of the time conditioning included.

    A seed gives the same weights in every dtype (drawn in fp32, then cast). Logits have a standard deviation of about
    3, so that near ties are rare and confidences spread over (0, 1); with another vocabulary than that of `SHAPE`, 1.
    overrides: keys of `config.json`.
    """
    config = TwoTowerConfig(hybrid_override_pattern=pattern, **{**SHAPE, **overrides})
    spread = 3.0 if config.vocab_size == SHAPE["vocab_size"] else 1.0
    return random_two_tower(config, seed, dtype, spread)


def random_two_tower(config: TwoTowerConfig, seed: int, dtype: torch.dtype, spread: float = 3.0) -> TwoTowerForCausalLM:
    """As `build_random_model`, for any configuration. spread: the standard deviation of the logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TwoTowerForCausalLM(config)
        with torch.no_grad():
            for module in model.modules():
                _randomise(module)
            for tower in model.towers():
                if isinstance(tower.head, TiedHead):
                    tower.embeddings.weight *= spread * config.hidden_size**-0.5
                else:
                    tower.head.weight *= spread
    cast(model, dtype)
    return model.eval()


def _randomise(module: nn.Module) -> None:
    """Draws a module's own parameters anew, at a scale that keeps activations near 1."""
    match module:
        case Linear():
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        case DraftHead():
            nn.init.normal_(module.previous)
            nn.init.normal_(module.following)
        case nn.Embedding() | MaskEmbedding():
            nn.init.normal_(module.weight)
        case LowRank():
            nn.init.normal_(module.a, std=module.a.shape[1] ** -0.5)
            nn.init.normal_(module.b, std=module.b.shape[1] ** -0.5)
        case RMSNorm():
            nn.init.normal_(module.weight, mean=1.0 - module.offset, std=0.2)
        case GatedGroupRMSNorm():
            nn.init.normal_(module.weight, mean=1.0, std=0.2)
        case Router():
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            # Not negative: with negative biased scores, masked groups can be selected; a separate test covers this.
            if module.e_score_correction_bias is not None:
                module.e_score_correction_bias.uniform_(0.0, 0.3)
        case Experts():
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=weight.shape[2] ** -0.5)
        case GatedDeltaNet():
            nn.init.normal_(module.conv1d.weight, std=0.5)
            nn.init.uniform_(module.A_log, 0.0, math.log(8.0))
            nn.init.normal_(module.dt_bias, mean=-2.0)  # as below
        case Mamba2():
            nn.init.normal_(module.conv1d.weight, std=0.5)
            if module.conv1d.bias is not None:
                nn.init.normal_(module.conv1d.bias, std=0.3)
            nn.init.uniform_(module.A_log, 0.0, math.log(8.0))
            nn.init.normal_(module.dt_bias, mean=-2.0)  # steps near 0.1, so that the state depends on tens of tokens
            nn.init.normal_(module.D, mean=1.0, std=0.3)
        case TimeConditioning():
            for table in module.scale_shift_tables:
                nn.init.normal_(table, std=0.3)
                table[2] += 1.0  # gates


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs one command line in this process, with `stdin` as piped input."""

    def call(*args: str | Path, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = run_cli([str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return call
