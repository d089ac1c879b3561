"""The float model that everything is held against: transformers' reading of the same file.

Its weights are dequantised by transformers and the `gguf` library, by none of our code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 512  # tokens, each predicted from those before it in its window


class Reference:
    """A model of transformers in float32, of a GGUF file or a folder, and its tokenizer."""

    def __init__(self, source: Path, threads: int) -> None:
        # Both are read when the libraries are imported.
        os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        torch.set_num_threads(threads)
        self._torch = torch
        folder, file, dense = source, {}, {}
        if not source.is_dir():
            folder, file = source.parent, {"gguf_file": source.name}
            dense = {"quantization_config": GgufConfig(dequantize=True)}
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **file, **dense
        )
        self.model.eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **file)

    @property
    def bytes(self) -> int:
        """Of its weights, each once."""
        return sum(each.numel() * each.element_size() for each in self.model.parameters())

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, none added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def message(self, text: str) -> list[int]:
        """Ids of a message of a user, up to where the answer begins."""
        messages = [{"role": "user", "content": text}]
        words = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return self.tokens(words)

    def log_probabilities(self, window: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities [T - 1, V] of the tokens behind the first of a window [T]."""
        with self._torch.inference_mode():
            logits = self.model(self._torch.tensor([window[:-1]]), use_cache=False).logits[0]
            found: NDArray[np.float32] = logits.log_softmax(-1).numpy()
        return found


def windows(tokens: Sequence[int], most: int | None = None) -> list[list[int]]:
    """Cut tokens into windows: each predicts its tokens behind the first, all of them together all.

    At most `most` of them, all whole but the last of a text.
    """
    starts = range(0, len(tokens) - 1, WINDOW)
    return [list(tokens[at : at + WINDOW + 1]) for at in starts][:most]
