"""Text and tokens: tokenizers, chat templates, and what bounds the work of both.

Here are the names of the files of a checkpoint that say what text is: whatever copies a checkpoint,
or makes an artifact of it, carries them along.
"""

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
# What an artifact has of its own, made of the files above; no checkpoint has it.
VOCABULARY_FILE = "tokenizer.safetensors"

TOKEN_FILES = (TOKENIZER_FILE, CONFIG_FILE, TOKENS_FILE, TEMPLATE_FILE)
TEXT_FILES = (*TOKEN_FILES, GENERATION_FILE)
