"""A process without a network: `python no_network.py`, then a program as its input.

The kernel ends it with SIGSYS where it would connect or send, so nothing is looked up or sent
unseen, by whatever library. Linux alone can do this.
"""

from __future__ import annotations

import ctypes
import platform
import sys

# Of the system calls connect, sendto and sendmmsg.
NUMBERS = {"x86_64": (42, 44, 307), "aarch64": (203, 206, 269)}
NOT_HERE = 77
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_KILL, _ALLOW = 0x80000000, 0x7FFF0000


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("value", ctypes.c_uint),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.POINTER(_Instruction)))


def forbid_network() -> bool:
    """Whether it could be done."""
    numbers = NUMBERS.get(platform.machine())
    if sys.platform != "linux" or numbers is None:
        return False
    code = [(_LOAD, 0, 0, 0)]
    for number in numbers:
        code += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _KILL)]
    code.append((_RETURN, 0, 0, _ALLOW))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    program = ctypes.byref(_Program(len(code), (_Instruction * len(code))(*code)))
    return prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and prctl(_SECCOMP, _FILTER, program) == 0


if __name__ == "__main__":
    if not forbid_network():
        sys.exit(NOT_HERE)
    exec(sys.stdin.read())
