"""`optimum-cli export edge-memllm MODEL OUT`: Optimum finds this file in its namespace of plugins.

The folder is shared with Optimum and other plugins, so it must not have an `__init__.py`.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from edge_memllm.cli.export import EXPORT
from edge_memllm.cli.main import run_command
from edge_memllm.cli.options import add_options


class EdgeMemLLMExportCommand(BaseOptimumCLICommand):
    """The options and the work of `edge-memllm export`, under Optimum's command line."""

    COMMAND = CommandInfo(name="edge-memllm", help="Export a MemoryLLM checkpoint to an artifact.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options; Optimum makes the parser."""
        parser.description = EXPORT.description
        add_options(parser, EXPORT.options)

    def run(self) -> None:
        """Export, or leave with an exit code and one line that says why not."""
        code = run_command(EXPORT.run, self.args)
        if code:
            sys.exit(code)


REGISTER_COMMANDS = [(EdgeMemLLMExportCommand, ExportCommand)]
