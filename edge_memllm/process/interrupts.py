"""Signals that end a program: the first asks it to end, the second is the system's to act on.

Python runs the handler of a signal between two of its own instructions, in the main thread. While
that thread is in a library that does not come back, or another thread keeps the interpreter to
itself, no handler ever runs. So the kernel is told to take a handler away as it delivers the first
signal: a second one then ends the process whatever runs, and nothing is cleaned up.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NamedTuple, NoReturn

Handler = Callable[[int, FrameType | None], object]


class _Reset(NamedTuple):
    """Where C's `struct sigaction` has its flags, and the one that takes a handler away."""

    offset: int
    flag: int  # SA_RESETHAND


_POINTER = ctypes.sizeof(ctypes.c_void_p)
_ACTION_BYTES = 512  # more than any has
# Others order the fields differently; there the handler itself does what it can.
_LINUX = ("x86_64", "aarch64", "armv7l", "riscv64", "ppc64le", "i686")


@contextmanager
def taking_one(numbers: Sequence[int], handler: Handler) -> Iterator[None]:
    """Let `handler` have the first of these signals; after it, each of them ends the process.

    Without a signal, all is as before when the context ends. Only in the main thread; elsewhere
    nothing is changed, as Python allows nothing else.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    taking = _TakingOne(numbers, handler)
    taking.install()
    try:
        yield
    finally:
        if not taking.taken:
            for number, found in before.items():
                signal.signal(number, found)
                if isinstance(found, _TakingOne):
                    _reset_at_delivery(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let the first Ctrl-C raise `KeyboardInterrupt`, and the second end the process.

    Where Ctrl-C is ignored, or somebody else's, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with taking_one([signal.SIGINT], signal.default_int_handler):
            yield
    else:
        yield


def go_on() -> None:
    """After a `KeyboardInterrupt` that did not end the program: the next Ctrl-C is a first again.

    Only for a program that is `interruptible`.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        _TakingOne([signal.SIGINT], signal.default_int_handler).install()


def leave(code: int) -> NoReturn:
    """End the process at once, without waiting for threads that do not come back."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


class _TakingOne:
    """A handler that is one for the first signal only."""

    def __init__(self, numbers: Sequence[int], handler: Handler) -> None:
        self.taken = False
        self._numbers = numbers
        self._handler = handler

    def install(self) -> None:
        """Become the handler of all of them."""
        for number in self._numbers:
            signal.signal(number, self)
            _reset_at_delivery(number)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.taken = True
        for each in self._numbers:
            signal.signal(each, signal.SIG_DFL)
        self._handler(number, frame)


def _reset_at_delivery(number: int) -> None:
    """Have the kernel put back the default of a signal when it delivers it once."""
    reset = _reset_here()
    if reset is None:
        return
    library = ctypes.CDLL(None)
    action = (ctypes.c_ubyte * _ACTION_BYTES)()
    if library.sigaction(number, None, action) == 0:
        flags = ctypes.c_uint32.from_buffer(action, reset.offset)
        flags.value |= reset.flag
        library.sigaction(number, action, None)


def _reset_here() -> _Reset | None:
    if sys.platform == "darwin":
        return _Reset(_POINTER + 4, 0x4)
    if sys.platform == "linux" and platform.machine() in _LINUX:
        return _Reset(_POINTER + 128, 0x80000000)
    return None
