"""Environments of the clients, one for each group: a virtual environment, or a folder with node_modules.

They lie in a folder outside of the package, and are made again when the lock file of their group changes.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

GROUPS = Path(__file__).parent / "groups"
NPM = ("package.json", "package-lock.json")


def is_npm(group: str) -> bool:
    return (GROUPS / group / "package.json").exists()


def command(group: str, folder: Path) -> list[str]:
    """The command that runs the client of a group. Installs the locked packages in `folder / group` first.

    Raises:
        CalledProcessError: The packages cannot be installed.
    """
    source, target = GROUPS / group, folder / group
    locks = NPM if is_npm(group) else ("requirements.txt",)
    digest = hashlib.sha256(b"".join((source / name).read_bytes() for name in locks)).hexdigest()
    stamp = target / "installed"
    if not stamp.exists() or stamp.read_text() != digest:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        if is_npm(group):
            for name in NPM:
                shutil.copy(source / name, target)
            subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=target, check=True)
        else:
            subprocess.run([sys.executable, "-m", "venv", target], check=True)
            lock = source / "requirements.txt"
            alone = ["--no-deps"] if lock.read_text().startswith("# without dependencies") else []
            install = [target / "bin" / "pip", "install", "--quiet", *alone, "-r", lock]
            subprocess.run(install, check=True)
        stamp.write_text(digest)
    if is_npm(group):
        shutil.copy(source / "client.mjs", target)  # beside node_modules, where node looks for packages
        return ["node", str(target / "client.mjs")]
    return [str(target / "bin" / "python"), str(source / "client.py")]
