"""A process under a supervisor of its own, which ends all that it has started: when it ends, when it is told to, or when we are gone.

Two ends: `SupervisedProcess` is ours; `main` is what runs in the new process. Knows nothing of what is run. Linux.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn

END_TIMEOUT_S = 10.0
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[1])
_BOOT = (
    "import sys; root = sys.argv[1]; root in sys.path or sys.path.append(root); "
    "from posttrain.supervised import main; main(sys.argv[2:])"
)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LOOK_S = 0.5
_WATCHED = (signal.SIGCHLD, signal.SIGTERM)
_TAIL_BYTES = 1 << 16


class SupervisedProcess:
    """`entry` (`module:function`) called with `arguments` in a process group of its own; what it writes goes to `log`.

    `pass_fds` are open there, and closed in its supervisor. With `scratch`, its temporary files lie in a folder of their own whose
    name begins so, and go with it. `out` takes its standard output, where that is to be apart.
    """

    def __init__(
        self, entry: str, arguments: Sequence[str], log: IO[bytes], environment: Mapping[str, str],
        pass_fds: Sequence[int] = (), scratch: str = "", out: IO[bytes] | None = None,
    ) -> None:  # fmt: skip
        self._log, self._begins = log, log.seek(0, os.SEEK_END)
        # The signal that a parent's death sends follows the *thread* that started us.
        from_main_thread = threading.current_thread() is threading.main_thread()
        numbers = [os.getpid(), int(from_main_thread)]
        self._supervisor = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, _PACKAGE_ROOT, *map(str, numbers), ",".join(map(str, pass_fds)), scratch, entry, *arguments],
            stdin=subprocess.DEVNULL, stdout=out or log, stderr=log, env=dict(environment), pass_fds=tuple(pass_fds),
            start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """The supervisor's."""
        return self._supervisor.pid

    @property
    def code(self) -> int | None:
        """As `Popen.returncode`."""
        return self._supervisor.poll()

    def signal(self, number: int) -> None:
        """To what the entry runs as, not to its supervisors."""
        for pid in (entry for second in _children(self._supervisor.pid) for entry in _children(second)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def has_ended(self) -> bool:
        code = self._supervisor.poll()
        if code is not None and code < 0:
            # The supervisor itself may have been killed, and what it watched lives on in its group.
            self._kill_group()
        return code is not None

    def how_it_ended(self) -> str:
        """In words. Raises: subprocess.TimeoutExpired where it goes on."""
        code = self._supervisor.wait(END_TIMEOUT_S)
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def last_lines(self) -> list[str]:
        """The end of what it has written."""
        self._log.seek(max(self._begins, self._log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return self._log.read().decode("utf-8", "replace").strip().splitlines()

    def end(self) -> None:
        """End it and all that it has started."""
        with suppress(ProcessLookupError):
            self._supervisor.terminate()
        try:
            self._supervisor.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill_group()
            self._supervisor.wait()
        self.has_ended()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._supervisor.pid, signal.SIGKILL)


def run_program(*command: str) -> NoReturn:
    """An entry: the program that `command` names, in place of this process."""
    os.execv(command[0], command)


# --- in the new process --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """Split into the process that runs the entry and its two supervisors, the second one of them a child of the first.

    Ray kills the children of a worker that ends, so a worker's death may be the first supervisor's too: the second one sees that, and ends
    the rest.
    """
    parent, from_main_thread, descriptors, scratch, entry, *rest = arguments
    libc = ctypes.CDLL(None)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    folder = tempfile.mkdtemp(prefix=scratch) if scratch else None
    watched, is_quick = int(parent), from_main_thread == "1"
    for _ in range(2):
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        supervisor = os.getpid()
        child = os.fork()
        if child:
            for descriptor in filter(None, descriptors.split(",")):
                os.close(int(descriptor))
            if is_quick:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            _supervise(child, watched, folder)
        watched, is_quick = supervisor, True
    if folder:
        os.environ["TMPDIR"] = folder
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == supervisor:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
        module, _, function = entry.partition(":")
        getattr(importlib.import_module(module), function)(*rest)


def _supervise(child: int, parent: int, folder: str | None) -> NoReturn:
    """Until the child ends, the order to end comes, or the parent is gone; then nothing that it started lives on, and `folder` goes.

    A daemon's parent is dead, so it has become our child: `PR_SET_CHILD_SUBREAPER`.
    """
    status = None
    while status is None and os.getppid() == parent:
        got = signal.sigtimedwait(_WATCHED, _LOOK_S)
        if got is not None and got.si_signo == signal.SIGTERM:
            break
        status = dict(_ended()).get(child)
    while children := _children(os.getpid()):  # what a killed one has started is ours at once
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        pid, ended = os.waitpid(-1, 0)
        status = ended if pid == child else status
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status or 0)
    if code < 0:  # end as the child did
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _ended() -> Iterator[tuple[int, int]]:
    """(pid, status) of the children that have ended."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended


def _children(parent: int) -> list[int]:
    found = list[int]()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == parent:
                    found.append(int(entry))
    return found
