"""Gemma 4 at its sizes with random weights: our artifact and llama.cpp on the same network."""
