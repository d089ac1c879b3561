"""Chat messages to one prompt, by the artifact's Jinja template, in a sandbox.

A template comes with the model and is as little trusted as its other files: it is capped in
size, sees only what it is given and may not change it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from edge_memllm.errors import ArtifactError, RequestError

MAX_TEMPLATE_BYTES = 64 * 1024


class ChatTemplate:
    """One compiled template. `special_tokens` are the names it may use, such as bos_token."""

    def __init__(self, source: object, special_tokens: Mapping[str, str]) -> None:
        """Compile; raises `ArtifactError` for what is not one template of at most 64 KiB."""
        if not isinstance(source, str):
            raise ArtifactError(
                f"chat template: a {type(source).__name__}, expected one text. "
                "Keep one template in chat_template.jinja and export again."
            )
        size = len(source.encode("utf-8", "surrogatepass"))
        if size > MAX_TEMPLATE_BYTES:
            raise ArtifactError(
                f"chat template: {size} bytes, expected at most {MAX_TEMPLATE_BYTES}."
            )
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._template = _compile(source)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt for messages such as `{"role": "user", "content": "Hi"}`.

        Raises `RequestError` when the template refuses the messages.
        """
        try:
            return str(
                self._template.render(
                    messages=messages,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                )
            )
        except Exception as error:  # a template is foreign code: it may fail in any way
            raise RequestError(f"The chat template refuses these messages: {error}") from error


def _compile(source: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(source)
    except Exception as error:  # not only syntax: a deep enough one overflows the parser
        raise ArtifactError(f"chat template: not valid Jinja ({error}).") from error


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
