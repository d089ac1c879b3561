"""What is measured of `edge-memllm serve` as a program, over HTTP."""
