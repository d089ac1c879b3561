"""The interactive prompt of ``edge-memllm run``: a conversation, or one completion after another.

Ctrl-C stops the answer and not the program. Knows the model only by ``answer.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_memllm.cli.answer import Answer, Message, ask, chat_prompt, has_template, statistics_line
from edge_memllm.errors import RequestError
from edge_memllm.interrupts import go_on

if TYPE_CHECKING:
    from edge_memllm.cli.settings import Settings
    from edge_memllm.model import Model

PROMPT = ">>> "
HELP = """\
Type a line and press Enter. Ctrl-C stops an answer; Ctrl-D, or Ctrl-C twice here, leaves.
  /set                 show the settings
  /set NAME VALUE      change one, for example: /set temperature 0.7
  /overlays            show which overlays are loaded, and which are on
  /overlays NAME ...   use these, in this order; all and none are names, too
  /stats               statistics of the last answer
  /reset               forget the conversation
  /help                this text
  /quit                leave"""


class Session:
    """Reads lines and answers them until the user leaves.

    With a chat template the conversation is kept and read again as a whole for each answer;
    without one, or with ``raw``, every line is continued on its own.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        *,
        raw: bool = False,
        statistics: bool = True,
        read_line: Callable[[str], str] = input,
    ) -> None:
        self.model = model
        self.settings = settings
        self.chat = has_template(model) and not raw
        self.messages: list[Message] = []
        self._show_statistics = statistics
        self._last: Answer | None = None
        self._read_line = read_line

    def run(self) -> None:
        """Read and answer until /quit, Ctrl-D, or Ctrl-C twice at the prompt."""
        _enable_history()
        _note(self._greeting())
        warned = False
        while True:
            try:
                line = self._read_line(PROMPT).strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if warned:
                    print()
                    return
                warned = True
                go_on()
                _note("\nCtrl-C again, or Ctrl-D, leaves.")
                continue
            warned = False
            if line.startswith("/"):
                if line in ("/quit", "/exit"):
                    return
                self._command(line)
            elif line:
                self._answer(line)

    def _greeting(self) -> str:
        if self.chat:
            mode = "chat: the model answers and remembers"
        else:
            mode = "completion: the model continues each line on its own"
        table = self.model.table
        reader = f"reader {table.reader_name} ({table.reader_reason})"
        return f"{mode}. {self.model.device}, {reader}. /help for help."

    def _answer(self, line: str) -> None:
        """Stream one answer; a request that cannot be done leaves the conversation as it was."""
        messages = [*self.messages, {"role": "user", "content": line}]
        answer = Answer()
        try:
            prompt = chat_prompt(self.model, messages) if self.chat else line
            with closing(ask(self.model, prompt, self.settings)) as pieces:
                for piece in pieces:
                    print(piece.text, end="", flush=True)
                    answer.add(piece)
        except KeyboardInterrupt:
            go_on()
            _note(" [stopped]", end="")
        except RequestError as error:
            _note(f"error: {error}" + (" /reset forgets the conversation." if self.chat else ""))
            return
        print()
        if self.chat:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._last = answer
        if self._show_statistics and answer.statistics is not None:
            _note(statistics_line(answer.statistics))

    def _command(self, line: str) -> None:
        """Do what a line that starts with a slash says."""
        match line.split(maxsplit=2):
            case ["/help"]:
                _note(HELP)
            case ["/reset"]:
                self.messages = []
                _note("The conversation is forgotten.")
            case ["/stats"]:
                _note(self._last_statistics())
            case ["/set"]:
                _note("\n".join(self.settings.lines()))
            case ["/overlays"]:
                _note(self._overlays())
            case ["/overlays", *names]:
                self._choose(" ".join(names).split())
            case ["/set", name, value]:
                self._set(name, value)
            case ["/set", name]:
                _note(f"error: /set {name} needs a value; /set alone shows the settings.")
            case [unknown, *_]:
                _note(f"error: there is no {unknown} like this. /help lists what there is.")

    def _set(self, name: str, value: str) -> None:
        try:
            self.settings = self.settings.changed(name, value)
        except RequestError as error:
            _note(f"error: {error}")

    def _overlays(self) -> str:
        loaded, chosen = self.model.overlays, self.settings.overlays
        on = loaded if chosen is None else chosen
        off = [name for name in loaded if name not in on]
        return f"on: {', '.join(on) or 'none'}; off: {', '.join(off) or 'none'}"

    def _choose(self, names: list[str]) -> None:
        """Switch overlays: the names that follow, or all, or none."""
        loaded = self.model.overlays
        words: dict[tuple[str, ...], tuple[str, ...] | None] = {("all",): None, ("none",): ()}
        chosen = words.get(tuple(names), tuple(dict.fromkeys(names)))
        wrong = [name for name in chosen or () if name not in loaded]
        if wrong:
            _note(f"error: there is no overlay {wrong[0]!r}. {self._overlays()}")
            return
        self.settings = replace(self.settings, overlays=chosen)
        _note(self._overlays())

    def _last_statistics(self) -> str:
        if self._last is None:
            return "There was no answer yet."
        if self._last.statistics is None:
            return "The last answer was stopped before its statistics were complete."
        return statistics_line(self._last.statistics)


def _note(text: str, end: str = "\n") -> None:
    """Say something that is not the model's text: on stderr, so that output stays clean."""
    print(text, end=end, file=sys.stderr, flush=True)


def _enable_history() -> None:
    """Arrow keys at the prompt, where Python was built with readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
