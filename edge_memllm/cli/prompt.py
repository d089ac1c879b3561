"""The interactive prompt of ``edge-memllm run``: a conversation, or one completion after another.

Ctrl-C stops the answer and not the program. Also what one answer and the prompt share: how tokens
are chosen, what has come, and what it cost.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

from edge_memllm.cli.output import byte_count, styled
from edge_memllm.engine.request import Request, check_speculate
from edge_memllm.engine.response_format import ResponseFormat
from edge_memllm.errors import RequestError
from edge_memllm.options import Option
from edge_memllm.process.interrupts import go_on
from edge_memllm.sampling import Sampling, check_seed
from edge_memllm.text.tokenization import check_stops

if TYPE_CHECKING:
    from edge_memllm.model import Model, Piece
    from edge_memllm.statistics import GenerationStatistics


Message = dict[str, str]

PROMPT = ">>> "
MORE = "... "
LINES = '"""'
HELP = """\
Type a line and press Enter. Three quotation marks begin several lines, and end
them; a line that ends with a backslash goes on in the next one.
Ctrl-C stops an answer; Ctrl-D, or Ctrl-C twice here, leaves.
  /set                 show the settings
  /set NAME VALUE      change one, for example: /set temperature 0.7
  /overlays            show which overlays are loaded, and which are on
  /overlays NAME ...   use these, in this order; all and none are names, too
  /stats               statistics of the last answer
  /reset               forget the conversation
  /help                this text
  /quit                leave"""

_SAMPLING_TYPES = {"top_k": int}
_SAMPLING_NAMES = tuple(field.name for field in fields(Sampling))
NAMES = (*_SAMPLING_NAMES, "max_new_tokens", "stop", "seed", "speculate")


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
    """What the system tells: all of it on Linux, elsewhere the most there was."""
    parts = [
        (statistics.rss_anon_bytes, "{} of its own"),
        (statistics.swap_bytes or None, "{} swapped out"),
        (statistics.rss_file_bytes, "{} of mapped files"),
        (statistics.peak_rss_bytes, "{} at most"),
    ]
    told = [words.format(byte_count(size)) for size, words in parts if size is not None]
    return f"memory {' + '.join(told)}" if told else "memory not known on this system"


class Conversation:
    """Reads lines and answers them until the user leaves.

    With a chat template the conversation is kept and read again as a whole for each answer;
    without one, or with ``raw``, every line is continued on its own.
    """

    def __init__(
        self,
        model: Model,
        settings: Request,
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
                line = self._read_message()
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
            if line.startswith("/") and "\n" not in line:
                if line in ("/quit", "/exit"):
                    return
                self._command(line)
            elif line:
                self._answer(line)

    def _read_message(self) -> str:
        """Read a line, or the lines between three quotation marks."""
        line = self._read_line(PROMPT).strip()
        if line.startswith(LINES):
            return self._read_until_marks(line.removeprefix(LINES))
        while line.endswith("\\"):
            line = f"{line[:-1]}\n{self._read_line(MORE).rstrip()}"
        return line

    def _read_until_marks(self, line: str) -> str:
        lines = []
        while LINES not in line:
            lines.append(line)
            line = self._read_line(MORE)
        return "\n".join([*lines, line.partition(LINES)[0]]).strip()

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
            with closing(self.model.pieces(replace(self.settings, prompt=prompt))) as pieces:
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
        if (cut := cut_note(self.settings, answer)) is not None:
            _note(cut)
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
                _note("\n".join(setting_lines(self.settings)))
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
            self.settings = changed(self.settings, name, value)
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
    print(styled(text, "aside", sys.stderr), end=end, file=sys.stderr, flush=True)


def _enable_history() -> None:
    """Arrow keys at the prompt, where Python was built with readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


@dataclass(frozen=True, kw_only=True)
class FormOptions:
    """The form that a text is held to."""

    json_object: Annotated[bool, Option("any one JSON object", one_of="form")] = False
    json_schema: Annotated[
        str | None,
        Option("JSON that this file's schema accepts", "FILE", reads_text=True, one_of="form"),
    ] = None
    regex: Annotated[
        str | None, Option("what a regular expression matches", "TEXT", parse=str, one_of="form")
    ] = None
    grammar: Annotated[
        str | None,
        Option("what this file's grammar in Lark or GBNF allows", reads_text=True, one_of="form"),
    ] = None

    @property
    def response_format(self) -> ResponseFormat | None:
        """The form as a request has it. Raises `RequestError` for a schema that is no JSON."""
        if self.json_object:
            return ResponseFormat("json_object")
        if self.json_schema is not None:
            return ResponseFormat("json_schema", _schema_text(self.json_schema))
        if self.regex is not None:
            return ResponseFormat("regex", self.regex)
        return None if self.grammar is None else ResponseFormat("grammar", self.grammar)


def _schema_text(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"--json-schema: the file is no JSON ({error}). Correct it.") from None
    if not isinstance(schema, dict):
        raise RequestError(
            f"--json-schema: the file holds a {type(schema).__name__}, expected an object."
        )
    return text


def cut_note(request: Request, answer: Answer) -> str | None:
    """What to say of a text whose form is not complete, None if it is."""
    form = ResponseFormat.of(request.response_format)
    if form is None or answer.finish_reason != "length":
        return None
    what = "JSON" if form.is_json else "text"
    return (
        f"[the {what} is cut off after {request.max_new_tokens} tokens, so it is not complete; "
        "--max-new-tokens gives it more]"
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen; what is None comes from the artifact."""

    temperature: Annotated[
        float | None, Option("0 takes the likeliest token", one_of="temperature")
    ] = None
    greedy: Annotated[bool, Option("the same as --temperature 0", one_of="temperature")] = False
    top_k: Annotated[int | None, Option("only the N likeliest; 0 is off")] = None
    top_p: Annotated[float | None, Option("only the likeliest that together reach X; 1 is off")] = (
        None
    )
    min_p: Annotated[
        float | None, Option("only those with X times the likeliest one's probability; 0 is off")
    ] = None
    repetition_penalty: Annotated[float | None, Option("above 1 avoids repeats; 1 is off")] = None

    def on(self, default: Sampling) -> Sampling:
        """Return `default` with what was given. Raises `RequestError` as `Sampling` does."""
        named = {name: getattr(self, name) for name in _SAMPLING_NAMES}
        given = {name: value for name, value in named.items() if value is not None}
        return replace(default, **given | ({"temperature": 0.0} if self.greedy else {}))


def changed(request: Request, name: str, text: str) -> Request:
    """Return a copy with one value set from text, as ``/set NAME VALUE`` does.

    ``off`` clears the stop string and lets the seed be drawn. Raises `RequestError`.
    """
    name = name.replace("-", "_")
    if name == "stop":
        return replace(request, stop=() if text == "off" else check_stops(text))
    if name == "seed":
        seed = None if text == "off" else check_seed(_parsed(int, name, text))
        return replace(request, seed=seed)
    if name == "speculate":
        return replace(request, speculate=check_speculate(_parsed(int, name, text)))
    if name == "max_new_tokens":
        count = int(_parsed(int, name, text))
        if count < 1:
            raise RequestError(f"max_new_tokens is {count}, expected 1 or more.")
        return replace(request, max_new_tokens=count)
    if name in _SAMPLING_NAMES:
        value: Any = _parsed(_SAMPLING_TYPES.get(name, float), name, text)
        sampling = request.sampling or Sampling()
        return replace(request, sampling=replace(sampling, **{name: value}))
    raise RequestError(f"There is no setting '{name}'. There are: {', '.join(NAMES)}.")


def setting_lines(request: Request) -> list[str]:
    """One line per setting, in the words that ``/set`` takes."""
    values = {
        **asdict(request.sampling or Sampling()),
        "max_new_tokens": request.max_new_tokens,
        "stop": ", ".join(map(repr, request.stop)) or "off",
        "seed": "off" if request.seed is None else request.seed,
        "speculate": request.speculate,
    }
    return [f"{name} {value}" for name, value in values.items()]


def _parsed(kind: type[int] | type[float], name: str, text: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name} is {text!r}, expected {wanted}.") from None
