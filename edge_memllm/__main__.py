"""``python -m edge_memllm``: the command line, where its script is not on the path."""

import sys

from edge_memllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
