"""``edge-memllm completion``: what a shell needs to complete commands, options and choices."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from edge_memllm.cli.options import Command
from edge_memllm.options import Option

SHELLS = ("bash", "zsh", "fish")
_DESCRIPTION = """\
Print a script that completes commands, options and their choices in a shell. It speaks of this
version. In ~/.bashrc or ~/.zshrc, with the shell's name:

  source <(edge-memllm completion bash)

For fish it goes into ~/.config/fish/completions/edge-memllm.fish, and is
renewed after an upgrade."""
_EXAMPLES = """\
  edge-memllm completion bash
  edge-memllm completion fish > edge-memllm.fish"""


@dataclass(frozen=True)
class CompletionOptions:
    """What may be asked of ``edge-memllm completion``."""

    shell: Annotated[str, Option("the shell that is to complete", choices=SHELLS)]


@dataclass
class _Level:
    """What may stand behind some commands."""

    commands: dict[str, str] = field(default_factory=dict)  # with what they are for
    options: dict[str, str] = field(default_factory=dict)
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by option
    places: tuple[str, ...] = ()  # choices of what has no name


def execute(options: CompletionOptions) -> int:
    """Run the command."""
    from edge_memllm.cli.main import build_parser

    levels = dict(_levels(build_parser(), ()))
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell](levels), end="")
    return 0


Levels = dict[tuple[str, ...], _Level]


def _levels(
    parser: argparse.ArgumentParser, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], _Level]]:
    level = _Level()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {each.dest: each.help or "" for each in action._choices_actions}
            for name, below in action.choices.items():
                level.commands[name] = helps.get(name, "")
                yield from _levels(below, (*path, name))
            continue
        choices = tuple(map(str, action.choices or ()))
        names = [name for name in action.option_strings if name.startswith("--")]
        if not action.option_strings:
            level.places += choices
        for name in names:
            level.options[name] = (action.help or "").partition(" (")[0]
            if choices:
                level.choices[name] = choices
    yield path, level


def _walk(levels: Levels, indent: str) -> str:
    """Return the cases that go from the words so far to the commands that they are."""
    lines = [
        f'{indent}"{" ".join(path)}:{name}") place="{" ".join((*path, name))}" ;;'
        for path, level in levels.items()
        for name in level.commands
    ]
    return "\n".join(lines)


def _cases(levels: Levels, indent: str) -> str:
    """Return the cases that say which words may come, by the commands and the word before."""
    lines = []
    for path, level in levels.items():
        place = " ".join(path)
        lines += [
            f'{indent}"{place}:{name}") list="{" ".join(choices)}" closed=1 ;;'
            for name, choices in level.choices.items()
        ]
        words = " ".join((*level.commands, *level.places, *level.options))
        closed = " closed=1" if level.commands or level.places else ""  # no file may stand there
        lines.append(f'{indent}"{place}:"*) list="{words}"{closed} ;;')
    return "\n".join(lines)


def _bash(levels: Levels) -> str:
    return f"""\
_edge_memllm() {{
    local word list="" place="" closed="" current="${{COMP_WORDS[COMP_CWORD]}}"
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$place:$word" in
{_walk(levels, " " * 12)}
        esac
    done
    case "$place:${{COMP_WORDS[COMP_CWORD-1]}}" in
{_cases(levels, " " * 8)}
    esac
    COMPREPLY=($(compgen -W "$list" -- "$current"))
}}
complete -o default -F _edge_memllm edge-memllm
"""


def _zsh(levels: Levels) -> str:
    return f"""\
#compdef edge-memllm
_edge_memllm() {{
    local word list="" place="" closed=""
    for word in "${{words[@]:1:$((CURRENT - 2))}}"; do
        case "$place:$word" in
{_walk(levels, " " * 12)}
        esac
    done
    case "$place:${{words[CURRENT-1]}}" in
{_cases(levels, " " * 8)}
    esac
    compadd -- ${{=list}}
    [[ -n "$closed" || "${{words[CURRENT]}}" == -* ]] || _files
}}
compdef _edge_memllm edge-memllm
"""


def _fish(levels: Levels) -> str:
    lines = []
    for path, level in levels.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in path)
        when = f"-n {_quoted(seen)} " if path else ""
        first = f"-n {_quoted('; and '.join(filter(None, [seen, _none_of(level)])))} "
        for name, summary in level.commands.items():
            lines.append(f"{first}-f -a {name} -d {_quoted(summary)}")
        if level.places:
            lines.append(f"{when}-f -a {_quoted(' '.join(level.places))}")
        for name, summary in level.options.items():
            choices = level.choices.get(name)
            chosen = f" -x -a {_quoted(' '.join(choices))}" if choices else ""
            lines.append(f"{when}-l {name[2:]}{chosen} -d {_quoted(summary)}")
    return "".join(f"complete -c edge-memllm {line}\n" for line in lines)


def _none_of(level: _Level) -> str:
    return f"not __fish_seen_subcommand_from {' '.join(level.commands)}" if level.commands else ""


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


COMPLETION = Command(CompletionOptions, execute, _DESCRIPTION, _EXAMPLES)
