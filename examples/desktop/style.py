"""Colours and fonts of the window."""

from __future__ import annotations

import tkinter as tk
from tkinter import font, ttk

COLOURS = {
    "ground": "#f3f1ec",
    "paper": "#fffefb",
    "line": "#d9d5cb",
    "ink": "#23272e",
    "faint": "#6b6f76",
    "accent": "#0f6b5c",
    "accent dark": "#0a4f44",
    "selection": "#cfe6e0",
    "head": "#23312f",
    "head text": "#f6f4ee",
    "head faint": "#a9bcb7",
}
FONTS = {"page": ("DejaVu Serif", 13), "title": ("DejaVu Sans", 14, "bold")}


def apply_style(root: tk.Tk) -> None:
    """Give every widget of the window its looks."""
    for name in ("TkDefaultFont", "TkTextFont", "TkMenuFont"):
        font.nametofont(name).configure(family="DejaVu Sans", size=10)
    root.configure(background=COLOURS["ground"])
    style = ttk.Style(root)
    style.theme_use("clam")
    ground, ink, line = COLOURS["ground"], COLOURS["ink"], COLOURS["line"]
    style.configure(
        ".", background=ground, foreground=ink, bordercolor=line, lightcolor=ground,
        darkcolor=ground, troughcolor=line, focuscolor=COLOURS["accent"],
    )  # fmt: skip
    style.configure("Head.TFrame", background=COLOURS["head"])
    for name, colour in (("Title.TLabel", "head text"), ("About.TLabel", "head faint")):
        style.configure(name, background=COLOURS["head"], foreground=COLOURS[colour])
    style.configure("Title.TLabel", font=FONTS["title"])
    style.configure("Card.TFrame", background=line)
    style.configure("Foot.TFrame", background=line)
    style.configure("Foot.TLabel", background=line, foreground=COLOURS["faint"])
    style.configure("TButton", padding=(12, 6), background=COLOURS["paper"])
    style.map("TButton", background=[("active", COLOURS["selection"])])
    accent = COLOURS["accent"]
    style.configure("TScale", background=accent, lightcolor=accent, darkcolor=accent)
    style.configure("TCombobox", fieldbackground=COLOURS["paper"], padding=4)
    style.map("TCombobox", fieldbackground=[("readonly", COLOURS["paper"])])
    style.configure("TSpinbox", fieldbackground=COLOURS["paper"], padding=4)
    style.configure(
        "Horizontal.TProgressbar", background=COLOURS["accent"], troughcolor=COLOURS["ground"]
    )
    style.configure("Go.TButton", background=COLOURS["accent"], foreground=COLOURS["paper"])
    style.map(
        "Go.TButton",
        background=[("pressed", COLOURS["ink"]), ("active", COLOURS["accent dark"])],
        foreground=[("pressed", COLOURS["paper"])],
    )
