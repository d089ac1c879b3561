"""A parser that says what was probably meant, in place of a word that it does not know."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)")


class SuggestingParser(argparse.ArgumentParser):
    """One command's parser; what it does not know it refuses itself, with its own usage."""

    def parse_known_args(  # type: ignore[override]  # its overloads tell kinds of namespaces apart
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse as argparse does, but leave nothing over: no other parser would know it."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            names = [name for name in self._option_string_actions if name.startswith("--")]
            options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            meant = [name for word in options if (name := likely(word, names))]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_question(meant)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, with what was meant if that is likely; exit with 2."""
        found = _CHOICE.search(message)
        if found is not None:
            name = likely(found[1], re.findall(r"[\w.+-]+", found[2]))
            message += _question([name] if name else [])
        super().error(message)


def likely(word: str, known: Collection[str]) -> str | None:
    """Return the one of some words that another most likely stands for; None if none does."""
    longer = [name for name in known if len(word) > 3 and name.startswith(word)]
    near = longer or get_close_matches(word, list(known), 1, 0.7)
    return near[0] if near else None


def _question(meant: Sequence[str]) -> str:
    return f". Did you mean {' and '.join(dict.fromkeys(meant))}?" if meant else ""
