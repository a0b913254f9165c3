"""Finds the directory of a checkpoint: a local directory, or a snapshot of the needed files of a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TypedDict

from twotower.checkpoint.atomic import finish_save
from twotower.errors import ArgumentError, CheckpointError


class HubArguments(TypedDict, total=False):
    """Arguments of `from_pretrained` that the hub client gets."""

    revision: str | None
    cache_dir: str | Path | None
    token: bool | str | None
    local_files_only: bool
    force_download: bool


# Patterns of the hub, in which * also matches a slash.
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.codes")
_WEIGHTS = ("*.safetensors",)


def resolve_source(
    source: str | PathLike[str],
    hub: HubArguments,
    subfolder: str | None = None,
    code: bool = False,
    weights: bool = True,
) -> Path:
    """The directory itself, or a snapshot of the needed files from the hub; with `subfolder`, that folder in it.

    hub: arguments of the hub client. code, weights: whether Python files and weights are needed.

    Raises:
        ArgumentError: the source or the subfolder is not a path.
        CheckpointError: there is no such directory or subfolder, or the download failed.
    """
    if not isinstance(source, str | PathLike) or isinstance(source, bytes) or not str(source):
        raise ArgumentError(f"the checkpoint is {source!r}; give a directory or a hub id of the form owner/name")
    inside = _subfolder(subfolder)
    patterns = (*_SMALL, *(_WEIGHTS if weights else ()), *(("*.py",) if code else ()))
    root = _root(source, hub, inside, patterns)
    finish_save(root / inside)
    if inside and not (root / inside).is_dir():
        raise CheckpointError(f"{source}: has no folder {inside}; correct subfolder")
    return root / inside


def _root(source: str | PathLike[str], hub: HubArguments, inside: str, patterns: Sequence[str]) -> Path:
    directory = Path(source)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise CheckpointError(f"{directory} is a file; give the directory with config.json and the weights")
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: no such directory, and not a hub id of the form owner/name; check the path")
    from huggingface_hub import snapshot_download

    wanted = [f"{inside}/{pattern}" for pattern in patterns] if inside else list(patterns)
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted, **hub))
    except Exception as error:  # the hub client raises many types; the user needs one line
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{source}: no such directory, and the hub download failed ({first}); check the name and the connection"
        ) from None


def _subfolder(given: object) -> str:
    """The subfolder as a relative path without `..`; empty for none."""
    if given is None or given == "":
        return ""
    path = PurePosixPath(given) if isinstance(given, str) else None
    if path is None or path.is_absolute() or ".." in path.parts:
        raise ArgumentError(f"subfolder is {given!r}; give the name of a folder inside the checkpoint")
    return "" if path == PurePosixPath(".") else str(path)
