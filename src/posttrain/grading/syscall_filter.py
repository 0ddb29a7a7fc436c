"""The seccomp filter of the sandbox: which system calls are refused to code that nobody trusts, as a program for the kernel.

A list of what is refused, not of what is allowed: an interpreter and the C library need most of the rest. What files,
processes and networks can be reached is the namespaces' business; here is what goes around them or around the limits.
Source: Linux, Documentation/userspace-api/seccomp_filter.rst and linux/bpf_common.h.
"""

from __future__ import annotations

import errno
import struct

X32_BIT = 0x40000000
_AF_UNIX = 1
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data, little-endian
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

REFUSED: dict[str, dict[str, int]] = {
    # Keys of the user: they belong to no namespace.
    "keyctl": {"x86_64": 250, "aarch64": 219},
    "add_key": {"x86_64": 248, "aarch64": 217},
    "request_key": {"x86_64": 249, "aarch64": 218},
    # Memory that no limit counts.
    "memfd_create": {"x86_64": 319, "aarch64": 279},
    "memfd_secret": {"x86_64": 447, "aarch64": 447},
    "shmget": {"x86_64": 29, "aarch64": 194},
    "msgget": {"x86_64": 68, "aarch64": 186},
    "semget": {"x86_64": 64, "aarch64": 190},
    "mq_open": {"x86_64": 240, "aarch64": 180},
    # Calls behind a filter's back, sockets among them.
    "io_uring_setup": {"x86_64": 425, "aarch64": 425},
    "io_uring_enter": {"x86_64": 426, "aarch64": 426},
    "io_uring_register": {"x86_64": 427, "aarch64": 427},
    # Other processes, and large parts of the kernel that no solution needs.
    "ptrace": {"x86_64": 101, "aarch64": 117},
    "process_vm_readv": {"x86_64": 310, "aarch64": 270},
    "process_vm_writev": {"x86_64": 311, "aarch64": 271},
    "pidfd_getfd": {"x86_64": 438, "aarch64": 438},
    "bpf": {"x86_64": 321, "aarch64": 280},
    "perf_event_open": {"x86_64": 298, "aarch64": 241},
    "userfaultfd": {"x86_64": 323, "aarch64": 282},
}
UNIX_ONLY: dict[str, dict[str, int]] = {
    "socket": {"x86_64": 41, "aarch64": 198},
    "socketpair": {"x86_64": 53, "aarch64": 199},
}
"""Refused for address families other than AF_UNIX."""


def filter_program(machine: str) -> bytes:
    """The filter for `platform.machine()`; nothing for a processor whose numbers are not known here.

    Calls by another architecture's numbers (32-bit ones on a 64-bit kernel, x32) are refused altogether.
    """
    if machine not in ARCHITECTURES:
        return b""
    refused = [numbers[machine] for numbers in REFUSED.values()]
    families = [numbers[machine] for numbers in UNIX_ONLY.values()]
    # Jumps count from the next line. Behind the tests stand: allow, load the family, test it, allow, refuse.
    tests = [(_AT_LEAST, X32_BIT, "refuse"), *((_EQUAL, number, "refuse") for number in refused)]
    tests += [(_EQUAL, number, "family") for number in families]
    lines = [
        _line(_LOAD, _ARCHITECTURE_AT),
        _line(_EQUAL, ARCHITECTURES[machine], 0, len(tests) + 5),
        _line(_LOAD, _NUMBER_AT),
    ]
    for place, (kind, number, target) in enumerate(tests):
        left = len(tests) - place - 1
        lines.append(_line(kind, number, left + (4 if target == "refuse" else 1)))
    lines += [
        _line(_RETURN, _ALLOW),
        _line(_LOAD, _FIRST_ARGUMENT_AT),  # the kernel reads the low half alone, as an int
        _line(_EQUAL, _AF_UNIX, 0, 1),
        _line(_RETURN, _ALLOW),
        _line(_RETURN, _REFUSE),
    ]
    return b"".join(lines)


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One `struct sock_filter`."""
    return struct.pack("<HBBI", code, if_true, if_false, value)
