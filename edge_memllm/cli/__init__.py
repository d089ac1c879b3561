"""The command line: ``main`` dispatches, one module per command parses, calls and prints.

Nothing here computes: what a command shows comes from the library, imported when it runs.
"""
