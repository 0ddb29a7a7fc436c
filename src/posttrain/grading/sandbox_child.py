"""The child of `sandbox.py`: confines itself, then runs the code. Executed as a file by a bare interpreter; imports nothing of ours.

Everything here is open to the code it runs. That is why it holds no expected value and no secret worth having.
"""

# ruff: noqa: BLE001, SIM115
# Every except is a process boundary, and importing pathlib would take a third of the time of a run.

import builtins
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import sys
from typing import Any

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_SECCOMP_MODE_FILTER = 2
_KEYCTL, _KEYCTL_JOIN_SESSION_KEYRING = {"x86_64": 250, "aarch64": 219}, 1
_MAX_FILES = 1000
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: Any) -> None:
    if getattr(_libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _die_with_parent() -> None:
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), flags, data.encode())


def _unshare(request: dict[str, Any]) -> None:
    """Enter new namespaces and become process 1 of the new pid namespace; the outer process waits and passes its status on."""
    if request["is_root"]:
        _call("unshare", _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET)
    else:
        uid, gid = os.getuid(), os.getgid()
        _call("unshare", _NEWUSER | _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as handle:
                handle.write(text)
    child = os.fork()
    if child:
        # The result pipe must close with the inner process.
        os.closerange(3, 4096)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _die_with_parent()


def _make_root(request: dict[str, Any]) -> None:
    """An empty root in memory with the interpreter and the system's libraries, read-only, and a small writable /tmp."""
    base = request["folder"]
    root = base + "/jail"
    _mount("none", "/", "none", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size=1m,nr_inodes={_MAX_FILES},mode=755")
    os.mkdir(root)
    for folder in dict.fromkeys((*_SYSTEM_FOLDERS, *request["prefixes"])):
        if not os.path.isdir(folder):
            continue
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), root + folder)
        elif not os.path.isdir(root + folder):
            os.makedirs(root + folder)
            _mount(folder, root + folder, "none", _MS_BIND | _MS_REC)
            _mount(
                "none", root + folder, "none", _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _locked_flags(folder)
            )
    for folder, size in (("/tmp", request["file_bytes"]), ("/dev", 4096)):
        os.makedirs(root + folder, exist_ok=True)
        _mount("tmpfs", root + folder, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size},nr_inodes={_MAX_FILES},mode=1777")
    open(root + "/dev/null", "w").close()  # a plain file: no device can be made here
    os.chmod(root + "/dev/null", 0o666)
    _mount("none", base, "none", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir(base)
    if _libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b".") != 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    _call("umount2", b".", _MNT_DETACH)
    # The kernel makes no user namespace, and so gives no capabilities back, to a process whose root is no mount's root.
    os.chroot("/jail")
    os.chdir("/tmp")


def _locked_flags(folder: str) -> int:
    """Flags of the original mount, which an unprivileged remount has to keep."""
    flags, names = (
        os.statvfs(folder).f_flag,
        {os.ST_NODEV: _MS_NODEV, os.ST_NOEXEC: 8, os.ST_NOATIME: 1024, os.ST_NODIRATIME: 2048, os.ST_RELATIME: 1 << 21},
    )
    return sum(mount_flag for name, mount_flag in names.items() if flags & name)


def _drop_privileges(request: dict[str, Any]) -> None:
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    if request["is_root"]:
        os.setgroups([])
        os.setresgid(request["uid"], request["uid"], request["uid"])
        os.setresuid(request["uid"], request["uid"], request["uid"])
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _die_with_parent()  # a change of uid clears it


def _limit(request: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: request["cpu_s"], resource.RLIMIT_AS: request["memory_bytes"], resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_NOFILE: 32, resource.RLIMIT_CORE: 0, resource.RLIMIT_NPROC: request["num_processes"],
    }  # fmt: skip
    if request["level"] == "limits":
        # The count is per user there, and the user has other processes.
        del limits[resource.RLIMIT_NPROC]
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def _leave_keyring() -> None:
    """A session keyring of its own: the one of the run may hold the user's keys, and belongs to no namespace."""
    number = _KEYCTL.get(platform.machine())
    if number is not None and _libc.syscall(number, _KEYCTL_JOIN_SESSION_KEYRING, None) < 0:
        reason = ctypes.get_errno()
        if reason not in (errno.ENOSYS, errno.EPERM):  # there are no keys, or nobody here may ask for them
            raise OSError(reason, "keyctl")


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("num_lines", ctypes.c_ushort), ("lines", ctypes.c_char_p))


def _filter_calls(program: bytes) -> None:
    """From here on the kernel refuses what `syscall_filter.py` lists."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(program) // 8, program)), 0, 0)


def _confine(request: dict[str, Any]) -> None:
    _die_with_parent()
    if request["level"] == "namespaces":
        _unshare(request)
        _make_root(request)
    elif request["level"] == "uid":
        os.chown(request["folder"], request["uid"], request["uid"])
        os.chdir(request["folder"])
    else:
        os.chdir(request["folder"])
    if request["level"] != "limits":
        _drop_privileges(request)
    _leave_keyring()
    _limit(request)
    if request["filter"]:
        _filter_calls(bytes.fromhex(request["filter"]))


# --- running -------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """`value` rebuilt from exact builtin types, so that no object of the code's own class leaves the process."""
    kind = _kind_of(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple):
        return [_plain(item) for item in value]
    if kind is dict and all(_kind_of(key) is str for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"returned {kind.__name__}, which is no JSON value")


def _kind_of(value: object) -> Any:
    """The true class, which no `__class__` can hide."""
    return type(value)


def _run_calls(request: dict[str, Any], result_fd: int) -> None:
    names: dict[str, Any] = {"__name__": "solution"}
    failure = ""
    try:
        exec(compile(request["code"], "solution.py", "exec"), names)
    except SystemExit as stop:
        failure = "" if stop.code in (None, 0) else f"SystemExit: {stop.code!r:.100}"
    except BaseException as error:
        failure = _described(error)
    for index, (name, args) in enumerate(request["calls"]):
        record = _record(index, names, name, args, failure)
        if len(record) > request["record_bytes"] - len(request["nonce"]):
            record = json.dumps({"i": index, "e": f"returned more than {request['record_bytes']} bytes"})
        left = memoryview((request["nonce"] + record + "\n").encode())
        while left:
            left = left[os.write(result_fd, left) :]


def _record(index: int, names: dict[str, Any], name: str, args: Any, failure: str) -> str:
    """One call's outcome as a JSON line. What cannot be encoded is an outcome of this call alone."""
    try:
        if failure:
            raise RuntimeError(failure)
        return json.dumps({"i": index, "v": _plain(names[name](*args))})
    except BaseException as error:
        return json.dumps({"i": index, "e": _described(error)})


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:  # the code's own `__str__`
        return "an error that cannot be shown"


def _run_script(request: dict[str, Any], result_fd: int) -> int:
    folder = "/tmp" if request["level"] == "namespaces" else request["folder"]
    path = os.path.join(folder, "stdin")
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as handle:
        handle.write(request["stdin"])
    for source, target in ((os.open(path, os.O_RDONLY), 0), (result_fd, 1)):
        os.dup2(source, target)
        os.close(source)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    try:
        exec(compile(request["code"], "solution.py", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        return 0 if stop.code in (None, 0) else 1
    except BaseException:
        return 1
    finally:
        sys.stdout.flush()
    return 0


def _main() -> None:
    result_fd = int(sys.argv[1])
    builtins.exit = builtins.quit = sys.exit  # `site` is not imported here  # pyright: ignore[reportAttributeAccessIssue]
    request = json.loads(sys.stdin.buffer.read())
    _confine(request)
    if request["mode"] == "calls":
        _run_calls(request, result_fd)
        os._exit(0)
    os._exit(_run_script(request, result_fd))


_main()
