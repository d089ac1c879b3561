"""Measuring artifacts: interleaved trials in processes of their own, and the machine's limits.

Says what was measured as plain data; knows nothing of options or printing. `edge-memllm bench` is
the command.
"""
