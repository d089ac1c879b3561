"""Where weights come from that are no folder of transformers: for now, GGUF files.

A source gives a model's configuration as transformers writes it, its weights by transformers'
names and the files that say what its text is made of. It knows nothing of graphs and tables.
"""
