"""What an agent may do with `--allow-run`: command lines of ours, each run in a process of its own and shown before its answer."""

# Annotations stand as values here: pydantic makes the tools' schemas of them.
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Annotated, Any, Literal

from pydantic import Field

from posttrain.cli.agent_folder import ServedFolder
from posttrain.cli.agent_tools import ConfigPath, Overrides, RegistryPath, RunPath
from posttrain.errors import ConfigError

EXIT_WORDS: Mapping[int, str] = {
    0: "done, or PASS", 1: "FAIL", 2: "INCONCLUSIVE", 3: "INVALID", 4: "a verdict waits for a person", 5: "passed and registered, but refused the alias",
    64: "what the user must fix", 70: "a defect of posttrain", 75: "stopped and saved; start it again to go on", 130: "interrupted",
}  # fmt: skip
"""As docs/architecture.md has them."""
_REFUSED = (64, 70)
_TAIL_BYTES = 8192
_ENTRY = "from posttrain.cli.app import main; main()"
Reason = Annotated[str, Field(min_length=1, description="Why; it is kept in the records.")]


@dataclass(frozen=True, slots=True)
class Act:
    """A command line and how it ended; `code` is None while it goes on."""

    command: str
    code: int | None
    output: str

    @property
    def is_refused(self) -> bool:
        return self.code is not None and (self.code in _REFUSED or self.code < 0)

    @property
    def ending(self) -> str:
        if self.code is None:
            return "still running: `runs` and `metrics` show how far; the same call again waits for its end"
        return f"exit code {self.code}: {EXIT_WORDS.get(self.code, 'killed' if self.code < 0 else 'see its output')}"


class ActTools:
    """The tools that act. What still runs when the server ends is told to stop, and saves; it goes on when it is started again.

    With `only_show` each answers the command line that it would run.
    """

    def __init__(self, place: ServedFolder, *, only_show: bool = False) -> None:
        self.place = place
        self._only_show = only_show
        self._going: dict[tuple[str, ...], tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        self._lock = threading.Lock()

    @property
    def table(self) -> tuple[Callable[..., Any], ...]:
        return (self.run, self.gate_decide, self.promote, self.rollback)

    def run(
        self, *, config: ConfigPath, overrides: Overrides = [],  # noqa: B006
        on_change: Annotated[
            Literal["refuse", "rerun", "keep", "new-run"], Field(description="What to do if inputs changed since the last start.")
        ] = "refuse",
        wait_s: Annotated[float, Field(ge=0, le=300, description="Answer after so long, while the run goes on.")] = 20.0,
    ) -> Act:  # fmt: skip
        """Start a pipeline or a stage, or go on with it. Answers with its command line, then its output and exit code, or that it still runs."""
        from posttrain.cli.stage import kind_in

        kept, path = self.place.overrides(overrides), self.place.inside(config)
        sets, where, kind = [f"--set={one}" for one in kept], self.place.shown(path), kind_in(path, None, kept)
        return self.act(
            ["run" if kind == "pipeline" else kind, *sets, f"--on-change={on_change}", "--quiet", "--", where], wait_s
        )

    def gate_decide(
        self, *, run: RunPath, decision: Literal["accept", "reject"], reason: Reason,
        by: Annotated[str, Field(min_length=1, description="Who decides.")],
    ) -> Act:  # fmt: skip
        """Decide on a verdict that waits for a person. Start the run again to go on."""
        where = self.place.shown(self.place.run_folder(run))
        return self.act(["gate", "decide", f"--{decision}", f"--by={by}", f"--reason={reason}", "--", where])

    def promote(
        self, *, ref: Annotated[str, Field(description="NAME@VERSION.")], alias: str = "champion", registry: RegistryPath = "registry",
        verdict: Annotated[str, Field(description="Folder of `posttrain gate --out`; else the registered verdict.")] = "",
    ) -> Act:  # fmt: skip
        """Give an alias to a version that passed its gate against the present holder."""
        judged = [f"--verdict={self.place.shown(self.place.inside(verdict))}"] if verdict else []
        return self.act(["registry", "promote", f"--alias={alias}", *judged, self._registry(registry), "--", ref])

    def rollback(
        self, *, name: Annotated[str, Field(description="Name of the model.")], reason: Reason, alias: str = "champion",
        registry: RegistryPath = "registry",
    ) -> Act:  # fmt: skip
        """Give the alias back to its previous holder, and put the present one on hold."""
        return self.act(
            ["registry", "rollback", f"--reason={reason}", f"--alias={alias}", self._registry(registry), "--", name]
        )

    def stop(self) -> None:
        """Tell what still runs to finish its step and save."""
        with self._lock:
            for process, _ in self._going.values():
                process.terminate()

    def _registry(self, folder: str) -> str:
        return f"--registry={self.place.shown(self.place.inside(folder))}"

    def act(self, arguments: list[str], wait_s: float = 300.0) -> Act:
        """A command line of ours; the same again while it runs waits for its end."""
        command, key = f"posttrain {shlex.join(arguments)}", tuple(arguments)
        if any("\0" in word for word in arguments):
            raise ConfigError("got a zero byte in an argument; expected text")
        if self._only_show:
            return Act(command, None, "")
        with self._lock:
            if key not in self._going:
                self._going[key] = self._start(arguments)
            process, log = self._going[key]
        try:
            code = process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return Act(command, None, _tail(log))
        with self._lock:
            self._going.pop(key, None)
        return Act(command, code, _tail(log))

    def _start(self, arguments: list[str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        # A session of its own: a client that ends the server's group must not end a run between two saves.
        try:
            log = tempfile.TemporaryFile(prefix="posttrain-mcp-")  # noqa: SIM115 - as long as its process
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _ENTRY, *arguments], cwd=self.place.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:  # words that are too long; a folder that was removed; a full disk
            raise ConfigError(f"the command cannot be started: {error.strerror}") from error
        return process, log


def _tail(log: IO[bytes]) -> str:
    """The end of what was written, read by place: its writer's own place must not move."""
    size = os.fstat(log.fileno()).st_size
    begins = max(0, size - _TAIL_BYTES)
    return os.pread(log.fileno(), size - begins, begins).decode("utf-8", "replace").strip()
