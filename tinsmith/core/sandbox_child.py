"""Drop privileges, then execute the sandboxed program. `sandbox.py` runs this file as a script.
It imports nothing of Tinsmith.

    python -I -S -B sandbox_child.py LIMITS COMMAND...

Four restrictions, each applied if the system has it:

- kernel limits (setrlimit): seconds of the processor, bytes of memory, bytes of a file, no core
  dumps;
- for root, no capabilities, so that limits cannot be raised again;
- Landlock (Linux 5.13): nothing can be written, made or removed in any file system;
- seccomp (Linux, x86-64 and arm64): no new processes or threads, no signals to others, no sockets.

LIMITS is JSON: {"seconds", "memory_bytes", "file_bytes", "strict"}; with `strict`, a
missing restriction ends the program.
"""

import ctypes
import json
import math
import os
import platform
import resource
import sys

NO_NEW_PRIVILEGES, DROP_CAPABILITY, SET_SECCOMP = 38, 24, 22
WRITING = {1: 0x1FF2, 2: 0x3FF2, 3: 0x7FF2}
"""Landlock version -> its rights to write, make, remove, refer and truncate."""
_COMMON = (424, 425, 434, 435)  # pidfd_send_signal, io_uring_setup, pidfd_open, clone3
CALLS = {
    "x86_64": (
        0xC000003E,
        # socket, socketpair, clone, fork, vfork, kill, ptrace, rt_sigqueueinfo, mount, tkill,
        # tgkill, keyctl, unshare, rt_tgsigqueueinfo, setns, process_vm_readv and writev, bpf
        (41, 53, 56, 57, 58, 62, 101, 129, 165, 200, 234, 250, 272, 297, 308, 310, 311, 321),
    ),
    "aarch64": (
        0xC00000B7,
        # mount, unshare, ptrace, kill, tkill, tgkill, rt_sigqueueinfo, socket, socketpair, keyctl,
        # clone, rt_tgsigqueueinfo, setns, process_vm_readv and writev, bpf
        (40, 97, 117, 129, 130, 131, 138, 198, 199, 219, 220, 240, 268, 270, 271, 280),
    ),
}
"""Machine -> its seccomp architecture number, and the refused system calls."""
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000


class Step(ctypes.Structure):
    """One instruction of a packet filter for seccomp."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("true", ctypes.c_uint8),
        ("false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class Program(ctypes.Structure):
    """A packet filter program for seccomp."""

    _fields_ = (("length", ctypes.c_uint16), ("steps", ctypes.POINTER(Step)))


def limit(seconds: float, memory_bytes: int, file_bytes: int) -> None:
    """Set kernel limits that the program cannot raise."""
    # the kernel counts whole seconds, and starting Python takes part of one
    cpu = math.ceil(seconds) + 1
    for kind, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def restrict(libc: ctypes.CDLL) -> list[str]:
    """Apply Landlock and seccomp. Return the names of those that this system lacks."""
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return ["landlock", "seccomp"]
    if os.geteuid() == 0:
        for capability in range(64):
            libc.prctl(DROP_CAPABILITY, capability, 0, 0, 0)
    missing: list[str] = []
    if not _forbid_writing(libc):
        missing.append("landlock")
    if not _forbid_calls(libc):
        missing.append("seccomp")
    return missing


def _forbid_writing(libc: ctypes.CDLL) -> bool:
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = ctypes.c_uint64(WRITING[min(version, 3)])
    ruleset = libc.syscall(444, ctypes.byref(rights), ctypes.c_size_t(8), 0)
    return ruleset >= 0 and libc.syscall(446, ruleset, 0) == 0


def _forbid_calls(libc: ctypes.CDLL) -> bool:
    if platform.machine() not in CALLS:
        return False
    machine, machine_calls = CALLS[platform.machine()]
    refused_calls = sorted((*machine_calls, *_COMMON))
    num_calls = len(refused_calls)
    steps = [Step(LOAD, 0, 0, 4), Step(EQUAL, 1, 0, machine), Step(RETURN, 0, 0, KILL)]
    steps += [Step(LOAD, 0, 0, 0), Step(AT_LEAST, num_calls + 1, 0, 0x40000000)]
    steps += [Step(EQUAL, num_calls - index, 0, call) for index, call in enumerate(refused_calls)]
    steps += [Step(RETURN, 0, 0, ALLOW), Step(RETURN, 0, 0, REFUSE)]
    program = Program(len(steps), (Step * len(steps))(*steps))
    return libc.prctl(SET_SECCOMP, 2, ctypes.byref(program), 0, 0) == 0


def main(limits: str, *command: str) -> None:
    """Apply the restrictions and replace this process by the command. Never returns."""
    options = json.loads(limits)
    strict = options.pop("strict")
    is_linux = sys.platform == "linux"
    missing = restrict(ctypes.CDLL(None, use_errno=True)) if is_linux else ["landlock", "seccomp"]
    if strict and missing:
        sys.exit(f"not confined: this system has no {' and no '.join(missing)}")
    limit(**options)
    os.execv(command[0], command)  # noqa: S606 (the command is ours)


if __name__ == "__main__":
    main(*sys.argv[1:])
