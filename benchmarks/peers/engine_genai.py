"""onnxruntime-genai as a contender: its generator, greedy, with its own choice of the token.

Keys and values are float32, the only type its model builder offers on a CPU, in a buffer that is
shared between steps.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Engine:
    """A folder made by the model builder.

    ``keep_logits``: copy them before each token is chosen, as they cannot be had afterwards.
    """

    def __init__(self, model: Path, threads: int, context: int, keep_logits: bool = False) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the library is loaded
        import onnxruntime_genai

        self._library = onnxruntime_genai
        config = onnxruntime_genai.Config(str(model))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)
        self._generator: Any = None
        self._keep_logits = keep_logits
        self._logits: NDArray[np.float32] | None = None
        self._settings = {**options, "kv": "float32", "past_present_share_buffer": True}

    def before_step(self) -> None:
        """Nothing precedes a step."""

    def start(self, tokens: list[int], new_tokens: int) -> int:
        """Read the prompt; the first token of the answer."""
        self.finish()
        options = self._library.GeneratorParams(self._model)
        options.set_search_options(
            do_sample=False,
            max_length=len(tokens) + new_tokens,
            past_present_share_buffer=True,
        )
        self._generator = self._library.Generator(self._model, options)
        self._generator.append_tokens(np.asarray(tokens, np.int32))
        return self.step()

    def step(self) -> int:
        """The next token; the first one after a prompt takes its logits as they are."""
        if self._keep_logits:
            self._logits = np.array(self._generator.get_logits(), np.float32).reshape(-1)
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def finish(self) -> None:
        """Let go of the last answer."""
        self._generator = None

    def logits(self) -> NDArray[np.float32] | None:
        """Logits [V] of the last position, if they are kept."""
        return self._logits

    def describe(self) -> dict[str, Any]:
        """What it runs with."""
        return dict(self._settings)
