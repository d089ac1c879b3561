"""What prompt lookup gains and costs, and whether texts stay the same.

    python benchmarks/speculation.py ARTIFACT TEXT_FILE [--speculate 8] [--prompts 20]

Prompts are made from a text: some invite copying (a passage twice, then its beginning), some do
not. Each is continued with and without drafts, in alternating order, on one thread; speeds are in
processor time of this process from the first token on, which other work on the machine disturbs
less than the clock does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import edge_memllm
from edge_memllm import GenerationStatistics, Sampling

SAMPLINGS = {
    "greedy": Sampling(),
    "temperature 0.8, top-p 0.95": Sampling(temperature=0.8, top_p=0.95),
    "greedy, penalty 1.2": Sampling(repetition_penalty=1.2),
}


def prompts(text: str, count: int) -> dict[str, list[str]]:
    """Prompts that invite copying, and prompts that do not."""
    passages = [line[:200] for line in text.splitlines() if len(line) > 200][:count]
    words = text.split()
    return {
        "copying": [f"{passage}\n{passage}\n{passage[:40]}" for passage in passages],
        "not copying": [" ".join(words[40 * n : 40 * n + 12]) for n in range(count)],
    }


def run(
    model: edge_memllm.Model, prompt: str, sampling: Sampling, seed: int, drafts: int, count: int
) -> tuple[list[int], float, GenerationStatistics]:
    """The tokens of one text, the processor seconds after its first, its statistics."""
    tokens: list[int] = []
    start = 0.0
    for piece in model.stream(
        prompt,
        max_new_tokens=count,
        sampling=sampling,
        seed=seed,
        ignore_eos=True,
        speculate=drafts,
    ):
        if not tokens:
            start = time.process_time()
        tokens.append(piece.token)
    assert piece.statistics is not None
    return tokens, time.process_time() - start, piece.statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--speculate", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=150)
    arguments = parser.parse_args()
    made = prompts(arguments.text.read_text("utf-8"), arguments.prompts)
    with edge_memllm.load(arguments.artifact, device="cpu", threads=1, reader="ram") as model:
        for kind, texts in made.items():
            for name, sampling in SAMPLINGS.items():
                ratios, equal, drafted, accepted = [], 0, 0, 0
                for number, prompt in enumerate(texts):
                    runs = {}
                    for drafts in (0, arguments.speculate)[:: 1 if number % 2 else -1]:
                        runs[drafts] = run(
                            model, prompt, sampling, number, drafts, arguments.new_tokens
                        )
                    plain, with_drafts = runs[0], runs[arguments.speculate]
                    equal += plain[0] == with_drafts[0]
                    ratios.append(plain[1] / with_drafts[1])
                    drafted += with_drafts[2].draft_tokens
                    accepted += with_drafts[2].accepted_tokens
                print(
                    f"{kind:12}{name:29}{equal} of {len(texts)} texts equal, "
                    f"{accepted} of {drafted} drafts accepted, speed ratio: median "
                    f"{median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
                )


if __name__ == "__main__":
    main()
