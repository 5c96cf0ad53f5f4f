"""A model's chat template: messages to the prompt's text, in Jinja, as transformers renders it.

Templates come with checkpoints, so they run in Jinja's sandbox. Where a template fails on a form of the messages that
other templates want, the other forms are tried.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from msi.errors import ConfigError, InvalidRequest

OWN_VALUES = ("messages", "add_generation_prompt", "tools", "documents")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates and clients have for it
END_OF_TEXT = "CONTINUE_FINAL_MESSAGE_TAG "  # marks where the last message ends; the space shows whether it is trimmed
MAX_COMPLAINT_CHARS = 200

Messages = Sequence[Mapping[str, Any]]


class ChatTemplates:
    """A model's templates by name. Compiled once; rendering keeps no state.

    Args:
        sources: Jinja; "default" is for chats, "tool_use" for those with tools.
        special_tokens: texts that they may name, such as bos_token.

    Raises:
        ConfigError: one is not valid Jinja, or there are several and no default.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        if sources and "default" not in sources:
            raise ConfigError(
                f"the model has chat templates named {', '.join(sorted(sources))}, and none named default; choose one "
                "with `chat_template` FILE"
            )
        self._templates = {name: ChatTemplate(source, special_tokens) for name, source in sources.items()}

    def __bool__(self) -> bool:
        return bool(self._templates)

    def choose(self, has_tools: bool) -> ChatTemplate:
        """The template of a chat; there is one."""
        return (self._templates.get("tool_use") if has_tools else None) or self._templates["default"]


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
            self._takes_parts, self._tests_strings = _reads(environment.parse(source))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError(f"the chat template is not valid Jinja: {_short(error)}") from error

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool,
        values: Mapping[str, Any],
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt's text.

        Args:
            messages: content is a text, a tuple of text parts, or absent.
            values: more that the template may read.
            continue_final_message: the prompt ends with the last message, for the model to go on with.

        Raises:
            InvalidRequest: the template refuses these messages, or fails on them.
        """
        for name in OWN_VALUES:
            if name in values:
                raise InvalidRequest(
                    f"chat_template_kwargs has {name!r}, which is a field of its own", param="chat_template_kwargs"
                )
        if continue_final_message and "content" not in messages[-1]:
            raise InvalidRequest("the last message has no content to go on with", param="continue_final_message")
        given = {
            **self._special_tokens, **values, "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip
        first_error: Exception | None = None
        for form in self._forms(messages):
            try:
                if continue_final_message:
                    return self._continued(form, given)
                return self._template.render(given, messages=form)
            except Exception as error:  # a template is a program, and fails in every way that programs do
                first_error = first_error or error
        raise InvalidRequest(
            f"the chat template cannot render these messages: {_short(first_error)}", param="messages"
        ) from first_error

    def _forms(self, messages: Messages) -> Iterator[list[dict[str, Any]]]:
        """The messages as transformers hands them over, and then as templates want them that were written before."""
        form = [
            _with_reasoning({**one, "content": self._content(one)} if "content" in one else dict(one))
            for one in messages
        ]
        yield form
        written = [_with_written_arguments(one) for one in form]
        has_calls, has_gaps = any("tool_calls" in one for one in form), any("content" not in one for one in form)
        if has_calls and has_gaps:
            yield [{"content": None, **one} for one in written]
            yield [{"content": None, **one} for one in form]
        if has_gaps:
            yield [{"content": "", **one} for one in form]
        if has_calls:
            yield [{"content": "", **one} for one in written]

    def _content(self, message: Mapping[str, Any]) -> object:
        """A text, or its parts for a template that goes through them; what a tool said is always a text."""
        content: str | tuple[str, ...] = message["content"]
        takes_parts = self._takes_parts and message.get("role") != "tool"
        if takes_parts and (isinstance(content, tuple) or not self._tests_strings):
            return [{"type": "text", "text": text} for text in ((content,) if isinstance(content, str) else content)]
        return content if isinstance(content, str) else "\n".join(content)

    def _continued(self, messages: list[dict[str, Any]], given: Mapping[str, Any]) -> str:
        """Up to the end of the last message's content."""
        last = messages[-1]
        content = last.get("content")
        marked: object
        if isinstance(content, list) and content:
            text, marked = (
                content[-1]["text"],
                [*content[:-1], {**content[-1], "text": content[-1]["text"] + END_OF_TEXT}],
            )
        elif isinstance(content, str):
            text, marked = content, content + END_OF_TEXT
        else:
            raise InvalidRequest("the last message has no text to go on with")
        rendered = self._template.render(given, messages=[*messages[:-1], {**last, "content": marked}])
        at = rendered.rfind(END_OF_TEXT.strip())
        if at < 0 or text.strip() not in rendered:
            raise InvalidRequest("the template leaves out the end of the last message, so nothing can go on there")
        is_trimmed = not rendered.startswith(END_OF_TEXT, at)
        return rendered[:at].rstrip() if is_trimmed else rendered[:at]


# -- forms of messages -----------------------------------------------------------------------------------------------


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """What the model thought, under the names that templates read."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _with_written_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of calls as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _to_json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _reads(tree: jinja2.nodes.Template) -> tuple[bool, bool]:
    """Whether a template goes through the parts of a content, and whether it asks if something is a string."""
    lists = _closure(tree, {"messages"})
    loops = list(tree.find_all(jinja2.nodes.For))
    items = {_name(loop.target) for loop in loops if _name(loop.iter) in lists} - {""}
    takes_parts = any(isinstance(node := _bare(loop.iter), jinja2.nodes.Getattr | jinja2.nodes.Getitem)
                      and _key(node) == "content" and _name(node.node) in items for loop in loops)  # fmt: skip
    return takes_parts, any(test.name == "string" for test in tree.find_all(jinja2.nodes.Test))


def _closure(tree: jinja2.nodes.Template, names: set[str]) -> set[str]:
    """These variables, and those that are set to one of them or to a part of it."""
    assigned = [(_name(one.target), _name(one.node)) for one in tree.find_all(jinja2.nodes.Assign)]
    while new := {target for target, source in assigned if source in names and target} - names:
        names = names | new
    return names


def _bare(node: jinja2.nodes.Node | None) -> jinja2.nodes.Node | None:
    """Without filters, tests and slices around it."""
    while isinstance(node, jinja2.nodes.Filter | jinja2.nodes.Test) or (
        isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Slice)
    ):
        node = node.node
    return node


def _name(node: jinja2.nodes.Node | None) -> str:
    """Of the variable that a node is; "" where it is none."""
    bare = _bare(node)
    return bare.name if isinstance(bare, jinja2.nodes.Name) else ""


def _key(node: jinja2.nodes.Getattr | jinja2.nodes.Getitem) -> object:
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node.arg, jinja2.nodes.Const) else None


# -- what templates call ---------------------------------------------------------------------------------------------


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks what the model said; here, its content and nothing more."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Iterable[str] | None = None,
    sort_keys: bool = False,
) -> str:
    pair = None if separators is None else tuple(separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)  # type: ignore[arg-type]


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _short(error: Exception | None) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_COMPLAINT_CHARS else text[: MAX_COMPLAINT_CHARS - 3] + "..."
