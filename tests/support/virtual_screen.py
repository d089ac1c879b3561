"""A screen for programs with windows: Xvfb, and pictures of it as PNG, without other tools."""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 860, 620


class VirtualScreen:
    """A running X server, whose memory is the file `frame`."""

    def __init__(self, display: str, frame: Path) -> None:
        self.environment = {"DISPLAY": display}
        self._frame = frame

    def pixels(self) -> np.ndarray:
        """What is on the screen now, [H, W, 3] of bytes, from the X window dump."""
        dump = self._frame.read_bytes()
        header = struct.unpack(">25I", dump[:100])
        size, width, height, line, colours = (header[i] for i in (0, 4, 5, 12, 19))
        data = np.frombuffer(dump, np.uint8, line * height, size + 12 * colours)
        return data.reshape(height, line // 4, 4)[:, :width, 2::-1]

    def save(self, path: Path) -> None:
        """Write what is on the screen as PNG."""
        path.write_bytes(png(self.pixels()))


@contextmanager
def virtual_screen(folder: Path) -> Iterator[VirtualScreen]:
    """Run Xvfb on a display that is free, its files in `folder`."""
    program = shutil.which("Xvfb")
    assert program is not None
    command = [program, "-displayfd", "1", "-fbdir", str(folder), "-nolisten", "tcp"]
    command += ["-screen", "0", f"{WIDTH}x{HEIGHT}x24"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            number = server.stdout.readline().strip()
            assert number, "Xvfb did not start"
            yield VirtualScreen(f":{number}", folder / "Xvfb_screen0")
        finally:
            server.terminate()


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float) -> None:
    """Wait until a file is there; fails when the process ends before."""
    limit = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, f"{path.name} did not come"
        time.sleep(0.05)


def png(pixels: np.ndarray) -> bytes:
    """Encode pixels [H, W, 3]."""
    height, width, _ = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
