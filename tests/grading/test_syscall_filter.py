"""Every refused call is attempted from inside the sandbox: by 64-bit, x32 and 32-bit numbers; a control shows that they work outside."""

import errno
import platform

import pytest

from posttrain.grading import sandbox
from posttrain.grading.sandbox import SandboxLimits
from posttrain.grading.syscall_filter import REFUSED, UNIX_ONLY, X32_BIT, filter_program

LIMITS = SandboxLimits(wall_s=30.0, cpu_s=10, file_bytes=1 << 20)
I386 = {
    "keyctl": 288, "add_key": 286, "request_key": 287, "memfd_create": 356, "memfd_secret": 447, "shmget": 395,
    "msgget": 399, "semget": 393, "mq_open": 277, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "ptrace": 26, "process_vm_readv": 347, "process_vm_writev": 348, "pidfd_getfd": 438, "bpf": 357,
    "perf_event_open": 336, "userfaultfd": 374, "socket": 359, "socketpair": 360, "socketcall": 102, "ipc": 117,
}  # fmt: skip
INET, UNIX, STREAM = 2, 1, 1
HELPER = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)

def call64(number, *args):
    ctypes.set_errno(0)
    got = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(arg) for arg in args))
    return -ctypes.get_errno() if got == -1 else got

# push rbx; eax, ebx, ecx, edx, esi, edi from the arguments; int 0x80; pop rbx; cdqe; ret
CODE = bytes.fromhex("53 89f8 89f3 4189ca 89d1 4489d2 4489c6 4489cf cd80 5b 4898 c3")
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, 4096, 7, 0x22, -1, 0)  # read, write, execute; private, anonymous
ctypes.memmove(page, CODE, len(CODE))
call32 = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_int] * 6)(page)
"""

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")


@pytest.fixture(params=["namespaces", "uid", "limits"])
def level(request):
    order = ("limits", "uid", "namespaces")
    if order.index(request.param) > order.index(sandbox.isolation()):
        pytest.skip("this system does not permit it")
    return request.param


def said(code, level="limits", program=None):
    request = {"mode": "script", "code": HELPER + code, "stdin": "", "nonce": ""}
    output, reason = sandbox._run(request, LIMITS, level, filter_=program)
    assert reason == "", reason
    return [int(word) for word in output.split()]


def attempts(numbers, call):
    return "".join(f"print({call}({number}, {INET}, {STREAM}, 0, 0, 0))\n" for number in numbers)


def test_a_filter_is_in_force_on_this_kernel():
    assert sandbox.call_filter() == filter_program("x86_64") != b""
    assert filter_program("riscv64") == b""


def test_every_refused_call_is_refused_by_64_bit_and_x32_numbers(level):
    numbers = [row["x86_64"] for row in (REFUSED | UNIX_ONLY).values()]
    code = attempts([*numbers, *(number | X32_BIT for number in numbers), X32_BIT | 39], "call64")
    assert set(said(code, level)) == {-errno.EPERM}


def test_every_call_by_a_32_bit_number_is_refused(level):
    getpid = 20
    try:
        (outside,) = said(f"print(call32({getpid}, 0, 0, 0, 0, 0))", program=b"")
    except AssertionError:
        pytest.skip("this kernel runs no 32-bit calls")
    assert outside > 0
    assert I386.keys() >= (REFUSED | UNIX_ONLY).keys()
    assert set(said(attempts([*I386.values(), getpid], "call32"), level)) == {-errno.EPERM}


def test_without_the_filter_the_same_attempts_do_reach_the_kernel():
    """So that what the others see is the filter's doing."""
    code = (
        "print(call64(250, 0, -3, 1, 0, 0), call64(41, 2, 1, 0), call64(41, 16, 3, 0), call64(29, 0, 4096, 0o1600))\n"
    )
    keyring, inet, netlink, segment = said(code + "call64(31, call64(29, 0, 4096, 0o1600), 0, 0)", program=b"")
    assert keyring > 0 and inet > 0 and netlink > 0 and segment >= 0
    (memfd,) = said(
        "name = ctypes.create_string_buffer(b'x')\nprint(call64(319, ctypes.addressof(name), 0))", program=b""
    )
    assert memfd > 0


def test_sockets_of_the_machine_itself_stay(level):
    """asyncio needs a pair. The kernel reads the low half of the family alone, so the filter does too."""
    code = (
        f"two = (ctypes.c_int * 2)()\nprint(call64(53, {UNIX}, {STREAM}, 0, ctypes.addressof(two)), two[0] > 2 and 1)"
    )
    assert said(code, level) == [0, 1]
    high = f"print(call64(41, {UNIX} | 1 << 32, {STREAM}, 0) > 2 and 1, call64(41, {INET} | 1 << 32, {STREAM}, 0))"
    assert said(high, level) == [1, -errno.EPERM]


def test_the_session_keyring_is_its_own(level):
    """KEYCTL_GET_KEYRING_ID of the session, seen with the filter off."""
    mine = said("print(call64(250, 0, -3, 0, 0, 0))", level, b"")
    other = said("print(call64(250, 0, -3, 0, 0, 0))", level, b"")
    assert mine[0] > 0 and other[0] > 0 and mine != other


@pytest.mark.skipif(sandbox.isolation() != "namespaces", reason="this system gives no namespaces")
@pytest.mark.parametrize("folder", ["/tmp", "/dev"])
def test_files_in_memory_are_counted(folder):
    code = f"""
made = 0
try:
    while made < 5000:
        open(f"{folder}/{{made}}", "w").close()
        made += 1
except OSError:
    pass
print(made)
"""
    assert 100 < said(code, "namespaces")[0] < 1000
