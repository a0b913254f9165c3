"""Runs Python scripts in processes that are forked from one that has imported torch and this package.

A script has a process, arguments, an environment and output of its own, as with `subprocess.run`, but spends no seconds
on imports. Where there is no fork, it is `subprocess.run`.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

# Reads a job a line, and answers with an exit status. The imports start no thread, because OMP_NUM_THREADS is 1.
PARENT = """
import json, os, runpy, sys
import rich.table, torch, torch._dynamo, transformers.modeling_utils
from twotower import LLM, TwoTowerForCausalLM
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(name, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv, sys.path[0] = job["command"], os.path.dirname(job["command"][0])
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


@cache
def _parent() -> subprocess.Popen[str]:
    """The process that forks, one for each test process; it ends with its standard input."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert started.stdin is not None
    atexit.register(started.stdin.close)
    return started


def run_script(script: Path, *arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """The exit status, stdout and stderr of a script. environment: all variables of its process."""
    command = [str(script), *arguments]
    if not hasattr(os, "fork"):
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=dict(environment))
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        job = {"command": command, "environment": dict(environment), "out": str(out), "err": str(err)}
        parent = _parent()
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(json.dumps(job) + "\n")
        parent.stdin.flush()
        code = int(parent.stdout.readline())
        return subprocess.CompletedProcess(command, code, out.read_text("utf-8"), err.read_text("utf-8"))
