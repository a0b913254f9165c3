"""A fake hub: repositories are folders, and a download copies the files that the patterns allow, as the hub does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects


class FakeHub:
    """Replaces `huggingface_hub.snapshot_download`. calls: the arguments of each download."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.calls: list[dict[str, object]] = []
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def publish(self, name: str, directory: Path) -> str:
        """Makes a folder available under a hub id."""
        shutil.copytree(directory, self.root / "repositories" / name)
        return name

    def snapshot_download(self, name: str, *, allow_patterns: list[str], **arguments: object) -> str:
        self.calls.append(arguments | {"name": name})
        repository = self.root / "repositories" / name
        if not repository.is_dir():
            raise OSError(f"404: {name}")
        files = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]
        snapshot = self.root / "snapshots" / name
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / file, snapshot / file)
        return str(snapshot)
