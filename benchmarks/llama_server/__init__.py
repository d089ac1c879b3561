"""llama.cpp's own checks of its server, run against `edge-memllm serve`."""
