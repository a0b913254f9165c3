"""Runs a program that a model wrote in a separate process, with limited time and memory, no network and no writing.

The kernel enforces the limits: resource limits, and a seccomp filter that fails system calls with effects outside the
process (sockets, starting or signalling processes, opening files for writing, changing folders). The sandbox needs no
privileges and works in containers. It needs Linux on x86-64 or arm64; on other systems nothing is run.

This file is also the program inside the sandbox: `python -I sandbox.py` reads the program to run from stdin.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import platform
import secrets
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass

SECONDS = 10.0
MEMORY = 4 << 30  # address space in bytes; numpy alone maps about 1 GiB

# Numbers of the denied system calls on (x86-64, arm64); None: the call does not exist.
DENIED: dict[str, tuple[int, int | None]] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "sendto": (44, 206),
    "sendmsg": (46, 211),
    "io_uring_setup": (425, 425),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "chroot": (161, 51),
    "creat": (85, None),
    "truncate": (76, 45),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rmdir": (84, None),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "removexattr": (197, 14),
    "utimensat": (280, 88),
}
ABSENT = {
    "clone3": (435, 435),
    "openat2": (437, 437),
}  # reported as missing, so that the C library uses clone and openat, whose arguments a filter can check
OPEN, OPENAT, CLONE = (2, None), (257, 56), (56, 220)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # index into the pairs above, AUDIT_ARCH_*

EPERM, ENOSYS = 1, 38
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CLONE_THREAD = 0x00010000
X32 = 0x40000000  # first number of x86-64's x32 table of system calls
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, FILTER = 22, 38, 2
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


class NoSandboxError(RuntimeError):
    """This machine has no sandbox; the program was not run."""


@dataclass(frozen=True)
class Outcome:
    """passed: the program ran to its end; reason: one line that says why it did not."""

    passed: bool
    reason: str = ""


def run_program(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Runs Python source to its end or to a limit, and discards its output.

    Raises:
        NoSandboxError: this machine cannot set the limits; the program was not run.
    """
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise NoSandboxError(f"no sandbox on {sys.platform} {platform.machine()}; it needs Linux on x86-64 or arm64")
    token = secrets.token_hex(16)
    job = json.dumps({"program": program, "token": token, "seconds": seconds, "memory": memory})
    environment = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
    with tempfile.TemporaryDirectory(prefix="twotower-") as empty:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-B", os.path.abspath(__file__)],
                input=job,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds + 5,
                cwd=empty,
                env=environment,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
    output = done.stdout.strip().splitlines()
    if output and output[-1] == token:
        return Outcome(True)
    last = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
    if last.startswith("NoSandbox: "):
        raise NoSandboxError(last.removeprefix("NoSandbox: "))
    timed_out = done.returncode in (-9, -24)  # SIGKILL or SIGXCPU, sent at the limit of CPU time
    return Outcome(False, "timed out" if timed_out else last[:200])


def _inside() -> None:
    job = json.load(sys.stdin)
    report = os.dup(1)
    try:
        _limit(job["seconds"], job["memory"])
    except OSError as error:
        sys.exit(f"NoSandbox: the kernel does not set its limits ({error})")
    sys.stdin = io.StringIO()
    failure = None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            exec(compile(job["program"], "<program>", "exec"), {"__name__": "__main__"})
        except BaseException as error:  # SystemExit too: a program that exits early has not passed its tests
            failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if failure is None:
        os.write(report, job["token"].encode())
    else:
        os.write(2, failure.encode(errors="replace"))
    os._exit(failure is not None)  # runs no exit handlers and does not wait for threads


def _limit(seconds: float, memory: int) -> None:
    import resource

    cpu_seconds = int(seconds) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 1 << 20),  # applies to open files: the program's output
    ):
        _, hard = resource.getrlimit(limit)
        top = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (top, top))
    libc = ctypes.CDLL(None, use_errno=True)
    code = seccomp_filter(platform.machine())
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(instructions))
    for call in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, FILTER, ctypes.c_char_p(program), 0, 0)):
        if libc.prctl(*(ctypes.c_ulong(x) if isinstance(x, int) else x for x in call)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def seccomp_filter(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter in classic BPF; an instruction is (code, jump if true, jump if false, operand)."""
    column, architecture = ARCHITECTURES[machine]

    def argument(index: int) -> tuple[int, int, int, int]:
        return (LOAD, 0, 0, ARGUMENTS + 8 * index)  # the low half, on both architectures

    fail, allow = (RETURN, 0, 0, FAIL | EPERM), (RETURN, 0, 0, ALLOW)
    code = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":
        code += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            code += [(EQUAL, 0, 1, number), fail]
    for numbers in ABSENT.values():
        code += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, FAIL | ENOSYS)]
    for number, index in ((OPEN[column], 1), (OPENAT[column], 2)):
        if number is not None:
            code += [(EQUAL, 0, 4, number), argument(index), (ANY_BIT, 0, 1, WRITING), fail, allow]
    code += [(EQUAL, 0, 4, CLONE[column]), argument(0), (ANY_BIT, 1, 0, CLONE_THREAD), fail, allow]
    return [*code, allow]


if __name__ == "__main__":
    _inside()
