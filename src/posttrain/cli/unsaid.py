"""A verb with sub-verbs of which one need not be said: `posttrain gate A B`, `posttrain data CONFIG`."""

from __future__ import annotations

from typing import Any, ClassVar

from typer.core import TyperGroup


class UnsaidVerb(TyperGroup):
    """What begins with no sub-verb is `unsaid`."""

    unsaid: ClassVar[str]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = args and (args[0] in self.commands or args[0] in ("--help", "-h"))
        return super().parse_args(ctx, args if known else [self.unsaid, *args])
