"""How busy the machine is, and waiting until it is not. Linux only: it reads /proc/stat."""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic, sleep

_LOOK_SECONDS = 0.3


def busy_seconds() -> float:
    """Processor time that the whole machine has spent so far on anything but waiting."""
    fields = Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, *rest = (int(each) for each in fields)
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def wait(most: float, patience: float) -> None:
    """Sleep until no more than the share ``most`` of the processors is busy, or patience ends."""
    end = monotonic() + patience
    while _share() > most and monotonic() < end:
        pass


def _share() -> float:
    start, busy = monotonic(), busy_seconds()
    sleep(_LOOK_SECONDS)
    return (busy_seconds() - busy) / ((monotonic() - start) * (os.cpu_count() or 1))
