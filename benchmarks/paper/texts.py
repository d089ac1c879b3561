"""Texts for one budget: fewer to learn from, and more novels kept out of them.

Of the corpora in DATA the novels that are held out are two. Here one of four of the others is held
out as well, whole, so that what is said of novels rests on two dozen of them and not on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.paper.judging import TEXTS, titled_documents

_HELD_OUT = 4  # of so many novels one
_ARTICLES = 4  # of so many articles one is learned from
# Characters: of a novel that is learned from, and of one that judges.
LEARNED, JUDGED = 190_000, 40_000


def write_texts(data: Path, out: Path) -> Iterator[str]:
    """Write the two corpora under ``out`` as trainings and judges read them; a line for each.

    Articles keep their two sides. A novel is begun at its title and cut after so many characters.
    """
    articles, novels = data / TEXTS["Wikipedia"], data / TEXTS["novels"]
    learned = titled_documents(articles.with_name("train.txt"))[::_ARTICLES]
    yield _write(out / TEXTS["Wikipedia"], "train.txt", learned)
    yield _write(out / TEXTS["Wikipedia"], "valid.txt", titled_documents(articles))
    all_novels = titled_documents(novels.with_name("train.txt"))
    kept_out = all_novels[_HELD_OUT - 1 :: _HELD_OUT] + titled_documents(novels)
    learned = [text for n, text in enumerate(all_novels) if n % _HELD_OUT != _HELD_OUT - 1]
    yield _write(out / TEXTS["novels"], "train.txt", [text[:LEARNED] for text in learned])
    yield _write(out / TEXTS["novels"], "valid.txt", [text[:JUDGED] for text in kept_out])


def _write(path: Path, name: str, documents: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(each if each.endswith("\n") else f"{each}\n" for each in documents)
    path.with_name(name).write_text(text, "utf-8")
    return f"{path.parent.name}/{name}: {len(documents)} documents, {len(text):,} characters"
