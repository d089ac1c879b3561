"""A real model through every door: whether it holds, and how it compares with llama.cpp."""
