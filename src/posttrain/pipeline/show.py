"""What training verbs print: the resolved keys with where each came from, notices, and the live view."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from posttrain.pipeline.run import Watch


class _OneLine(logging.Handler):
    """A notice is one line, however long, between the lines of the live view."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


def setup_logging(console: Console, *, is_main: bool = True) -> None:
    """Our notices on stderr, from rank 0; the libraries' only from warnings up."""
    logging.basicConfig(level=logging.WARNING, handlers=[_OneLine(console)], force=True)
    logging.getLogger("posttrain").setLevel(logging.INFO if is_main else logging.ERROR)
    quiet_libraries()


def quiet_libraries() -> None:
    """No progress bars of the libraries between our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # A hub that cannot be reached is one error of ours, not a page of retries.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # Kernels that it would fetch for inference in 4 bits; none of ours are.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def show_keys(loaded: Any, console: Console, *, defaults: bool) -> None:
    """Every key that was set, by whom; then the defaults, or how many there are."""
    from posttrain.config.load import describe_keys
    from posttrain.config.schema import show_value

    table = Table("key", "value", "from", box=None, header_style="dim", pad_edge=False)
    rows = describe_keys(loaded)
    kept = [row for row in rows if defaults or row[2] != "default"]
    for key, value, origin in kept:
        table.add_row(Text(key), Text(show_value(value)), Text(origin), style="dim" if origin == "default" else "")
    console.print(table)
    if len(kept) < len(rows):
        console.print(
            f"{len(rows) - len(kept)} defaults: --verbose shows them, the run's config.yaml has them",
            style="dim",
            highlight=False,
        )
    for note in loaded.notes:
        console.print(f"note: {note}", markup=False)


def live_watch(console: Console, is_main: bool) -> Watch:
    """The live view on rank 0; the other ranks are silent."""
    from posttrain.pipeline.run import Watch
    from posttrain.tracking.live import LiveView

    if not is_main:
        return Watch(say=lambda text: None)

    def show_eval(name: str, done: int, total: int) -> None:
        console.print(f"eval {name} {done}/{total}", markup=False)

    return Watch(
        sinks=lambda kind, total: [LiveView(kind, total, console)],
        evals=show_eval,
        say=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
    )
