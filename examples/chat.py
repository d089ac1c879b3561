"""Chat with models, in a window or in a terminal.

    python examples/chat.py MODEL [MODEL ...]
    python examples/chat.py --terminal MODEL

MODEL is an artifact, or anything else that `edge_memllm.load` takes. A session keeps what is
computed, so only what is new is. The window keeps the chats until it is closed.
"""

from __future__ import annotations

import argparse
import threading
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import edge_memllm
from edge_memllm.statistics import process_memory

MOST_TOKENS = 400
_TICK = 40  # milliseconds between two looks at what came


def converse(model: str) -> None:
    """Answer lines until one is empty; without a chat template, go on behind them."""
    with edge_memllm.load(model) as loaded, loaded.session() as session:
        while line := input("> "):
            if loaded.tokenizer.chat_template is None:
                session.append(line)
                pieces: Any = session.stream(max_new_tokens=60)
            else:
                pieces = session.stream_chat(line, max_new_tokens=60)
            for piece in pieces:
                print(piece.text, end="", flush=True)
            print()


@dataclass
class Talk:
    """One chat: its messages, which say all there is to know of it."""

    messages: list[Any] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Its first words."""
        return self.messages[0]["content"][:32] if self.messages else "New chat"


class Answering:
    """A thread that loads a model and answers; what happens comes out of `events`."""

    def __init__(self) -> None:
        self.events: SimpleQueue[tuple[str, str]] = SimpleQueue()  # a kind, and its text
        self._asked: SimpleQueue[Any] = SimpleQueue()
        self._end = edge_memllm.Cancellation()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def load(self, path: str) -> None:
        """Load another model in place of the present one."""
        self._asked.put(path)

    def answer(self, talk: Talk, line: str) -> None:
        """Answer a line; the talk gets both when the answer ends, or is stopped."""
        self._end = edge_memllm.Cancellation()
        self._asked.put((talk, line, self._end))

    def stop(self) -> None:
        """End the answer within one token."""
        self._end.cancel()

    def close(self) -> None:
        """End the thread, and wait until the model is freed."""
        self.stop()
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        model = session = None
        while (asked := self._asked.get()) is not None:
            try:
                if isinstance(asked, str):
                    if model is not None:
                        model.close()
                    model = edge_memllm.load(asked, progress=self._tell)
                    session = model.session()
                    self.events.put(("ready", repr(model)))
                elif session is not None:
                    self._answer(session, *asked)
            except edge_memllm.GenerationCancelledError:
                self.events.put(("end", "stopped"))
            except edge_memllm.EdgeMemLLMError as error:
                self.events.put(("end", str(error)))
        if model is not None:
            model.close()

    def _answer(
        self, session: edge_memllm.Session, talk: Talk, line: str, end: edge_memllm.Cancellation
    ) -> None:
        session.messages = list(talk.messages)
        try:
            for piece in session.stream_chat(line, max_new_tokens=MOST_TOKENS, cancellation=end):
                self.events.put(("text", piece.text))
        finally:
            talk.messages = list(session.messages)
        speed = piece.reply.statistics.decode_tokens_per_second if piece.reply else None
        self.events.put(("end", "" if speed is None else f"{speed:.1f} tokens/s"))

    def _tell(self, stage: str, done: int, total: int) -> None:
        self.events.put(("state", f"{stage}: {done} of {total}"))


class Window:
    """The window: chats at the left, the one that is open, a line to write in, what it costs."""

    def __init__(self, models: list[str]) -> None:
        import tkinter as tk
        from tkinter import ttk

        self.root = tk.Tk()
        self.root.title("Chat")
        self.root.geometry("900x600")
        self.answering = Answering()
        self.talks = [Talk()]
        self.talk = self.talks[0]
        side, page = ttk.Frame(self.root, padding=8), ttk.Frame(self.root, padding=8)
        side.pack(side="left", fill="y")
        page.pack(side="left", fill="both", expand=True)
        self.model = ttk.Combobox(side, values=models, state="readonly")
        self.model.set(models[0])
        self.model.bind("<<ComboboxSelected>>", lambda _: self.load())
        self.history = tk.Listbox(side, width=28, exportselection=False)
        self.history.bind("<<ListboxSelect>>", lambda _: self._chosen())
        self.memory = ttk.Progressbar(side)
        self.used = ttk.Label(side)
        self.text = tk.Text(page, wrap="word", state="disabled", font=("TkDefaultFont", 11))
        self.text.tag_configure("user", foreground="#0f6b5c")
        self.line = ttk.Entry(page)
        self.line.bind("<Return>", lambda _: self.send())
        self.state = ttk.Label(page, text="loading")
        buttons = ttk.Frame(page)
        self.model.pack(fill="x")
        ttk.Button(side, text="New chat", command=self.begin).pack(fill="x", pady=6)
        self.history.pack(fill="both", expand=True)
        self.used.pack(anchor="w", pady=(6, 0))
        self.memory.pack(fill="x")
        self.text.pack(fill="both", expand=True)
        self.line.pack(fill="x", pady=6)
        buttons.pack(fill="x")
        for name, act in (
            ("Send", self.send),
            ("Stop", self.answering.stop),
            ("Copy the answer", self.copy),
        ):
            ttk.Button(buttons, text=name, command=act).pack(side="left", padx=(0, 6))
        self.state.pack(anchor="w")
        self.busy = True
        self.load()
        self._list()
        self._look()

    def run(self) -> None:
        """Show it until it is closed."""
        self.line.focus()
        self.root.mainloop()
        self.answering.close()

    def load(self) -> None:
        """Load the model that is chosen."""
        self.busy = True
        self.answering.load(self.model.get())

    def send(self) -> None:
        """Have the line answered."""
        line = self.line.get().strip()
        if not line or self.busy:
            return
        self.busy = True
        self.line.delete(0, "end")
        self._write(f"{line}\n", "user")
        self.answering.answer(self.talk, line)

    def begin(self) -> None:
        """Begin another chat."""
        if self.talk.messages and not self.busy:
            self.talks.append(Talk())
            self._open(self.talks[-1])

    def copy(self) -> None:
        """Put the last answer into the clipboard."""
        answers = [each["content"] for each in self.talk.messages if each["role"] == "assistant"]
        if answers:
            self.root.clipboard_clear()
            self.root.clipboard_append(answers[-1])

    def _chosen(self) -> None:
        chosen = self.history.curselection()
        if chosen and not self.busy:
            self._open(self.talks[chosen[0]])

    def _open(self, talk: Talk) -> None:
        self.talk = talk
        self.text.configure(state="normal")
        self.text.delete("1.0", "end")
        for message in talk.messages:
            self._write(f"{message['content']}\n", message["role"])
        self._list()

    def _list(self) -> None:
        self.history.delete(0, "end")
        for talk in self.talks:
            self.history.insert("end", talk.title)
        self.history.selection_set(self.talks.index(self.talk))

    def _write(self, text: str, tag: str = "assistant") -> None:
        self.text.configure(state="normal")
        self.text.insert("end", text, tag)
        self.text.configure(state="disabled")
        self.text.see("end")

    def _look(self) -> None:
        """Show what came since the last look, and what memory is in use."""
        try:
            while True:
                self._show(*self.answering.events.get_nowait())
        except Empty:
            pass
        used = process_memory().anon_bytes
        if used is not None:
            self.used.configure(text=f"memory: {used / 1e6:.0f} MB")
            self.memory.configure(maximum=max(1e9, used), value=used)
        self.root.after(_TICK, self._look)

    def _show(self, kind: str, text: str) -> None:
        if kind == "text":
            self._write(text)
            return
        self.state.configure(text=text)
        if kind in ("ready", "end"):
            self.busy = False
        if kind == "end":
            self._write("\n")
            self._list()


def main() -> None:
    """Read the command line, and chat."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="an artifact")
    parser.add_argument("--terminal", action="store_true", help="no window")
    options = parser.parse_args()
    if options.terminal:
        converse(options.models[0])
        return
    try:
        import tkinter as tk
    except ModuleNotFoundError:
        parser.error("this Python has no tkinter. Install it, or give --terminal.")
    try:
        window = Window(options.models)
    except tk.TclError as error:
        parser.error(f"there is no window to be had ({error}). Give --terminal.")
    window.run()


if __name__ == "__main__":
    main()
