"""Option classes on the command line: a parser of their fields, and the object that comes of it.

Also the options that several commands share, each worded once. Knows argparse and nothing of what
a command does.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from edge_memllm.cli.output import read_text
from edge_memllm.errors import RequestError
from edge_memllm.options import (
    Group,
    Option,
    byte_size,
    closed_choices,
    layer_list,
    positive_int,
    positive_number,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from edge_memllm.evaluation.perplexity import Windows

Asked = TypeVar("Asked", bound="DataclassInstance")
_HELP_WIDTH = 80
_METAVARS: dict[Any, str] = {
    int: "N",
    positive_int: "N",
    float: "X",
    positive_number: "X",
    byte_size: "SIZE",
    Path: "FILE",
    layer_list: "LIST",
}

Json = Annotated[bool, Option("print one JSON object on stdout and nothing else there")]


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Texts, and the windows they are judged in."""

    text: Annotated[
        tuple[Path, ...], Option("UTF-8 text files", parse=Path, metavar="FILE", several="words")
    ] = ()
    context: Annotated[
        int | None,
        Option(
            "tokens in a window",
            parse=positive_int,
            unset="the model's whole context",
            needs=("--text",),
        ),
    ] = None
    stride: Annotated[
        int | None,
        Option(
            "tokens from window to window",
            parse=positive_int,
            unset="half of it",
            needs=("--text",),
        ),
    ] = None

    @property
    def windows(self) -> Windows:
        """The windows alone, as what measures in them takes them."""
        return {"context": self.context, "stride": self.stride}


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Items that are scored, as `read_tasks` takes them."""

    task: Annotated[
        tuple[Path, ...],
        Option(
            "JSON-lines files, or folders of .jsonl files, whose mean is shown as well",
            parse=Path,
            metavar="FILE",
            several="words",
        ),
    ] = ()
    limit: Annotated[
        int | None,
        Option("only the first N items of each file", parse=positive_int, needs=("--task",)),
    ] = None


def begins_anew(_: object) -> str:
    """Say what Ctrl-C leaves of a command that keeps nothing before its end."""
    return "Stopped before its end. The same command begins anew."


@dataclass(frozen=True)
class Command(Generic[Asked]):
    """What may be asked of a command, what it does then, and what its help says."""

    options: type[Asked]
    execute: Callable[[Asked], int]
    description: str
    examples: str
    interrupted: Callable[[Asked], str] = begins_anew  # by Ctrl-C, and how to go on

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Make a parser that of this command; `execute` of what it parses does the work."""
        parser.description, parser.epilog = self.description, f"examples:\n{self.examples}"
        add_options(parser, self.options)
        parser.set_defaults(execute=self.run)

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work, and return the exit code."""
        asked = self.asked(arguments)
        try:
            return self.execute(asked)
        except KeyboardInterrupt as error:
            error.add_note(self.interrupted(asked))
            raise

    def asked(self, arguments: argparse.Namespace) -> Asked:
        """Return what was asked. Raises as `options_of` does."""
        return options_of(self.options, arguments)


@dataclass(frozen=True)
class Commands:
    """A command that only has others below it: by name, a line that says what for, and which."""

    below: Mapping[str, tuple[str, Command[Any]]]
    description: str
    examples: str

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Make a parser that of these commands."""
        parser.description, parser.epilog = self.description, f"examples:\n{self.examples}"
        below = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
        for name, (summary, command) in self.below.items():
            command.add_to(add_parser(below, name, summary))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of one width everywhere, so that the generated document does not vary."""

    def __init__(self, prog: str, **options: Any) -> None:
        options["width"] = _HELP_WIDTH
        super().__init__(prog, max_help_position=28, **options)

    def _format_usage(self, *given: Any) -> str:
        """Write the usage; argparse breaks no group of which one may be given."""
        lines = super()._format_usage(*given).split("\n")
        return "\n".join(each for line in lines for each in _usage_lines(line))

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Wrap without breaking the names of options at their dashes."""
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fill paragraphs; lines that are indented are commands, or stay as they are."""
        lines: list[str] = []
        paragraph: list[str] = []
        for line in [*text.replace(" \\\n     ", "").splitlines(), ""]:
            if line and not line.startswith(" "):
                paragraph.append(line)
                continue
            lines += self._split_lines(" ".join(paragraph), width)
            lines += _shell_lines(line, width)
            paragraph = []
        return "\n".join(lines).rstrip()


def _usage_lines(line: str) -> list[str]:
    """Break a line of a usage that is too long between the choices of its last group."""
    place = line.rfind(" | ", 0, _HELP_WIDTH - 2)
    if len(line) <= _HELP_WIDTH or place < 0:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 1)
    return [line[: place + 2], *_usage_lines(indent + line[place + 3 :])]


def _shell_lines(command: str, width: int) -> list[str]:
    """A command on lines that a shell takes for one, broken before options."""
    if len(command) <= width or (place := command.rfind(" --", 0, width - 2)) < 0:
        return [command]
    return [f"{command[:place]} \\", *_shell_lines(f"     {command[place:]}", width)]


def add_parser(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """Add the empty parser of one command to those that argparse calls subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, formatter_class=HelpFormatter, allow_abbrev=False
    )
    return parser


def add_options(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """Add the options of a class.

    Without defaults: what is left out is None, and the class says what it is.
    """
    places: dict[tuple[str | None, str | None], Any] = {(None, None): parser}
    for each in argument_fields(options):
        title, one_of = each.title, each.option.one_of
        if (title, None) not in places:
            places[title, None] = parser.add_argument_group(title)
        if title is not None and each.group.description is not None:
            places[title, None].description = each.group.description
        if (title, one_of) not in places:
            places[title, one_of] = places[title, None].add_mutually_exclusive_group()
        if one_of is not None and each.option.required:
            places[title, one_of].required = True
        places[title, one_of].add_argument(*each.names, **each.arguments())


def options_of(
    options: type[Asked], arguments: argparse.Namespace, left_out: Asked | None = None
) -> Asked:
    """Return the object that parsed arguments stand for; files whose text is wanted are read.

    What was left out is as in `left_out`, or has its default. Raises `RequestError` for an option
    that would have no effect, or a file that is no text, and `OSError` for one that cannot be read.
    """
    for each in argument_fields(options):
        _check_needs(each.names[0], each.option.needs, arguments)
    return _made(options, arguments, {}, left_out)


def _made(
    options: type[Asked],
    arguments: argparse.Namespace,
    fixed: Mapping[str, Any],
    left_out: Asked | None,
) -> Asked:
    values = dict(fixed)
    for field, kind, note in _annotated(options):
        if field.name in fixed:
            continue
        if isinstance(note, Group):
            within = getattr(left_out, field.name, None)
            values[field.name] = _made(kind, arguments, note.without, within)
            continue
        found = _given(_name(field, note), arguments)
        if found is not None:
            value = read_text(found) if note.reads_text else found
            values[field.name] = note.collect(value) if note.several else value
    return options(**values) if left_out is None else replace(left_out, **values)


def _check_needs(name: str, needs: tuple[str, ...], arguments: argparse.Namespace) -> None:
    given = any(_given(each, arguments) for each in needs)
    if needs and not given and _given(name, arguments) is not None:
        raise RequestError(
            f"{name} has no effect without {' or '.join(needs)}. Give {needs[0]}, or leave it out."
        )


def _given(name: str, arguments: argparse.Namespace) -> Any:
    """What was given for an option, None if it was left out."""
    return getattr(arguments, name.removeprefix("--").replace("-", "_"), None)


@dataclass(frozen=True)
class ArgumentField:
    """A field of an option class as argparse is to have it."""

    field: Field[Any]
    kind: Any  # of a value that is there
    choices: tuple[str, ...] | None
    option: Option
    group: Group

    @property
    def title(self) -> str | None:
        """The heading it stands under; arguments have one of argparse's own."""
        return None if _by_place(self.field, self.option) else self.option.group or self.group.title

    @property
    def names(self) -> tuple[str, ...]:
        """What it is called on the command line."""
        return (_name(self.field, self.option), *self.option.also)

    def arguments(self) -> dict[str, Any]:
        """The keywords of argparse's `add_argument`."""
        option, default = self.option, self.field.default
        found: dict[str, Any] = {"help": self._help()}
        if self.kind is bool:
            return found | {"action": "store_false" if default else "store_true", "default": None}
        found |= {"type": self._parse, "choices": self.choices, "metavar": self._metavar()}
        if _by_place(self.field, self.option):
            several = option.several == "words"
            if default is MISSING:
                return found | ({"nargs": "+"} if several else {})
            return found | {"nargs": "*" if several else "?"}
        match option.several:
            case "repeated":
                found["action"] = "append"
            case "words":
                found |= {"action": "extend", "nargs": "+"}
            case "list":
                found["action"] = "extend"
            case int(count):
                found["nargs"] = count
        return found | {"required": default is MISSING}

    @property
    def _parse(self) -> Any:
        return Path if self.option.reads_text else self.option.parse or self.kind

    def _metavar(self) -> str | tuple[str, ...] | None:
        option = self.option
        if option.metavar or self.choices:
            return option.metavar
        by_place = _by_place(self.field, option)
        return self.field.name.upper() if by_place else _METAVARS[self._parse]

    def _help(self) -> str:
        text = self.option.help
        default = _shown(self.field.default, self.option)
        if "%(default)s" in text:
            return text.replace("%(default)s", default)
        unset = self.group.unset.get(self.field.name, self.option.unset)
        shown = default if unset is None else unset
        return f"{text} (default: {shown})" if shown else text


def argument_fields(options: type[Any], group: Group | None = None) -> Iterator[ArgumentField]:
    """Yield what the command line has of an option class, and of those that are fields of it."""
    group = group or Group()
    for field, kind, note in _annotated(options):
        if field.name in group.without:
            continue
        if isinstance(note, Group):
            yield from argument_fields(kind, note)
        else:
            choices = note.choices or closed_choices(kind) or None
            yield ArgumentField(field, _of_value(kind), choices, note, group)


def _annotated(options: type[Any]) -> Iterator[tuple[Field[Any], Any, Option | Group]]:
    """Yield each field with a note for the command line, its type, and that note."""
    hints = get_type_hints(options, include_extras=True)
    for field in fields(options):
        if get_origin(hints[field.name]) is Annotated:
            kind, *notes = get_args(hints[field.name])
            yield from ((field, kind, note) for note in notes if isinstance(note, Option | Group))


def _of_value(kind: Any) -> Any:
    """The type of a value that is there: ``int`` for ``int | None``."""
    while get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    return type(get_args(kind)[0]) if get_origin(kind) is Literal else kind


def _by_place(field: Field[Any], option: Option) -> bool:
    return not field.kw_only and option.flag is None


def _name(field: Field[Any], option: Option) -> str:
    if _by_place(field, option):
        return field.name
    return option.flag or f"--{field.name.replace('_', '-')}"


def _shown(default: Any, option: Option) -> str:
    """A default as the help has it; nothing where it goes without saying."""
    if default is MISSING or default in (None, (), "") or isinstance(default, bool):
        return ""
    if isinstance(default, tuple):
        return ", ".join(_shown(each, option) for each in default)
    if option.parse is byte_size:
        return _size(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _size(count: int) -> str:
    """Bytes in the largest unit they are whole in, as `byte_size` reads them."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count and count % (1 << shift) == 0:
            return f"{count >> shift}{unit}"
    return str(count)
