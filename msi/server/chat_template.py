"""A model's chat template: messages to the prompt's text, in Jinja, as transformers renders it.

Templates come with checkpoints, so they run in Jinja's sandbox.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from msi.errors import ConfigError, InvalidRequest

OWN_VALUES = ("messages", "add_generation_prompt")


class ChatTemplate:
    """One compiled template.

    Args:
        special_tokens: texts that it may name, such as bos_token.

    Raises:
        ConfigError: it is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is not valid Jinja: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, values: Mapping[str, Any]
    ) -> str:
        """The prompt's text. Raises InvalidRequest: the template refuses these messages, or fails on them."""
        for name in OWN_VALUES:
            if name in values:
                raise InvalidRequest(f"chat_template_kwargs has {name!r}, which is a field of its own")
        given = {**self._special_tokens, **values, "tools": None, "documents": None}
        try:
            return self._template.render(given, messages=list(messages), add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program, and fails in every way that programs do
            raise InvalidRequest(f"the chat template cannot render these messages: {error}") from error


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks what the model said; here, its content and nothing more."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
