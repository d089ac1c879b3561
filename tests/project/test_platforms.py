"""Where the system is not POSIX every module is imported, and what needs POSIX says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.checkpoints import MakeCheckpoint
from support.programs import without_posix

SESSION = """
import edge_memllm
with edge_memllm.load({artifact!r}, device="cpu") as model:
    with model.session(seed=1) as session:
        session.append("A river")
        session.save({file!r})
        text = session.generate(max_new_tokens=4)
    with model.restore_session({file!r}) as session:
        assert session.generate(max_new_tokens=4) == text
"""


def run(commands: list[list[str]], program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, without_posix.__file__, json.dumps(commands), program],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_model_is_exported_and_run_without_posix(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint, artifact = str(make_checkpoint(beta=0)), str(tmp_path / "artifact")
    overlay = str(tmp_path / "a.overlay.safetensors")
    prompt = ["--prompt", "A river", "--max-new-tokens", "4"]
    commands = [
        ["export", checkpoint, artifact],
        ["verify", artifact],
        ["run", artifact, *prompt],
        ["overlay", "edit", artifact, "--token", "a", "--like", "b", "--out", overlay],
        ["run", artifact, "--overlay", overlay, *prompt],
        ["run", artifact, "--reader", "mmap", *prompt],
        ["requantize", artifact, str(tmp_path / "int4"), "--table-codec", "int4-g64"],
        ["explain", artifact, "--text", "A river"],
        ["run", artifact, "--reader", "direct", *prompt],
    ]
    done = run(commands, SESSION.format(artifact=artifact, file=str(tmp_path / "a.session")))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == []
    assert found["codes"] == [0] * 8 + [1], done.stderr
    assert "The readers 'direct' and 'uring' need O_DIRECT (Linux)" in done.stderr
