"""Chat messages to one prompt, by the model's Jinja template, as transformers renders it.

A template comes with the model and is as little trusted as its other files: it is capped in size,
sees only what it is given, may not change it, and is bounded in time and memory
(`template_budget`). One that is no template ends chat, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from edge_memllm.errors import ArtifactError, RequestError

if TYPE_CHECKING:
    from edge_memllm.text.template_budget import BoundedEnvironment

MAX_TEMPLATE_BYTES = 64 * 1024
DEFAULT_TEMPLATE, TOOL_TEMPLATE = "default", "tool_use"
# Names a message's reasoning goes by: templates read one or the other.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CONTINUED = "content"
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_MOST_FORMAT = 1024  # characters of a date's format


class ChatTemplate:
    """The template of a model, or its templates by name. Compiled when it is first used."""

    def __init__(
        self, source: object, special_tokens: Mapping[str, str], where: str = "chat template"
    ) -> None:
        """Take one text, or its bytes, or several texts as tokenizer_config.json lists them.

        `special_tokens` are the names a template may use, such as bos_token; `where` is what
        errors begin with. `check` tells whether it can be used.
        """
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._where = where

    @property
    def source(self) -> str | None:
        """The text that chats without tools are rendered by; None when there is none."""
        source = self._named.get(DEFAULT_TEMPLATE)
        return _text(source) if isinstance(source, str | bytes) else None

    @property
    def tool_source(self) -> str | None:
        """The text that chats with tools are rendered by: one of its own, or that of all chats."""
        source = self._named.get(TOOL_TEMPLATE, self._named.get(DEFAULT_TEMPLATE))
        return _text(source) if isinstance(source, str | bytes) else None

    def check(self) -> None:
        """Compile; raises `ArtifactError` for what is not templates of at most 64 KiB each."""
        for name in self._named:
            self._compiled(name)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the prompt for messages such as `{"role": "user", "content": "Hi"}`.

        `continue_final_message` ends it inside the last message, which the model goes on with;
        it wants `add_generation_prompt` False. `tools` and `documents` are JSON objects;
        `variables` is what else the template asks for. Raises `RequestError` when the template
        refuses the messages, takes more than it may, or cannot be used at all.
        """
        if not messages:
            raise RequestError("the chat has no messages, expected one at least.")
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "a final message is either gone on with or answered: give one of "
                "continue_final_message and add_generation_prompt."
            )
        try:
            template, source = self._chosen(with_tools=tools is not None)
        except ArtifactError as error:
            raise RequestError(f"This model cannot chat. {error}") from error
        try:
            chat = [_message(message) for message in messages]
            end = _mark_end(chat[-1], source) if continue_final_message else None
            given = (
                self._special_tokens
                | _today()
                | {
                    **{name: _plain(value) for name, value in variables.items()},
                    "messages": chat,
                    "tools": _plain(tools),
                    "documents": _plain(documents),
                    "add_generation_prompt": add_generation_prompt,
                }
            )
            if "functions" not in given and "functions" in source:  # Firefunction's word for them
                given["functions"] = _to_json(given["tools"], indent=2) if tools else ""
            text = _rendered(template, given)
        except RequestError:
            raise
        except Exception as error:  # a template is foreign code: it may fail in any way
            raise RequestError(f"The chat template refuses these messages: {error}") from error
        return text if end is None else _cut_behind(end, text)

    def _chosen(self, *, with_tools: bool) -> tuple[Any, str]:
        """The template for a chat and its text; a model may have one of its own for tools."""
        names = self._named
        name = TOOL_TEMPLATE if with_tools and TOOL_TEMPLATE in names else DEFAULT_TEMPLATE
        if name not in names:
            raise ArtifactError(
                f"{self._where}: has {', '.join(sorted(names)) or 'none'}, expected one named "
                f"{DEFAULT_TEMPLATE}. Add it and export again."
            )
        return self._compiled(name), _text(names[name])

    @cached_property
    def _named(self) -> dict[str, object]:
        """The texts by their names."""
        source = self._source
        if isinstance(source, list) and source and all(map(_is_named, source)):
            return {each["name"]: each["template"] for each in source}
        return {DEFAULT_TEMPLATE: source}

    @cached_property
    def _templates(self) -> dict[str, Any]:
        return {}

    def _compiled(self, name: str) -> Any:
        if name not in self._templates:
            where = self._where if name == DEFAULT_TEMPLATE else f"{self._where} {name!a:.40}"
            self._templates[name] = _compile(_checked(self._named[name], where), where)
        return self._templates[name]


def _is_named(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("template"), str)
    )


def _text(source: object) -> str:
    return source.decode("utf-8", "replace") if isinstance(source, bytes) else str(source)


def _checked(source: object, where: str) -> str:
    if not isinstance(source, str | bytes):
        raise ArtifactError(
            f"{where}: a {type(source).__name__}, expected one text, or a list of objects with "
            "name and template. Correct it and export again."
        )
    data = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
    if len(data) > MAX_TEMPLATE_BYTES:
        raise ArtifactError(f"{where}: {len(data)} bytes, expected at most {MAX_TEMPLATE_BYTES}.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{where}: not UTF-8 text ({error}).") from error


def _compile(source: str, where: str) -> Any:
    try:
        return _environment().from_string(source)
    except Exception as error:  # not only syntax: a deep enough one overflows the parser
        raise ArtifactError(f"{where}: not valid Jinja ({error}).") from error


def _rendered(template: Any, given: Mapping[str, Any]) -> str:
    from edge_memllm.text.template_budget import spending

    with spending(given):
        return str(template.render(given))


@cache
def _environment() -> BoundedEnvironment:
    """What templates are compiled in: Jinja as transformers sets it up."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.utils import Namespace

    from edge_memllm.text.template_budget import BoundedEnvironment, TemplateLimitError

    class Generation(Extension):
        """`{% generation %}`: marks what the model said, for training; here it is only text."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own way

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_said")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _said(self, caller: Any) -> Any:
            return caller()

    class ChatNamespace(Namespace):
        """A namespace without names for the interpreter's own, and without a text."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            for name in (values := dict(*rest, **kwargs)):
                _check_name(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

        def __repr__(self) -> str:
            # It is the one thing that changes after it was weighed.
            raise TemplateLimitError("a namespace has no text.")

    class Dictionary:
        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args, **kwargs)

    environment = BoundedEnvironment(
        {"tojson": _to_json},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
    )
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _now,
        "namespace": ChatNamespace,
        "dict": Dictionary(),
    }
    return environment


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        from jinja2.exceptions import SecurityError

        raise SecurityError(f"a namespace has no attribute {name!a:.80}.")


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    if len(form) > _MOST_FORMAT:
        _refuse(f"a date's format has {len(form)} characters.")
    return datetime.now().strftime(form)


def _today() -> dict[str, str]:
    """Return the date under the names that templates ask for it by, as llama.cpp gives it.

    Those of Llama 3 have a day of 2024 where they are told none.
    """
    now = datetime.now()
    return {"date_string": now.strftime("%d %b %Y"), "datetime": now.strftime("%b %d %Y")}


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes what means something in HTML.

    What `map` gives is written as a list, as llama.cpp writes it.
    """
    if isinstance(x, Iterator):
        x = list(x)
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _message(message: Mapping[str, Any]) -> dict[Any, Any]:
    """A message as templates want it: nothing that is null, reasoning under both of its names."""
    if not isinstance(message, Mapping):
        raise RequestError(f"a message is a {type(message).__name__}, expected an object.")
    found: dict[Any, Any] = _plain(
        {name: value for name, value in message.items() if value is not None}
    )
    reasoning = next((found[name] for name in _REASONING if found.get(name) is not None), None)
    if reasoning is not None:
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found


def _plain(value: Any) -> Any:
    """A copy of what a template may see, of JSON's types; anything else is only named."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(name): _plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, list):
        return list(map(_plain, value))
    return f"<{type(value).__name__}>"


def _mark_end(message: dict[Any, Any], source: str) -> str:
    """Put a mark behind the text of a message, where the prompt will end; return the text."""
    content = message.get(_CONTINUED)
    if _CONTINUED not in source or content is None:
        raise RequestError("the final message has no content to go on with.")
    if isinstance(content, str):
        message[_CONTINUED] = content + _MARK
        return content
    parts = content if isinstance(content, list) else []
    part = next((each for each in reversed(parts) if "text" in each), None)
    if part is None:
        raise RequestError("the final message has no text to go on with.")
    end: str = part["text"]
    part["text"] = end + _MARK
    return end


def _cut_behind(end: str, text: str) -> str:
    """Cut a prompt where the mark is, behind the end of the final message."""
    place = text.rfind(_MARK.strip())
    if place < 0 or end.strip() not in text:
        raise RequestError(
            "The chat template leaves out the final message, so it cannot be gone on with."
        )
    if text.startswith(_MARK, place):
        return text[:place]
    return text[:place].rstrip()  # the template has stripped what the mark stood behind
