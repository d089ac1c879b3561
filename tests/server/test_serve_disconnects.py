"""Clients that leave at random moments, in every protocol and with tools, leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.over_http.disconnects import differing, disconnect
from benchmarks.over_http.program import serving
from support.checkpoints import MakeArtifact

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
COUNT, CLIENTS, TOKENS = 200, 8, 24
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts by /proc")


def test_disconnects_with_tools_leak_nothing(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE, "utf-8")
    words = ["--chat-template", str(template), "--threads", "1", "--name", "m"]
    with serving([make_artifact()], words) as program:
        assert differing(program, "m", TOKENS) == 0
        before = disconnect(program, range(COUNT // 4), CLIENTS, TOKENS)
        after = disconnect(program, range(COUNT // 4, COUNT), CLIENTS, TOKENS)
        assert differing(program, "m", TOKENS) == 0
    assert (after.slots_busy, after.queued) == (0, 0)
    assert after.given_up > before.given_up > 0
    assert after.open_files <= before.open_files
    assert after.threads <= before.threads
    assert after.kv_bytes == before.kv_bytes
    assert after.own_bytes <= before.own_bytes + 8_000_000
