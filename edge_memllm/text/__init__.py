"""Text and tokens: tokenizers, chat templates, and what bounds the work of both."""
