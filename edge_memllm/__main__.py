"""``edge-memllm`` and ``python -m edge_memllm``: the command line.

Loading it takes a part of a second, in which Ctrl-C ends it as quietly as later.
"""

import sys

_INTERRUPTED = 130  # as in `edge_memllm.cli.main`, which is what is not loaded then


def main() -> int:
    """Run the command line, and return its exit code."""
    try:
        from edge_memllm.cli.main import main as run

        return run()
    except KeyboardInterrupt:  # before a command begins; it takes what comes later itself
        sys.stderr.write("\n")
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
