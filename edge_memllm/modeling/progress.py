"""Training progress: one bar with loss, tokens per second and the time left."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class TrainingProgress(TrainerCallback):
    """Shows a bar on standard error.

    ``tokens_per_step`` counts all processes. The speed is that of the steps of this run since
    the last log, evaluation and saving left out by restarting the clock after them.
    """

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.bar: tqdm | None = None
        self._mark = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                file=sys.stderr,
                dynamic_ncols=True,
            )
        self._restart(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss and the speed, or an evaluation's loss."""
        if self.bar is None:
            return
        if "loss" in logs:
            steps, since = state.global_step - self._mark[0], time.monotonic() - self._mark[1]
            speed = steps * self.tokens_per_step / since if since > 0 else 0.0
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:,.0f} tokens/s")
            self._restart(state)
        elif "eval_loss" in logs:
            self.bar.write(f"step {state.global_step}: valid loss {logs['eval_loss']:.4f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the evaluation out of the speed."""
        self._restart(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the saving out of the speed."""
        self._restart(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def _restart(self, state: Any) -> None:
        self._mark = (state.global_step, time.monotonic())
