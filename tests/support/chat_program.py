"""The chat program of examples/, started on a virtual screen as a user does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from support import ROOT
from support.virtual_screen import virtual_screen, wait_for

PROGRAM = ROOT / "examples" / "chat.py"


def chat_once(command: list[str], folder: Path, line: str) -> list[list[str]]:
    """Start the program, wait until it has kept an answer, end it; return what it keeps."""
    kept = folder / "chats.json"
    before = kept.stat().st_mtime_ns if kept.exists() else 0
    with virtual_screen(folder) as screen:
        environment = {"PATH": os.defpath, "HOME": str(folder), **screen.environment}
        command = [*command, "--history", str(kept), "--ask", line]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as program:
            try:
                wait_for(kept, program, 240)
                while kept.stat().st_mtime_ns == before:
                    assert program.poll() is None, program.communicate()
                    time.sleep(0.1)
                program.send_signal(signal.SIGINT)
                assert program.communicate(timeout=120)[0] == ""
                assert program.returncode == 0
            finally:
                program.kill()
    found = json.loads(kept.read_text())["chats"]
    return [[each["content"] for each in chat["messages"]] for chat in found]
