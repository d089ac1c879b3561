"""Chat with models, in a window or in a terminal.

    python examples/chat.py MODEL [MODEL ...]
    python examples/chat.py --terminal MODEL

MODEL is an artifact, or anything else that `edge_memllm.load` takes; packed, the program offers the
artifacts beside it. A session keeps what is computed, so only what is new is. The window keeps its
chats in one file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any

from edge_memllm.errors import Cancellation, EdgeMemLLMError, GenerationCancelledError
from edge_memllm.loading import load
from edge_memllm.model import Model
from edge_memllm.session import Session
from edge_memllm.statistics import process_memory

MOST_TOKENS = 400
HISTORY = Path.home() / ".edge-memllm-chats.json"
STAGES = {"files": "Checking files", "graph": "Loading the graph", "table": "Opening the table"}
INK, FAINT, ACCENT, GROUND, PAPER, TINT = (
    "#23272e",
    "#5d636b",
    "#0f6b5c",
    "#f3f1ec",
    "#fffefb",
    "#e3efec",
)
_TICK = 40  # milliseconds between two looks at what came


def converse(model: str) -> None:
    """Answer lines until one is empty, or the input ends."""
    with load(model) as loaded, loaded.session() as session:
        while line := _line():
            if loaded.tokenizer.chat_template is None:
                session.append(line)
                pieces: Any = session.stream(max_new_tokens=60)
            else:
                pieces = session.stream_chat(line, max_new_tokens=MOST_TOKENS)
            for piece in pieces:
                print(piece.text, end="", flush=True)
            print()


def _line() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


def answers(model: Model, session: Session, line: str, end: Cancellation) -> Iterator[str]:
    """Yield pieces of the answer to a line; without a chat template, the text goes on behind it.

    The session's messages tell what was said before, and have both lines afterwards.
    """
    if model.tokenizer.chat_template is not None:
        for piece in session.stream_chat(line, max_new_tokens=MOST_TOKENS, cancellation=end):
            yield piece.text
        return
    before, said = session.messages, ""
    ids = model.tokenize("".join(each["content"] for each in before) + line)
    session.append(ids[session.rewind(ids) :])
    try:
        for text in session.stream(max_new_tokens=60, cancellation=end):
            said += text.text
            yield text.text
    finally:
        answer = {"role": "assistant", "content": said}
        session.messages = [*before, {"role": "user", "content": line}, answer]


@dataclass
class Talk:
    """One chat: its messages, which say all there is to know of it."""

    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Its first words."""
        line = " ".join(self.messages[0]["content"].split()) if self.messages else "New chat"
        return line if len(line) <= 32 else line[:31] + "…"


class History:
    """Chats in a file, which is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        """Name the file; it need not be there yet."""
        self.path = path

    def read(self) -> list[Talk]:
        """Return the chats, the latest last. Raises `ValueError` if it holds something else."""
        try:
            found = json.loads(self.path.read_text("utf-8"))
            talks = [Talk(list(each["messages"])) for each in found["chats"]]
            for message in (each for talk in talks for each in talk.messages):
                _ = message["role"] + message["content"] + ""  # texts, or TypeError
        except FileNotFoundError:
            return []
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} holds no chats of this program. Move it away, or name another file "
                "with --history."
            ) from error
        return talks

    def write(self, talks: list[Talk]) -> None:
        """Keep the chats that something was said in."""
        partial = self.path.with_name(self.path.name + ".partial")
        kept = {"chats": [asdict(each) for each in talks if each.messages]}
        partial.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")
        partial.replace(self.path)


class Answering:
    """A thread that loads a model and answers; what happens comes out of `events`.

    An event is a kind and a text: `state` and `text` come in between; `ready`, `end`, and `failed`
    with the reason end what was asked.
    """

    def __init__(self) -> None:
        self.events: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self._asked: SimpleQueue[Any] = SimpleQueue()
        self._end = Cancellation()
        self._model: Model | None = None
        self._session: Session | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def load(self, path: str) -> None:
        """Load another model in place of the present one."""
        self._end = Cancellation()
        self._asked.put((self._load, path, self._end))

    def answer(self, talk: Talk, line: str) -> None:
        """Answer a line; the talk gets both when the answer ends, or is stopped."""
        self._end = Cancellation()
        self._asked.put((self._answer, talk, line, self._end))

    def stop(self) -> None:
        """End the answer within one token, or the loading at its next stage."""
        self._end.cancel()

    def close(self) -> None:
        """End the thread, and wait until the model is freed."""
        self.stop()
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            work, *what = asked
            try:
                self.events.put(work(*what))
            except GenerationCancelledError:
                self.events.put(("end", "Stopped"))
            except EdgeMemLLMError as error:
                self.events.put(("failed", str(error)))
            except Exception as error:  # the window would wait for ever
                traceback.print_exc()
                self.events.put(("failed", f"This program has failed: {error!r}"))
        self._free()

    def _load(self, path: str, end: Cancellation) -> tuple[str, str]:
        def tell(stage: str, done: int, total: int) -> None:
            end.check()
            share = f" ({done} of {total})" if total > 1 else ""
            self.events.put(("state", f"{STAGES.get(stage, stage)}{share}…"))

        self._free()
        self._model = load(path, progress=tell)
        self._session = self._model.session()
        chats = self._model.tokenizer.chat_template is not None
        return "ready", "" if chats else "This model does not chat: it goes on with your text."

    def _answer(self, talk: Talk, line: str, end: Cancellation) -> tuple[str, str]:
        if self._model is None or self._session is None:
            return "failed", "There is no model. Choose one at the left."
        before, count, began = talk.messages, 0, perf_counter()
        self._session.messages = list(before)
        try:
            for text in answers(self._model, self._session, line, end):
                count += 1
                if text:  # a token may be a part of a character
                    self.events.put(("text", text))
                began = perf_counter() if count == 1 else began
        finally:
            said = self._session.messages
            answered = len(said) > len(before) and said[-1]["content"]
            talk.messages = list(said) if answered else before
        speed = (count - 1) / max(perf_counter() - began, 1e-9)
        return "end", f"{speed:.1f} tokens a second" if answered else "The model had nothing to say"

    def _free(self) -> None:
        model, self._model, self._session = self._model, None, None
        if model is not None:
            model.close()


class Window:
    """The window: models and chats at the left, the chat that is open, a place to write."""

    def __init__(self, models: list[str], history: History, first: str = "") -> None:
        """Open it with the chats of a file, and send a first line once there is a model.

        Raises `ValueError` as `History.read` does.
        """
        import tkinter as tk
        from tkinter import ttk

        self.tk, self.ttk = tk, ttk
        self.history = history
        self.talks = [*history.read(), Talk()]
        self.talk = self.talks[-1]
        self.models = {_name(each, models): each for each in models}
        self.root = tk.Tk()
        self.root.title("Chat")
        self.root.geometry("960x640")
        self.root.minsize(640, 420)
        self._style()
        self.root.columnconfigure(1, weight=1)
        self.root.rowconfigure(0, weight=1)
        self._side().grid(row=0, column=0, sticky="ns")
        self._page().grid(row=0, column=1, sticky="nsew")
        self.root.protocol("WM_DELETE_WINDOW", self.close)
        self.root.bind("<Escape>", lambda _: self.answering.stop())
        self.answering = Answering()
        self.interrupted = False
        self.first = first
        self.asking = False
        self.asked = ""  # the line that is to be answered, until something comes
        self._set_busy(False)
        self._open(self.talk)
        if self.models:
            self.load()
        else:
            self.state.configure(text="There is no model yet. Open the folder of one.")
        self._look()

    def run(self) -> None:
        """Show it until it is closed; whatever came until then is kept."""
        signal.signal(signal.SIGINT, self._interrupt)
        self.line.focus()
        try:
            self.root.mainloop()
        finally:
            self.answering.close()
            self.history.write(self.talks)

    def close(self) -> None:
        """Close the window; an answer that is being written is kept as far as it came."""
        self.root.destroy()

    def _interrupt(self, *_: Any) -> None:
        self.interrupted = True  # a widget may be under work now

    def load(self) -> None:
        """Load the model that is chosen."""
        self._set_busy(True)
        self.choice.selection_clear()
        self.state.configure(text="Loading…")
        self.answering.load(self.models[self.choice.get()])

    def open_folder(self) -> None:
        """Let another model be chosen."""
        from tkinter import filedialog

        if folder := filedialog.askdirectory(title="The folder of a model", mustexist=True):
            self.models[Path(folder).name] = folder
            self.choice.configure(values=list(self.models))
            self.choice.set(Path(folder).name)
            self.load()

    def send(self, line: str = "") -> str:
        """Have the line answered; "break" keeps the Enter key from beginning another one."""
        line = line or self.line.get("1.0", "end").strip()
        if line and not self.busy:
            self._set_busy(True)
            self.asking = True
            self.asked = line
            self.line.delete("1.0", "end")
            self._write(line, "user")
            self.state.configure(text="Reading…")
            self.answering.answer(self.talk, line)
        return "break"

    def begin(self) -> None:
        """Begin another chat."""
        if not self.talks[-1].messages:
            self._open(self.talks[-1])
            return
        self.talks.append(Talk())
        self._open(self.talks[-1])

    def delete(self) -> None:
        """Delete the chat that is open, if that is what is wanted."""
        from tkinter import messagebox

        question = f"Delete “{self.talk.title}”? It cannot be brought back."
        if self.talk.messages and messagebox.askyesno("Delete a chat", question):
            self.talks.remove(self.talk)
            self.history.write(self.talks)
            self.talks = self.talks or [Talk()]
            self._open(self.talks[-1])

    def copy(self) -> None:
        """Put the last answer into the clipboard."""
        answers = [each["content"] for each in self.talk.messages if each["role"] == "assistant"]
        if answers:
            self.root.clipboard_clear()
            self.root.clipboard_append(answers[-1])
            self.state.configure(text="Copied")

    def _style(self) -> None:
        from tkinter import font

        for name in ("TkDefaultFont", "TkTextFont"):
            font.nametofont(name).configure(family="DejaVu Sans", size=11 if "Text" in name else 10)
        self.root.configure(background=GROUND)
        style = self.ttk.Style(self.root)
        style.theme_use("clam")
        edge = "#d9d5cb"
        style.configure(
            ".", background=GROUND, foreground=INK, bordercolor=edge, lightcolor=GROUND,
            darkcolor=GROUND, troughcolor=edge, focuscolor=ACCENT,
        )  # fmt: skip
        style.configure("TButton", padding=(10, 5), background=PAPER)
        style.map("TButton", background=[("active", TINT)], foreground=[("disabled", "#9a9ea4")])
        style.configure("Go.TButton", background=ACCENT, foreground=PAPER)
        style.map(
            "Go.TButton",
            background=[("disabled", GROUND), ("active", "#0a4f44")],
            foreground=[("disabled", "#9a9ea4")],
        )
        style.configure("Faint.TLabel", foreground=FAINT)
        style.configure("TCombobox", fieldbackground=PAPER, padding=4)
        style.map("TCombobox", fieldbackground=[("readonly", PAPER)])

    def _side(self) -> Any:
        side = self.ttk.Frame(self.root, padding=(12, 12, 0, 12))
        side.rowconfigure(4, weight=1)
        self.choice = self.ttk.Combobox(side, values=list(self.models), state="readonly", width=26)
        self.choice.set(next(iter(self.models), ""))
        self.choice.bind("<<ComboboxSelected>>", lambda _: self.load())
        self.folder = self.ttk.Button(side, text="Open a model…", command=self.open_folder)
        self.new = self.ttk.Button(side, text="New chat", command=self.begin)
        self.list = self.tk.Listbox(
            side, exportselection=False, relief="flat", highlightthickness=1, activestyle="none",
            highlightbackground="#d9d5cb", highlightcolor=ACCENT, background=PAPER, foreground=INK,
            selectbackground=ACCENT, selectforeground=PAPER,
        )  # fmt: skip
        self.list.bind("<<ListboxSelect>>", lambda _: self._chosen())
        self.remove = self.ttk.Button(side, text="Delete chat", command=self.delete)
        self.used = self.ttk.Label(side, style="Faint.TLabel")
        self.memory = self.tk.Frame(side, height=10, background="#d9d5cb")
        self.filled = self.tk.Frame(self.memory, background=ACCENT)
        self.ttk.Label(side, text="Model").grid(row=0, sticky="w", pady=(0, 4))
        rows = (self.choice, self.folder, self.new, self.list, self.remove, self.used, self.memory)
        for row, (each, above) in enumerate(zip(rows, (0, 6, 18, 6, 6, 18, 4), strict=True), 1):
            each.grid(row=row, sticky="nsew", pady=(above, 0))
        return side

    def _page(self) -> Any:
        page = self.ttk.Frame(self.root, padding=12)
        page.columnconfigure(0, weight=1)
        page.rowconfigure(0, weight=1)
        look = {"wrap": "word", "relief": "flat", "highlightthickness": 1, "background": PAPER}
        look |= {
            "font": "TkTextFont",
            "foreground": INK,
            "highlightbackground": "#d9d5cb",
            "highlightcolor": ACCENT,
        }
        self.text = self.tk.Text(page, padx=16, pady=12, spacing2=3, state="disabled", **look)
        self.text.tag_configure(
            "user", background=TINT, lmargin1=8, lmargin2=8, spacing1=5, spacing3=5
        )
        self.text.tag_configure("name", foreground=FAINT, spacing1=10)
        self.text.bind("<Button-1>", lambda _: self.text.focus_set())  # else Ctrl+C copies nothing
        bar = self.ttk.Scrollbar(page, command=self.text.yview)
        self.text.configure(yscrollcommand=bar.set)
        self.line = self.tk.Text(page, height=3, padx=10, pady=6, undo=True, **look)
        self.line.bind("<Return>", lambda _: self.send())
        self.line.bind("<Shift-Return>", lambda _: None)  # begins a line, as it does by itself
        self.state = self.ttk.Label(page, style="Faint.TLabel")
        buttons = self.ttk.Frame(page)
        self.go = self.ttk.Button(
            buttons, text="Send (Enter)", style="Go.TButton", command=self.send
        )
        self.halt = self.ttk.Button(
            buttons, text="Stop (Esc)", command=lambda: self.answering.stop()
        )
        self.take = self.ttk.Button(buttons, text="Copy the answer", command=self.copy)
        for button in (self.go, self.halt, self.take):
            button.pack(side="left", padx=(0, 6))
        hint = "Shift+Enter begins a line"
        self.ttk.Label(buttons, text=hint, style="Faint.TLabel").pack(side="right")
        self.text.grid(row=0, column=0, sticky="nsew")
        bar.grid(row=0, column=1, sticky="ns")
        self.line.grid(row=1, column=0, columnspan=2, sticky="ew", pady=8)
        buttons.grid(row=2, column=0, columnspan=2, sticky="ew")
        self.state.grid(row=3, column=0, columnspan=2, sticky="w", pady=(8, 0))
        page.bind("<Configure>", lambda event: self.state.configure(wraplength=event.width - 40))
        return page

    def _set_busy(self, busy: bool) -> None:
        self.busy = busy
        self.choice.configure(state="disabled" if busy else "readonly")
        for each in (self.folder, self.new, self.remove, self.go, self.take):
            each.state(["disabled" if busy else "!disabled"])
        self.halt.state(["!disabled" if busy else "disabled"])

    def _chosen(self) -> None:
        chosen = self.list.curselection()
        if self.busy:
            self._list()
        elif chosen:
            self._open(self.talks[-1 - chosen[0]])

    def _open(self, talk: Talk) -> None:
        self.talk = talk
        self.text.configure(state="normal")
        self.text.delete("1.0", "end")
        for message in talk.messages:
            self._write(message["content"], message["role"])
        self._list()

    def _list(self) -> None:
        """List the chats, the latest first."""
        self.list.delete(0, "end")
        for talk in reversed(self.talks):
            self.list.insert("end", f" {talk.title}")
        self.list.selection_set(len(self.talks) - 1 - self.talks.index(self.talk))

    def _write(self, text: str, who: str) -> None:
        """Write a message below the others."""
        self._add({"user": "You\n", "assistant": "Model\n"}.get(who, f"{who}\n"), "name")
        self._add(f"{text}\n", who)

    def _add(self, text: str, *tags: str) -> None:
        at_end = self.text.yview()[1] == 1.0
        self.text.configure(state="normal")
        self.text.insert("end", text, tags)
        self.text.configure(state="disabled")
        if at_end:
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
            self.used.configure(text=f"Memory: {_gigabytes(used)} of {_gigabytes(_machine())}")
            share = max(0.02, used / _machine())  # a little is seen
            self.filled.place(relheight=1, relwidth=share)
        if self.interrupted:
            self.close()
        else:
            self.root.after(_TICK, self._look)

    def _show(self, kind: str, text: str) -> None:
        if kind == "text":
            if self.asked:
                self._add("Model\n", "name")
                self.asked = ""
                self.state.configure(text="Writing…")
            self._add(text, "assistant")
            return
        self.state.configure(text=text)
        if kind == "state":
            return
        self._set_busy(False)
        if not self.asking:  # a model was loaded, or was not
            first, self.first = self.first, ""
            if first and kind == "ready":
                self.send(first)
            return
        self.asking = False
        if self.asked:  # nothing came: the line goes back to where it was written
            self.line.insert("1.0", self.asked)
            self.asked = ""
            self._open(self.talk)
            self.text.see("end")
        else:
            self._add("\n", "assistant")
            self._list()
            self.history.write(self.talks)


def _name(model: str, models: list[str]) -> str:
    """What a model is called: the last part of its path, where no other ends like that."""
    last = Path(model).name
    return last if [Path(each).name for each in models].count(last) == 1 else model


def _machine() -> int:
    """Bytes of memory that the machine has; 8 GB where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 8_000_000_000


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def packed_models() -> list[str]:
    """Return the artifacts in the folder `models` of a packed program."""
    folder = Path(getattr(sys, "_MEIPASS", "")) / "models"
    return sorted(str(path.parent) for path in folder.glob("*/manifest.json"))


def main() -> None:
    """Read the command line, and chat."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="an artifact")
    parser.add_argument("--terminal", action="store_true", help="no window")
    parser.add_argument("--history", type=Path, default=HISTORY, help="the file of the chats")
    parser.add_argument("--ask", default="", metavar="TEXT", help="send this at once")
    options = parser.parse_args()
    models = options.models or (packed_models() if hasattr(sys, "_MEIPASS") else [])
    if options.terminal and not models:
        parser.error("name a MODEL to chat with")
    try:
        if options.terminal:
            converse(models[0])
        else:
            _show_window(parser, models, options)
    except EdgeMemLLMError as error:
        parser.error(str(error))


def _show_window(
    parser: argparse.ArgumentParser, models: list[str], options: argparse.Namespace
) -> None:
    try:
        import tkinter as tk
    except ModuleNotFoundError:
        parser.error("this Python has no tkinter. Install it, or give --terminal.")
    try:
        window = Window(models, History(options.history), options.ask)
    except tk.TclError as error:
        parser.error(f"there is no window to be had ({error}). Give --terminal.")
    except ValueError as error:
        parser.error(str(error))
    window.run()


if __name__ == "__main__":
    main()
