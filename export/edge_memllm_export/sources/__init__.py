"""Where weights come from: folders of transformers, and GGUF files.

A source gives a model's configuration as transformers writes it, its weights by transformers'
names and the files that say what its text is made of. It knows nothing of graphs and tables.
"""
