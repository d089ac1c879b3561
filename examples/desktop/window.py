"""The window: a page to write on, a button that lets the model go on, and what that costs.

Tk from Python's standard library, with colours of its own. Knows the worker only by its events.
"""

from __future__ import annotations

import tkinter as tk
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tkinter import filedialog, ttk

from style import COLOURS, FONTS, apply_style
from worker import Ended, Event, Figures, Loaded, Loading, Worker, Wrote

from edge_memllm.errors import RequestError
from edge_memllm.sampling import Sampling

POLL_MILLISECONDS = 25
STAGES = {"files": "checking files", "graph": "loading the graph", "table": "opening the table"}
TITLE = "edge-memllm"
HINT = "Write the beginning of a text, then let the model go on."


class Window:
    """The program's only window."""

    def __init__(self, worker: Worker, models: list[Path]) -> None:
        self._worker = worker
        self._models = {path.name: path for path in models}
        self._busy = False
        self._figures: Figures | None = None
        self._when_done: Callable[[dict[str, object]], None] | None = None
        self._root = root = tk.Tk()
        root.title(TITLE)
        root.geometry("860x620")
        root.minsize(740, 420)
        apply_style(root)
        root.columnconfigure(0, weight=1)
        root.rowconfigure(1, weight=1)
        self._choice = tk.StringVar()
        self._temperature = tk.DoubleVar(value=0.7)
        self._tokens = tk.IntVar(value=120)
        self._status = tk.StringVar(value=HINT)
        self._build_head().grid(row=0, column=0, sticky="ew")
        self._build_page().grid(row=1, column=0, sticky="nsew", padx=20, pady=(16, 8))
        self._build_controls().grid(row=2, column=0, sticky="ew", padx=20, pady=(4, 10))
        self._build_foot().grid(row=3, column=0, sticky="ew")
        # On the page as well, and there first: it would write a line before the window is asked.
        for place in (self._page, root):
            for key in ("<Control-Return>", "<Control-KP_Enter>"):
                place.bind(key, lambda _: self._pressed())
        root.bind("<Escape>", lambda _: self._worker.stop())
        root.protocol("WM_DELETE_WINDOW", self._close)
        self._show_state()

    def run(self) -> None:
        """Show the window until it is closed."""
        if self._models:
            self._choose(next(iter(self._models)))
        self._poll()
        self._root.mainloop()

    def demonstrate(self, text: str, done: Callable[[dict[str, object]], None]) -> None:
        """Go on with a text as soon as a model is there; call `done` with what is shown then."""
        self._page.insert("1.0", text)
        self._when_done = done

    def _build_head(self) -> tk.Widget:
        head = ttk.Frame(self._root, style="Head.TFrame", padding=(20, 12))
        head.columnconfigure(1, weight=1)
        ttk.Label(head, text=TITLE, style="Title.TLabel").grid(row=0, column=0, padx=(0, 18))
        self._about = ttk.Label(head, style="About.TLabel")
        self._about.grid(row=0, column=1, sticky="w")
        self._menu = ttk.Combobox(head, textvariable=self._choice, state="readonly", width=20)
        self._menu["values"] = list(self._models)
        self._menu.bind("<<ComboboxSelected>>", lambda _: self._choose(self._choice.get()))
        self._menu.grid(row=0, column=2, padx=8)
        self._open = ttk.Button(head, text="Open folder…", command=self._browse)
        self._open.grid(row=0, column=3)
        return head

    def _build_page(self) -> tk.Widget:
        frame = ttk.Frame(self._root, style="Card.TFrame", padding=1)
        frame.columnconfigure(0, weight=1)
        frame.rowconfigure(0, weight=1)
        self._page = page = tk.Text(
            frame, wrap="word", undo=True, relief="flat", borderwidth=0, highlightthickness=0,
            font=FONTS["page"], padx=22, pady=18, spacing2=5, spacing3=8, width=10, height=5,
            background=COLOURS["paper"], foreground=COLOURS["ink"],
            insertbackground=COLOURS["accent"], selectbackground=COLOURS["selection"],
        )  # fmt: skip
        page.tag_configure("written", foreground=COLOURS["accent"])
        bar = ttk.Scrollbar(frame, command=page.yview)
        page.configure(yscrollcommand=bar.set)
        page.grid(row=0, column=0, sticky="nsew")
        bar.grid(row=0, column=1, sticky="ns")
        page.focus_set()
        return frame

    def _build_controls(self) -> tk.Widget:
        row = ttk.Frame(self._root)
        row.columnconfigure(6, weight=1)
        ttk.Label(row, text="Temperature").grid(row=0, column=0)
        ttk.Scale(row, to=1.5, variable=self._temperature, length=130, command=self._round).grid(
            row=0, column=1, padx=8
        )
        self._shown = ttk.Label(row, width=4, text="0.7")
        self._shown.grid(row=0, column=2, padx=(0, 18))
        ttk.Label(row, text="Tokens").grid(row=0, column=3)
        ttk.Spinbox(row, from_=1, to=1000, width=5, textvariable=self._tokens).grid(
            row=0, column=4, padx=8
        )
        self._new = ttk.Button(row, text="New page", command=self._clear)
        self._new.grid(row=0, column=7, padx=8)
        self._button = ttk.Button(row, style="Go.TButton", command=self._pressed, width=16)
        self._button.grid(row=0, column=8)
        return row

    def _build_foot(self) -> tk.Widget:
        foot = ttk.Frame(self._root, style="Foot.TFrame", padding=(20, 8))
        foot.columnconfigure(0, weight=1)
        line = ttk.Label(foot, textvariable=self._status, style="Foot.TLabel")
        line.grid(row=0, column=0, sticky="w")
        foot.bind("<Configure>", lambda event: line.configure(wraplength=event.width - 40))
        self._progress = ttk.Progressbar(foot, length=140, maximum=1.0)
        return foot

    def _poll(self) -> None:
        for event in self._worker.events():
            self._take(event)
        self._root.after(POLL_MILLISECONDS, self._poll)

    def _take(self, event: Event) -> None:
        match event:
            case Loading(stage, share):
                self._status.set(f"{STAGES.get(stage, stage)} …")
                self._progress.grid(row=0, column=1)
                self._progress["value"] = share
            case Loaded(_, description):
                self._about["text"] = description
                self._status.set(HINT)
            case Wrote(text, figures):
                self._page.insert("end", text, "written")
                self._page.see("end")
                self._figures = figures
                self._status.set(figures_line(figures))
            case Ended(problem):
                self._end(problem)

    def _end(self, problem: str) -> None:
        self._busy = False
        self._progress.grid_forget()
        if problem:
            self._status.set(problem)
        self._show_state()
        if self._when_done is not None and (problem or self._figures is not None):
            self._root.update()
            done, self._when_done = self._when_done, None
            figures = None if self._figures is None else asdict(self._figures)
            done({"problem": problem, "text": self._text(), "figures": figures})
        elif self._when_done is not None:
            self._pressed()

    def _choose(self, name: str) -> None:
        self._choice.set(name)
        self._about["text"] = ""
        self._begin()
        self._worker.load(self._models[name])

    def _browse(self) -> None:
        folder = filedialog.askdirectory(title="Open the folder of a model", mustexist=True)
        if folder:
            self._models[Path(folder).name] = Path(folder)
            self._menu["values"] = list(self._models)
            self._choose(Path(folder).name)

    def _pressed(self) -> str:
        """Go on, or stop; "break" keeps the key from writing a line as well."""
        if self._busy:
            self._worker.stop()
        elif self._choice.get():
            self._go_on()
        else:
            self._status.set("There is no model yet. Open the folder of one.")
        return "break"

    def _go_on(self) -> None:
        try:
            sampling = Sampling(temperature=self._temperature.get(), top_p=0.95)
            tokens = self._tokens.get()
        except (RequestError, tk.TclError) as error:
            self._status.set(str(error))
            return
        self._begin()
        self._worker.go_on(self._text(), sampling, tokens)

    def _begin(self) -> None:
        self._busy = True
        self._show_state()

    def _show_state(self) -> None:
        self._button["text"] = "Stop  (Esc)" if self._busy else "Go on  (Ctrl ↵)"
        self._button.state(["pressed" if self._busy else "!pressed"])
        self._menu["state"] = "disabled" if self._busy else "readonly"
        for button in (self._open, self._new):
            button.state(["disabled" if self._busy else "!disabled"])

    def _text(self) -> str:
        return self._page.get("1.0", "end-1c")

    def _round(self, value: str) -> None:
        self._temperature.set(round(float(value), 1))
        self._shown["text"] = f"{self._temperature.get():.1f}"

    def _clear(self) -> None:
        self._page.delete("1.0", "end")
        self._status.set(HINT)

    def _close(self) -> None:
        self._worker.close()
        self._root.destroy()


def figures_line(figures: Figures) -> str:
    """Say in one line what a text costs."""
    parts = [
        f"{figures.tokens} tokens",
        f"{figures.tokens_per_second:.0f} tokens/s",
        f"first after {figures.first_token_seconds * 1000:.0f} ms",
        f"{figures.read_bytes_per_token / 1000:.1f} kB from flash per token",
    ]
    if figures.memory_bytes is not None:
        parts.append(f"{figures.memory_bytes / 1e6:.0f} MB of memory")
    if figures.reused:
        parts.append(f"{figures.reused} tokens kept")
    return "  ·  ".join(parts)
