"""What a decode step costs outside the graph: each part of it, and the sum against the step.

    python benchmarks/step_overhead.py ARTIFACT [--new-tokens 64] [--speculate 0]

Wraps the public pieces with timers while a text is generated, greedily and sampled, and prints
the median over the steps in microseconds. The graph itself is ONNX Runtime's own call; everything
else is this project's and Python's: fetching the record, writing the inputs and converting the
logits, choosing the token, turning it into text, statistics, the loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import edge_memllm
from edge_memllm import Sampling
from edge_memllm.sampling import Sampler
from edge_memllm.table import Table
from edge_memllm.tokenization import Detokenizer
from edge_memllm_runtimes.ort_library import import_library

SAMPLINGS = {
    "greedy": Sampling(),
    "greedy, penalty 1.1": Sampling(repetition_penalty=1.1),
    "temperature 0.7, top-k 40": Sampling(temperature=0.7, top_k=40),
    "temperature 0.7, top-p 0.9": Sampling(temperature=0.7, top_p=0.9),
    "temperature 1": Sampling(temperature=1.0),
}
FIRST_STEPS = 4  # left out: they allocate and bind


class Watch:
    """Sums up the seconds spent in functions, by part, until it is read."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, owner: Any, name: str, part: str) -> Iterator[None]:
        """Time the function `name` of `owner` as `part`."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                spent = perf_counter() - start
                self.seconds[part] = self.seconds.get(part, 0.0) + spent

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, original)

    def read(self) -> dict[str, float]:
        """Return the seconds by part since the last time, and begin again."""
        found, self.seconds = self.seconds, {}
        return found


def measure(
    model: edge_memllm.Model, sampling: Sampling, prompt: list[int], arguments: argparse.Namespace
) -> dict[str, float]:
    """Median microseconds of each part of a step."""
    watch, steps = Watch(), []
    with ExitStack() as timers:
        for owner, name, part in (
            (import_library().InferenceSession, "run_with_iobinding", "graph"),
            (type(model.runtime), "step", "runtime"),
            (Table, "fetch", "records"),
            (Sampler, "pick", "choosing"),
            (Detokenizer, "push", "text"),
        ):
            timers.enter_context(watch.on(owner, name, part))
        if hasattr(Table, "announce"):
            timers.enter_context(watch.on(Table, "announce", "announcing"))
        pieces = model.stream(
            prompt,
            max_new_tokens=arguments.new_tokens,
            sampling=sampling,
            seed=0,
            ignore_eos=True,
            speculate=arguments.speculate,
        )
        next(pieces)
        watch.read()
        start = perf_counter()
        for _ in pieces:
            now = perf_counter()
            steps.append({"step": now - start, **watch.read()})
            start = perf_counter()
    kept = [each for each in steps[FIRST_STEPS:] if "graph" in each]
    parts = ("step", "graph", "runtime", "records", "choosing", "text", "announcing")
    found = {part: 1e6 * median(each.get(part, 0.0) for each in kept) for part in parts}
    found["runtime"] = 1e6 * median(each["runtime"] - each["graph"] for each in kept)
    found["outside"] = 1e6 * median(each["step"] - each["graph"] for each in kept)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--reader", default="auto")
    parser.add_argument("--speculate", type=int, default=0)
    arguments = parser.parse_args()
    with edge_memllm.load(
        arguments.artifact, device="cpu", reader=arguments.reader, threads=arguments.threads
    ) as model:
        vocabulary = model.manifest.model.vocab_size
        random = np.random.default_rng(0)
        prompt = random.choice(vocabulary, arguments.prompt_tokens, replace=False).tolist()
        print(f"{model.runtime.name}, reader {model.reader}, vocabulary {vocabulary:,}")
        parts = ("runtime", "records", "choosing", "text", "announcing")
        print(
            f"{'microseconds per step':28}{'step':>9}{'graph':>9}"
            + "".join(f"{part:>11}" for part in parts)
            + f"{'outside':>9}{'share':>7}"
        )
        for name, sampling in SAMPLINGS.items():
            found = measure(model, sampling, prompt, arguments)
            print(
                f"{name:28}{found['step']:9.0f}{found['graph']:9.0f}"
                + "".join(f"{found[part]:11.1f}" for part in parts)
                + f"{found['outside']:9.1f}{found['outside'] / found['step']:7.1%}"
            )


if __name__ == "__main__":
    main()
