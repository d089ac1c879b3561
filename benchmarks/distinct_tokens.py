"""Training steps with the memory made once per distinct token of a batch, against every position.

    python benchmarks/distinct_tokens.py [--preset tiny] [--beta 0,3] [--batch-sizes 1,4,16,64]
        [--tokens TRAIN.npy] [--device cpu] [--out docs/results/distinct-tokens.json]

A step is forward, loss, backward and AdamW, in bf16 as training does. How much there is to save
depends on how often text repeats tokens: --tokens takes a file that training left in its cache;
without one, tokens are drawn with Zipf's frequencies. Each measurement has a process of its own,
in turn, round by round; the least median counts. Gradients of both forms are compared in float32;
exit code 1 if they differ by more than rounding. --out writes the JSON and a page beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

FORMS = {"plain": False, "distinct": True}
_LARGEST_DIFFERENCE = 1e-4  # of a gradient, as a part of its norm: sums in another order
_PAGE = """\
# The memory once per distinct token, against every position

Training steps of the preset `{preset}` on {machine} ({threads} threads), torch {torch}, bf16,
sequences of {sequence_length} tokens ({tokens}). Memory is what steps take on top of the network,
gradients and optimizer included. The last column is the largest difference of a gradient between
the two forms in float32, as a part of its norm.

`{command}`

| beta | sequences | positions | distinct | plain, s | distinct, s | times as fast | plain, MB | \
distinct, MB | difference |
|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


def main() -> int:
    arguments = parse()
    if arguments.child is not None:
        print(json.dumps(child(json.loads(arguments.child))))
        return 0
    result = measure(arguments)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(page(result), encoding="utf-8")
    print(page(result) if arguments.out is None else arguments.out)
    return 0 if all(each["difference"] <= _LARGEST_DIFFERENCE for each in result["cases"]) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--beta", type=integers, default=[0, 3])
    parser.add_argument("--batch-sizes", type=integers, default=[1, 4, 16, 64])
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--tokens", type=Path, help="token ids, .npy")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--steps", type=int, default=5, help="counted in each process")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    shared: dict[str, Any] = {
        "preset": arguments.preset,
        "sequence_length": arguments.sequence_length,
        "tokens": None if arguments.tokens is None else str(arguments.tokens),
        "device": arguments.device,
        "threads": arguments.threads,
        "steps": arguments.steps,
    }
    cases = [
        case({**shared, "beta": beta, "batch_size": size}, arguments.rounds)
        for beta in arguments.beta
        for size in arguments.batch_sizes
    ]
    return {
        **shared,
        "tokens": "Zipf's frequencies" if arguments.tokens is None else arguments.tokens.name,
        "threads": arguments.threads or torch.get_num_threads(),
        "machine": machine(arguments.device),
        "torch": torch.__version__,
        "command": shlex.join(["python", "benchmarks/distinct_tokens.py", *sys.argv[1:]]),
        "cases": cases,
    }


def case(settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Both forms of one batch size, each in its own process, and how far their gradients differ."""
    found: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    for _ in range(rounds):
        for form in FORMS:
            found[form].append(spawn({**settings, "form": form}))
    agreed = spawn({**settings, "form": None})
    best = {form: min(each["seconds"] for each in runs) for form, runs in found.items()}
    return {
        "beta": settings["beta"],
        "batch_size": settings["batch_size"],
        **agreed,
        "seconds": best,
        "memory_bytes": {
            form: min(each["memory_bytes"] for each in runs) for form, runs in found.items()
        },
        "speedup": best["plain"] / best["distinct"],
    }


def spawn(settings: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def child(settings: dict[str, Any]) -> dict[str, Any]:
    """One process: time and memory of a form, or the difference of the two without one."""
    import torch

    from edge_memllm.modeling import MemoryLLMForCausalLM, preset_config
    from edge_memllm.modeling.trainer import keep_freed_memory

    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    config = preset_config(settings["preset"], settings["beta"])
    model = MemoryLLMForCausalLM(config).to(settings["device"])
    ids = torch.from_numpy(draw(settings, config.vocab_size)).to(settings["device"])
    if settings["form"] is None:
        return {
            "positions": ids.numel(),
            "distinct_tokens": len(ids.unique()),
            "difference": largest_difference(model, ids),
        }
    if settings["device"] == "cpu":
        keep_freed_memory()
    model.model.distinct_tokens = FORMS[settings["form"]]
    return timed(model, ids, settings["steps"])


def draw(settings: dict[str, Any], vocabulary: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Token ids [B, T]: windows from all over the file, or drawn with Zipf's frequencies."""
    size, length = settings["batch_size"], settings["sequence_length"]
    if settings["tokens"] is None:
        share = 1 / np.arange(1, vocabulary + 1)
        return np.random.default_rng(0).choice(vocabulary, (size, length), p=share / share.sum())
    tokens = np.load(settings["tokens"], mmap_mode="r", allow_pickle=False)
    starts = np.random.default_rng(0).integers(0, len(tokens) - length, size)
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int64)


def timed(model: Any, ids: Any, steps: int) -> dict[str, Any]:
    """Median seconds of a step, and the bytes that steps took on top of the network."""
    import torch

    from edge_memllm.modeling.loss import next_token_loss

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    cuda = ids.device.type == "cuda"
    before = used_bytes(cuda)
    seconds = []
    for _ in range(steps + 1):
        start = perf_counter()
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        next_token_loss(logits, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(perf_counter() - start)
    return {"seconds": median(seconds[1:]), "memory_bytes": peak_bytes(cuda) - before}


def largest_difference(model: Any, ids: Any) -> float:
    """The largest difference of a gradient between the forms, as a part of its norm."""
    import torch

    from edge_memllm.modeling.loss import next_token_loss

    gradients = []
    for distinct in FORMS.values():
        model.model.distinct_tokens = distinct
        loss = next_token_loss(model(ids, use_cache=False).logits, ids)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    pairs = zip(*gradients, strict=True)
    return max(float((one - two).norm() / one.norm().clamp(min=1e-30)) for one, two in pairs)


def used_bytes(cuda: bool) -> int:
    import torch

    from edge_memllm.statistics import process_memory

    if cuda:
        return int(torch.cuda.memory_allocated())
    return process_memory().anon_bytes or 0


def peak_bytes(cuda: bool) -> int:
    import torch

    if cuda:
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text("ascii")
    peak, files = (
        int(line.split()[1]) << 10
        for name in ("VmHWM:", "RssFile:")
        for line in status.splitlines()
        if line.startswith(name)
    )
    return peak - files


def machine(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} processors"


def page(result: dict[str, Any]) -> str:
    rows = [
        f"| {each['beta']} | {each['batch_size']} | {each['positions']:,} "
        f"| {each['distinct_tokens']:,} "
        f"| {each['seconds']['plain']:.3f} | {each['seconds']['distinct']:.3f} "
        f"| {each['speedup']:.2f} "
        f"| {each['memory_bytes']['plain'] / 1e6:,.0f} "
        f"| {each['memory_bytes']['distinct'] / 1e6:,.0f} | {each['difference']:.1e} |"
        for each in result["cases"]
    ]
    return _PAGE.format(**result, rows="\n".join(rows))


if __name__ == "__main__":
    sys.exit(main())
