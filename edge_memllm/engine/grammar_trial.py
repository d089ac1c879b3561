"""A program that tries to compile one grammar, from standard input, and prints what is wrong.

llguidance sets itself no limit for some schemas (a `multipleOf` of a million, alternatives within
alternatives), and a thread that compiles cannot be stopped. This process can. It imports nothing
of the package, so that it starts quickly.
"""

from __future__ import annotations

import sys

MOST_MEMORY = 1 << 30
MOST_SECONDS = 10  # of a processor, in case whoever waits for us is gone
READY = "ready"  # said first: what happens from here on is the grammar's doing


def limit() -> None:
    """Bound the memory and the time of this process, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))


def main() -> None:
    """Compile, and compute what may come first, for a vocabulary of single bytes."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    print(READY, flush=True)  # noqa: T201 - this is a program
    limit()
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(LLTokenizer("byte"), sys.stdin.read(), log_level=0, limits=limits)
    matcher.compute_logit_bias()
    print(matcher.get_error())  # noqa: T201 - this is a program


if __name__ == "__main__":
    main()
