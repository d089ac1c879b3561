"""Let every N-th call of the system fail, or kill the process, and look at what is left.

    python benchmarks/faults.py CHECKPOINT --most 200
    python benchmarks/faults.py CHECKPOINT --kills 100

For each operation (run, export, requantize, overlay, session) and each kind of call (open, read,
write, fsync, rename, unlink, mkdir, allocate, close) on files of the work, the first call fails,
then the second, and so on to `--most`; once, and from there on. Then reads and writes are cut
short. An operation must end well or with an error of ours that names a file; its result must be
complete, what it replaces, or not there; nothing else may be left. Kills are at random moments, and
the next run must end well and leave nothing else. Prints a line of JSON for each operation; exits 1
if anything was otherwise. Needs Linux, and gcc for faults. Power cuts are not tested by this.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_memllm.errors import EdgeMemLLMError

KINDS = ("open", "read", "write", "fsync", "rename", "unlink", "mkdir", "allocate", "close")
# What each kind of call says when it fails; None cuts it short.
FAILURES: dict[str, tuple[int | None, ...]] = {
    "open": (errno.EIO, errno.EMFILE),
    "read": (errno.EIO, None),
    "write": (errno.EIO, errno.ENOSPC, None),
    "fsync": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EIO, errno.ENOSPC),
    "unlink": (errno.EIO,),
    "mkdir": (errno.EIO, errno.ENOSPC),
    "allocate": (errno.ENOSPC,),
    "close": (errno.EIO,),
}
LONGEST = 300.0  # seconds of an operation


# --- the operations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """What operations read."""

    checkpoint: Path
    artifact: Path


def run(sources: Sources, out: Path, variant: int, reader: str = "pread") -> str:
    """Generate; the text is the result."""
    import edge_memllm

    with edge_memllm.load(sources.artifact, device="cpu", threads=1, reader=reader) as model:
        return model.generate("Once", max_new_tokens=4 + variant, ignore_eos=True)


def run_directly(sources: Sources, out: Path, variant: int) -> str:
    return run(sources, out, variant, "direct")


def export(sources: Sources, out: Path, variant: int) -> None:
    """Export, not judged: judging reads as `run` does, and takes most of the time."""
    from edge_memllm_export import export_model

    export_model(
        sources.checkpoint,
        out,
        graph_weights=("int8", "fp32")[variant],
        graph_method=("rtn", None)[variant],
        verify=False,
        overwrite=True,
    )


def requantize(sources: Sources, out: Path, variant: int) -> None:
    from edge_memllm_export import requantize as write

    write(sources.artifact, out, table_codec=("f16", "int4")[variant], overwrite=True)


def overlay(sources: Sources, out: Path, variant: int) -> None:
    """Edit by the command line, as there is no other way to make the edits of a word."""
    from edge_memllm.cli.main import main

    words = ["--token", "#5", "#7", "--scale", ("0.5", "0.25")[variant], "--out", str(out)]
    main(["overlay", "edit", str(sources.artifact), *words, "--force"])


def session(sources: Sources, out: Path, variant: int) -> str:
    """Save a session, and go on with it from the file."""
    import edge_memllm

    with edge_memllm.load(sources.artifact, device="cpu", threads=1) as model:
        with model.session(seed=variant) as mine:
            mine.append("Once upon a time")
            mine.generate(max_new_tokens=3, ignore_eos=True)
            mine.save(out, overwrite=True)
        with closing(model.restore_session(out)) as restored:
            return restored.generate(max_new_tokens=3, ignore_eos=True)


@dataclass(frozen=True)
class Operation:
    """Something that is done, in a variant 0 or 1."""

    work: Callable[[Sources, Path, int], object]
    out: str | None  # the name of what it writes


OPERATIONS = {
    "run": Operation(run, None),
    "run --reader direct": Operation(run_directly, None),
    "export": Operation(export, "out"),
    "requantize": Operation(requantize, "out"),
    "overlay": Operation(overlay, "out.overlay.safetensors"),
    "session": Operation(session, "out.session"),
}
KILLED = ("export", "requantize", "overlay", "session")


# --- one try -------------------------------------------------------------------------------------


class Calls:
    """The calls that can be made to fail: faults.c, which must be preloaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)

    def arm(self, kind: str, number: int, lasting: bool, failure: int | None) -> None:
        """From now on let calls fail."""
        self._library.faults_arm(KINDS.index(kind), number, int(lasting), failure or 0)

    def disarm(self) -> tuple[int, int]:
        """How many such calls there were, and how many failed."""
        found = self._library.faults_seen(), self._library.faults_fired()
        self._library.faults_arm(-1, 0, 0, 0)
        return found


def in_a_child(
    work: Callable[[], object],
    prepare: Callable[[], None] = lambda: None,
    end: Callable[[], Any] = lambda: None,
    kill_after: float | None = None,
) -> dict[str, Any]:
    """What came of some work, in a process that has everything imported already."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        found: dict[str, Any] = {"error": "", "said": ""}
        try:
            prepare()
            found["result"] = repr(work())
        except EdgeMemLLMError as error:
            found |= {"error": "ours", "said": str(error)}
        except BaseException as error:
            found |= {"error": "raw", "said": "".join(traceback.format_exception(error))}
        found["calls"] = end()
        os.write(sender, json.dumps(found).encode()[:60_000])
        os._exit(0)
    os.close(sender)
    try:
        ready, _, _ = select.select([receiver], [], [], kill_after or LONGEST)
        content = b"".join(iter(lambda: os.read(receiver, 65536), b"")) if ready else b""
    finally:
        os.close(receiver)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if content:
        found = json.loads(content)
        return dict(found)
    how = "killed" if kill_after else "hang" if not ready else "crash"
    return {"error": how, "said": f"status {status}", "calls": None}


def content(path: Path) -> str | None:
    """A digest of a file or of a folder of files; None for what is not there."""
    if not path.exists():
        return None
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()


class Trial:
    """One operation, tried again and again in a folder of its own."""

    def __init__(self, name: str, sources: Sources, root: Path) -> None:
        self.name = name
        self._operation = OPERATIONS[name]
        self._sources = sources
        self._folder = root / "case"
        self.counts = Counter[str]()
        self.complaints = 0
        self._olds: list[Path | None] = [None]
        self._result, self._new, self.seconds = self._once(1)
        if self._operation.out:
            self.seconds = min(self.seconds, self._once(0)[2])
            old = shutil.move(self._folder, root / f"old {name}")
            self._olds.append(Path(old))

    @property
    def _out(self) -> Path:
        return self._folder / (self._operation.out or "nothing")

    def _once(self, variant: int) -> tuple[str, str | None, float]:
        """Do it undisturbed; its result, what it wrote, and how long it took."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        start = time.perf_counter()
        found = in_a_child(lambda: self._operation.work(self._sources, self._out, variant))
        if found["error"]:
            raise SystemExit(f"{self.name} fails by itself: {found['said']}")
        return found["result"], content(self._out), time.perf_counter() - start

    def faults(self, calls: Calls, kinds: list[str], most: int, step: int) -> None:
        """Let calls of these kinds fail, each `step`-th of them."""
        for old in self._olds:
            for kind in kinds:
                for failure in FAILURES[kind]:
                    for lasting in (False, True):
                        for number in range(1, most + 1, step):
                            if not self._fault(calls, old, kind, number, lasting, failure):
                                break

    def _fault(
        self,
        calls: Calls,
        old: Path | None,
        kind: str,
        number: int,
        lasting: bool,
        failure: int | None,
    ) -> bool:
        """Try one fault; whether there was such a call."""
        self._prepare(old)
        found = in_a_child(
            lambda: self._operation.work(self._sources, self._out, 1),
            lambda: calls.arm(kind, number, lasting, failure),
            calls.disarm,
        )
        if found["calls"] is not None and found["calls"][1] == 0:
            return False
        self.counts["faults"] += 1
        self.counts["errors" if found["error"] == "ours" else "ended well"] += 1
        what = "cut short" if failure is None else errno.errorcode[failure]
        where = f"{kind} {number}{' and on' if lasting else ''}, {what}, old {old is not None}"
        # Half a block at a time is no way for direct reads.
        hopeless = lasting and self.name.endswith("direct")
        self._judge(found, old, where, ends_well=failure is None and not hopeless)
        # What cannot be removed stays, until the next run.
        self._look(old, where, leftovers=not (kind in ("unlink", "open") and lasting))
        return True

    def kills(self, number: int, chance: random.Random) -> None:
        """Kill it that often; every second time it replaces something."""
        for count in range(number):
            old = self._olds[count % 2]
            self._prepare(old)
            after = chance.uniform(0.01, 1.05 * self.seconds)
            found = in_a_child(
                lambda: self._operation.work(self._sources, self._out, 1), kill_after=after
            )
            where = f"killed after {after:.3f} s, old {old is not None}"
            self.counts["kills"] += 1
            self.counts["in time"] += found["error"] == "killed"
            self._look(old, where, leftovers=False)

    def _prepare(self, old: Path | None) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        if old is None:
            self._folder.mkdir()
        else:
            shutil.copytree(old, self._folder)

    def _judge(
        self, found: dict[str, Any], old: Path | None, where: str, *, ends_well: bool
    ) -> None:
        """Say what is wrong with how it ended."""
        match found["error"]:
            case "":
                if found["result"] != self._result or content(self._out) != self._new:
                    self._complain("wrong", where, "ended well with another result")
            case "ours" if ends_well:
                self._complain("gave up", where, found["said"])
            case "ours" if str(self._sources.artifact.parent) not in found["said"]:
                self._complain("nameless", where, found["said"])
            case "ours":
                pass
            case other:
                self._complain(other, where, found["said"])

    def _look(self, old: Path | None, where: str, *, leftovers: bool) -> None:
        """Say what is wrong with what lies there, and with the next run."""
        if not self._operation.out:
            return
        before = None if old is None else content(old / self._operation.out)
        aside = self._out.with_name(f"{self._out.name}.replaced")
        found = content(self._out) or content(aside)
        if found not in (before, self._new):
            self._complain("torn", where, str(found))
        names = sorted(each.name for each in self._folder.iterdir())
        others = [name for name in names if name != self._operation.out]
        if others and leftovers:
            self._complain("leftovers", where, str(others))
        if not others and leftovers:
            return
        self.counts["left for the next run"] += bool(others)
        again = in_a_child(lambda: self._operation.work(self._sources, self._out, 1))
        names = sorted(each.name for each in self._folder.iterdir())
        if again["error"] or content(self._out) != self._new or names != [self._operation.out]:
            self._complain("not recovered", where, f"{names} {again['said']}")

    def _complain(self, kind: str, where: str, said: str) -> None:
        self.counts[kind] += 1
        self.complaints += 1
        print(f"{self.name}: {kind}: {where}: {said}", file=sys.stderr, flush=True)


# --- the whole -----------------------------------------------------------------------------------


def preloaded(root: Path) -> None:
    """Start this program once more with faults.c in front of the C library."""
    library = root / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    os.environ |= {"LD_PRELOAD": str(library), "FAULTS_ROOT": str(root)}


def sources_in(root: Path, checkpoint: Path) -> Sources:
    """Copies of what operations read, so that faults reach them, and only them."""
    from edge_memllm_export import export_model

    found = Sources(root / "checkpoint", root / "artifact")
    shutil.copytree(checkpoint, found.checkpoint)
    export_model(checkpoint, found.artifact, graph_weights="fp32", table_codec="f16", verify=False)
    return found


def trials(names: list[str], sources: Sources, root: Path) -> Iterator[Trial]:
    """Every operation, after it was done once here, which imports all that it needs."""
    for name in names:
        folder = root / "first"
        folder.mkdir()
        with redirect_stdout(io.StringIO()):
            OPERATIONS[name].work(sources, folder / (OPERATIONS[name].out or "nothing"), 1)
        shutil.rmtree(folder)
        yield Trial(name, sources, root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--most", type=int, default=200, help="calls of a kind that fail in turn")
    parser.add_argument("--step", type=int, default=1, help="only each STEP-th of them")
    parser.add_argument("--kills", type=int, default=0, help="kill, instead of letting calls fail")
    parser.add_argument("--operations", default=",".join(OPERATIONS))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is None:
        with tempfile.TemporaryDirectory() as work:
            root = Path(work).resolve()
            preloaded(root)
            command = [sys.executable, __file__, *sys.argv[1:], "--work", str(root)]
            return subprocess.run(command, check=False).returncode
    return try_all(arguments)


def try_all(arguments: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"EDGE_MEMLLM_DEBUG": "1", "TOKENIZERS_PARALLELISM": "false"}
    names = arguments.operations.split(",")
    if arguments.kills:
        names = [name for name in names if name in KILLED]
    sources = sources_in(arguments.work, arguments.checkpoint)
    wrong = 0
    for trial in trials(names, sources, arguments.work):
        start = time.perf_counter()
        if arguments.kills:
            trial.kills(arguments.kills, random.Random(arguments.seed))
        else:
            trial.faults(Calls(), arguments.kinds.split(","), arguments.most, arguments.step)
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"operation": trial.name, **trial.counts, "seconds": seconds}), flush=True)
        wrong += trial.complaints
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
