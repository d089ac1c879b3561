"""One answer of the model, streamed: asking for it, showing it, and its line of statistics."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_memllm.cli.text import byte_count

if TYPE_CHECKING:
    from edge_memllm.cli.settings import Settings
    from edge_memllm.model import Model, Piece
    from edge_memllm.statistics import GenerationStatistics

Message = dict[str, str]


@dataclass
class Answer:
    """What has come so far; complete once ``finish_reason`` is there."""

    text: str = ""
    finish_reason: str | None = None
    statistics: GenerationStatistics | None = None

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        self.text += piece.text
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
            self.statistics = piece.statistics


def ask(model: Model, prompt: str | list[int], settings: Settings) -> Generator[Piece, None, None]:
    """Start generating with these settings."""
    return model.stream(
        prompt,
        max_new_tokens=settings.max_new_tokens,
        stop=settings.stop,
        stop_token_ids=settings.stop_token_ids,
        sampling=settings.sampling,
        seed=settings.seed,
        speculate=settings.speculate,
        overlays=settings.overlays,
    )


def has_template(model: Model) -> bool:
    """Whether the artifact says how chat messages become a prompt."""
    return model.tokenizer.chat_template is not None


def chat_prompt(model: Model, messages: Sequence[Message]) -> list[int]:
    """The prompt that the chat template makes of the messages, as token ids."""
    template = model.tokenizer.chat_template
    assert template is not None
    return model.tokenizer.encode(template.render(messages), special=False)


def statistics_line(statistics: GenerationStatistics) -> str:
    """Speed, waiting time, reads and memory, in one line."""
    read = byte_count(statistics.table_bytes_read_per_token)
    figures = [f"{statistics.completion_tokens} tokens"]
    if statistics.decode_tokens_per_second is not None:
        figures.append(f"{statistics.decode_tokens_per_second:.1f} tokens/s")
    if statistics.draft_tokens:
        figures.append(
            f"{statistics.accepted_tokens} of {statistics.draft_tokens} draft tokens accepted"
        )
    figures += [
        f"first token after {statistics.time_to_first_token_seconds:.3f} s",
        f"{read} read from the table per token ({statistics.reader})",
        _memory(statistics),
        f"{statistics.device}",
        f"seed {statistics.seed}",
    ]
    if statistics.overlays:
        figures.append(f"overlays {' '.join(statistics.overlays)}")
    return f"[{', '.join(figures)}]"


def _memory(statistics: GenerationStatistics) -> str:
    if statistics.rss_anon_bytes is None or statistics.rss_file_bytes is None:
        return "resident memory not known on this system"
    return (
        f"resident memory {byte_count(statistics.rss_anon_bytes)} of its own "
        f"and {byte_count(statistics.rss_file_bytes)} of mapped files"
    )
