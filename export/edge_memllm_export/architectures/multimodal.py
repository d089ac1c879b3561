"""The text of checkpoints that see or hear as well: its configuration and its weights.

Their config.json has a `text_config`; transformers has put the text's weights in two places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

_TEXT = {"model.language_model.": "model.", "language_model.": ""}
_OF_BOTH = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


class MultimodalText:
    """For a `Dense` family whose checkpoints may be of more than text."""

    whole_type: ClassVar[str]  # the model type of those
    other_modules: ClassVar[tuple[str, ...]]  # their modules that have nothing to do with text
    is_whole = False  # whether the checkpoint is one of them

    def text_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of the text's network, which may be a part of a larger one."""
        if fields["model_type"] != self.whole_type:
            return dict(fields)
        self.is_whole = True
        text = dict(fields["text_config"])
        return {**text, **{name: fields[name] for name in _OF_BOTH if name in fields}}

    def text_name(self, stored: str) -> str | None:
        """Return what the text's network calls a stored weight; None for another's."""
        if not self.is_whole:
            return stored
        if stored.removeprefix("model.").startswith(tuple(f"{m}." for m in self.other_modules)):
            return None
        for theirs, ours in _TEXT.items():
            if stored.startswith(theirs):
                return ours + stored.removeprefix(theirs)
        return stored

    @property
    def notes(self) -> Sequence[str]:
        """Return what is left out of the model, if something is."""
        if not self.is_whole:
            return ()
        return (f"{', '.join(self.other_modules)}: left out; the artifact reads text alone.",)
