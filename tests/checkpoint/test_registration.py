"""The effect of `import twotower`: transformers' Auto classes recognise two-tower checkpoints, and nothing else.

Every case runs in a process of its own, because a registration stays for as long as its process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_backbones import two_tower

from twotower.auto import _FACTORY, _MARK

OURS, THEIRS = "twotower.modeling_twotower.TwoTowerForCausalLM", "transformers.models.nemotron_h"
# Loads a two-tower checkpoint as a user does, twice, and compares a weight with the one in the file.
LOAD = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
stored = load_file(folder + "/model.safetensors")
name = next(name for name in stored if name.endswith("layers.0.mixer.in_proj.weight"))
first, second = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
def weight(model):
    names = [name for name, _ in model.named_parameters() if name.endswith("layers.0.mixer.in_proj.weight")]
    return model.get_parameter(names[0]).float()
others = [type(AutoModelForCausalLM.from_pretrained(other)) for other in sys.argv[2:]]
print(json.dumps({
    "others": [f"{other.__module__}.{other.__name__}" for other in others],
    "class": f"{type(first).__module__}.{type(first).__name__}",
    "stored": bool(torch.equal(weight(first), stored[name].float())),
    "equal": bool(torch.equal(weight(first), weight(second))),
}))
"""
# Each way to import twotower must give one registration.
ORDERS = {
    "twotower first": "import twotower, FACTORY",
    "the factory first": "import FACTORY; import twotower",
    "twotower twice": "import twotower; del sys.modules['twotower'], sys.modules['twotower.auto']; import twotower",
    "a reload": "import twotower; importlib.reload(twotower)",
    "a reload afterwards": "import FACTORY, twotower; importlib.reload(twotower)",
    "a reload of auto": "import twotower.auto; importlib.reload(twotower.auto).register()",
    "a reload of auto afterwards": "import FACTORY, twotower.auto; importlib.reload(twotower.auto).register()",
    "register twice": "import twotower.auto; twotower.auto.register(); twotower.auto.register()",
    "register twice afterwards": "import FACTORY, twotower.auto; twotower.auto.register(); twotower.auto.register()",
    "a reload of the factory": "import twotower, FACTORY as factory; importlib.reload(factory)",
    "the factory was looked for": "import twotower, importlib.util; importlib.util.find_spec('FACTORY')",
    "the factory was forgotten": "import twotower, FACTORY; del sys.modules['FACTORY']",
    "a second hook": "import twotower.auto; sys.meta_path.insert(1, twotower.auto._FactoryHook())",
}
# Each case runs in a fork of a process that has imported all dependencies of the factory, but not the factory. A case
# reports the class that the factory selects for each architecture, and the number of nested registrations.
CHILD = """
import importlib, json, os, sys
from types import SimpleNamespace
import torch, transformers.modeling_utils
for case, code in json.loads(sys.argv[1]).items():
    if os.fork():
        assert os.wait()[1] == 0, case
        continue
    assert "FACTORY" not in sys.modules
    exec(code)
    choose = importlib.import_module("FACTORY")._get_model_class
    plain = SimpleNamespace(architectures=["Plain"], name_or_path="")
    ours = SimpleNamespace(architectures=["NemotronHTwoTowerForCausalLM"])
    chosen = choose(ours, {}), choose(plain, {SimpleNamespace: str})
    layers = 0
    while hasattr(choose, MARK):
        layers += 1
        choose = next(cell.cell_contents for cell in choose.__closure__ if callable(cell.cell_contents))
    hooks = sum(hasattr(finder, MARK) for finder in sys.meta_path)
    names = [f"{one.__module__}.{one.__name__}" for one in chosen]
    print(json.dumps({case: [*names, layers, hooks]}), flush=True)
    os._exit(0)
"""


def run(code: str, *arguments: str, **variables: str) -> str:
    """The output of a program in a new process."""
    code = code.replace("FACTORY", _FACTORY).replace("MARK", repr(_MARK))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | variables
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(before: str, *checkpoints: Path) -> dict[str, Any]:
    """The report of `LOAD` in a program that starts with `before`."""
    report = json.loads(run(before + LOAD, *map(str, checkpoints)).splitlines()[-1])
    assert isinstance(report, dict)
    return report


def test_without_the_registration_transformers_builds_its_own_class_with_random_weights(golden_dir: Path) -> None:
    """Without the registration there is no error, but another class with random weights."""
    report = loaded("", golden_dir / "tiny-hybrid")
    assert report["class"].startswith(THEIRS)
    assert not report["stored"]
    assert not report["equal"]


def test_with_the_registration_the_checkpoint_is_loaded(golden_dir: Path, tmp_path: Path) -> None:
    """Also that of another backbone, whose model_type transformers does not know."""
    two_tower("llama").save_pretrained(tmp_path)
    report = loaded("import twotower", golden_dir / "tiny-hybrid", tmp_path)
    assert report == {"class": OURS, "stored": True, "equal": True, "others": [OURS]}


@pytest.fixture(scope="module")
def registrations() -> dict[str, list[Any]]:
    """The result of `CHILD` in each case of `ORDERS`."""
    out: dict[str, list[Any]] = {}
    orders = json.dumps({case: code.replace("FACTORY", _FACTORY) for case, code in ORDERS.items()})
    for line in run(CHILD, orders).splitlines():
        out |= json.loads(line)
    return out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("order", ORDERS)
def test_there_is_one_registration_however_twotower_is_imported(
    order: str, registrations: dict[str, list[Any]]
) -> None:
    assert registrations[order] == [OURS, "builtins.str", 1, 2 if order == "a second hook" else 1]


# --- the import itself ------------------------------------------------------------------------------------------------


def test_the_import_is_light() -> None:
    """The import loads three modules of this package and few of the standard library."""
    code = "import sys; before = set(sys.modules); import twotower; print(*sorted(set(sys.modules) - before))"
    added = run(code).split()
    assert {name for name in added if name.split(".")[0] == "twotower"} == {
        "twotower", "twotower.auto", "twotower.version"
    }  # fmt: skip
    assert {name.split(".")[0] for name in added} - {"twotower"} <= sys.stdlib_module_names
    assert len(added) <= 40, added  # 32 in Python 3.11


def test_the_import_leaves_the_process_alone() -> None:
    """Warning filters, signals, the path, the environment and excepthooks do not change."""
    code = """
import os, signal, sys, warnings
def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return [list(warnings.filters), handlers, list(sys.path), dict(os.environ), sys.excepthook, sys.displayhook]
before, finders = state(), list(sys.meta_path)
import twotower
assert state() == before
assert len(sys.meta_path) == len(finders) + 1 and sys.meta_path[1:] == finders
"""
    assert run(code) == ""


def fake_transformers(folder: Path, factory: str) -> Path:
    """A package with only the factory module of the Auto classes."""
    package = folder / "transformers" / "models" / "auto"
    package.mkdir(parents=True)
    for directory in (package, package.parent, package.parent.parent):
        (directory / "__init__.py").write_text("")
    (package / "auto_factory.py").write_text(factory)
    return folder


@pytest.mark.parametrize("order", ["import twotower, FACTORY", "import FACTORY, twotower"])
def test_another_transformers_is_told_about_and_nothing_fails(order: str, tmp_path: Path) -> None:
    """A version without the function that the registration replaces: one warning, and both imports succeed."""
    fake = fake_transformers(tmp_path, "answer = 42\n")
    code = (
        "import sys, warnings; sys.path.insert(0, sys.argv[1])\nwith warnings.catch_warnings(record=True) as found:\n"
    )
    code += f"    warnings.simplefilter('always')\n    {order}\n"
    code += "print(sys.modules['FACTORY'].answer, [str(one.message)[:71] for one in found])"
    said = "AutoModelForCausalLM does not recognise two-tower checkpoints with this"
    assert run(code, str(fake)) == f"42 {[said]}\n"


def test_a_transformers_that_cannot_be_imported_keeps_its_own_error(tmp_path: Path) -> None:
    fake = fake_transformers(tmp_path, "raise ImportError('no such thing')\n")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import twotower\ntry:\n    import FACTORY\n"
    code += "except ImportError as error: print(error)"
    assert run(code, str(fake)) == "no such thing\n"


def test_without_transformers_the_import_succeeds() -> None:
    assert run("import sys; sys.modules['transformers'] = None; import twotower; print(twotower.__version__)").strip()


def test_sources_of_the_factory_can_still_be_read() -> None:
    code = (
        "import twotower, inspect, FACTORY as factory;"
        "print('def from_pretrained' in inspect.getsource(factory._BaseAutoModelClass), factory.__spec__.origin)"
    )
    found, origin = run(code).split()
    assert found == "True"
    assert origin.endswith("auto_factory.py")
