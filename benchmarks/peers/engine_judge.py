"""transformers' own Llama in float32: what the contenders' answers are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Engine:
    """A Hugging Face folder, computed from the start for every token: slow and simple."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._tokens: list[int] = []
        self._logits: NDArray[np.float32] = np.empty(0, np.float32)

    def before_step(self) -> None:
        """Nothing precedes a step."""

    def start(self, tokens: list[int], new_tokens: int) -> int:
        """Read the prompt; the first token of the answer."""
        self._tokens = list(tokens)
        return self.step()

    def step(self) -> int:
        """The next token."""
        with self._torch.inference_mode():
            outputs = self._model(self._torch.tensor([self._tokens]), use_cache=False)
        self._logits = outputs.logits[0, -1].numpy()
        self._tokens.append(int(self._logits.argmax()))
        return self._tokens[-1]

    def finish(self) -> None:
        """Nothing to let go of."""

    def logits(self) -> NDArray[np.float32]:
        """Logits [V] of the last position."""
        return self._logits

    def describe(self) -> dict[str, Any]:
        """What it runs with."""
        return {}
