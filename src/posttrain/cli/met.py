"""A training verb among the processes that were started with it: they meet first, and what ends them is printed once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from posttrain.errors import EXIT_CRASH, EXIT_USAGE, PosttrainError

if TYPE_CHECKING:
    from posttrain.distributed.meeting import Meeting


@contextmanager
def met() -> Iterator[Meeting | None]:
    """Where all ranks of this start have met; None for a process that is alone.

    Inside, an error that several ranks have is printed by one of them, and a rank that only ends because another one failed
    prints nothing, and ends after it. Raises: ConfigError if the environment says of several processes what cannot be.
    """
    from posttrain.cli.terminal import tell_error
    from posttrain.distributed.launch import not_read, read_launch

    launch = read_launch(os.environ, sys.argv[1:])
    if launch is None:
        yield None
        return
    from posttrain.distributed.meeting import PeerFailedError, is_of_a_peer, meet

    meeting = meet(launch, _say)
    if meeting.is_main and (line := not_read(os.environ)):
        _say(line)
    try:
        meeting.refuse_other_code()
        yield meeting
    except PosttrainError as error:
        if meeting.is_mine_to_say(error):
            tell_error(error, "" if meeting.is_main else f"rank {launch.rank}: ")
            meeting.has_said()
        raise typer.Exit(EXIT_USAGE) from None
    except typer.Exit:
        raise
    except Exception as error:
        if meeting.another_failed():
            raise typer.Exit(EXIT_CRASH) from None
        if isinstance(error, PeerFailedError) or is_of_a_peer(error):
            _say(
                f"rank {launch.rank}: another rank is gone ({str(error).splitlines()[0]}); the launcher says which one"
            )
            raise typer.Exit(EXIT_CRASH) from None
        raise


def _say(line: str) -> None:
    typer.echo(line, err=True)
