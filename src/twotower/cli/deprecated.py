"""Renamed options: the old spelling works in this release, but is hidden and prints a note on stderr."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.parser import _OptionParser


def formerly(old: str) -> type[click.Option]:
    """The `cls` of an option that was renamed: `click.option("--lr", cls=formerly("--rate"), type=float)`.

    The old spelling sets the same parameter, is absent from the help and prints one line on stderr. Both spellings
    together are a usage error. The old spelling of an on/off option is given as `"--old/--no-old"`.
    """
    return type("RenamedOption", (_RenamedOption,), {"old": old.split("/")})


class _RenamedOption(click.Option):
    old: list[str]

    def add_to_parser(self, parser: _OptionParser, ctx: click.Context) -> None:
        super().add_to_parser(parser, ctx)
        former = copy.copy(self)
        former.name, former.opts, former.secondary_opts = self._old_key, self.old[:1], self.old[1:]
        click.Option.add_to_parser(former, parser, ctx)

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, object], args: list[str]
    ) -> tuple[object, list[str]]:
        if self._old_key in opts:
            old, new = self.old[0], max(self.opts, key=len)
            if self.name in opts:
                raise click.UsageError(f"{old} is the old name of {new}; give only {new}", ctx)
            if not ctx.resilient_parsing:
                click.echo(f"{old} is deprecated; use {new}", err=True)
            opts = {**opts, str(self.name): opts[self._old_key]}
        return super().handle_parse_result(ctx, opts, args)

    @property
    def _old_key(self) -> str:
        """The parser's key for a value of the old spelling."""
        return f"{self.name} {self.old[0]}"
