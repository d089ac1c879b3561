"""Weights of the graph: their forms, GPTQ, the steps of an int8 KV cache."""
