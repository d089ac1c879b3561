"""How far long work is, where there is no terminal: few lines, and none of what is done at once."""

from __future__ import annotations

import pytest

from edge_memllm.cli import output
from edge_memllm.cli.output import StageBars


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(output, "monotonic", clock)
    return clock


def test_a_log_gets_a_line_per_stage_and_one_every_ten_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with StageBars() as bars:
        bars("identity", 0, 1)
        clock.now += 1
        bars("identity", 1, 1)
        bars("table", 0, 2000)
        for done in range(100, 2001, 100):
            clock.now += 1
            bars("table", done, 2000)
    assert capsys.readouterr().err.splitlines() == [
        "table: ...",
        "table: 1,000 of 2,000, 10 s",
        "table: 2,000 of 2,000, 20 s",
    ]


def test_what_is_done_at_once_leaves_no_line(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with StageBars() as bars:
        for stage in ("files", "graph"):
            bars(stage, 0, 1)
            clock.now += 0.1
            bars(stage, 1, 1)
    assert capsys.readouterr().err == ""
