"""What is looked for in answers of one model: by what was asked of the server, and by the model's chat templates."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import orjson

from msi.control.client_messages import Welcome
from msi.server.chat import ChatRequest
from msi.server.parsing.choice import (
    JSON_CALLS,
    begins_thinking,
    chosen_reasoning_parser,
    chosen_tool_parser,
    markers_of,
)
from msi.server.parsing.parser import Parsing
from msi.types import SamplingParams


class ModelParsers:
    """Of one model.

    Args:
        templates: of chats; they show how the model writes.
        special_tokens: texts that an answer has only where that is asked for.

    Attributes:
        tool_parser, reasoning_parser: names, "" where nothing is looked for.
    """

    def __init__(self, welcome: Welcome, templates: Collection[str], special_tokens: Collection[str]) -> None:
        self.tool_parser = chosen_tool_parser(welcome.tool_call_parser, templates)
        self.reasoning_parser = chosen_reasoning_parser(welcome.reasoning_parser, templates)
        self._special_tokens = frozenset(special_tokens)

    def parsing(self, asked: ChatRequest, prompt: str) -> Parsing | None:
        """What is looked for in this chat's answers.

        Args:
            prompt: its text, whose end says whether the model is thinking already.
        """
        tool_parser = self.tool_parser if asked.calls_tools else ""
        if asked.forced_tools:
            tool_parser = tool_parser or JSON_CALLS
        if not tool_parser and not self.reasoning_parser:
            return None
        functions = [tool["function"] for tool in asked.tools or ()] if tool_parser else []
        return Parsing(
            tool_parser,
            self.reasoning_parser,
            orjson.dumps({function["name"]: function.get("parameters") for function in functions}),
            is_thinking=begins_thinking(prompt, self.reasoning_parser),
            has_parallel_calls=asked.has_parallel_calls,
            has_reasoning=asked.has_reasoning,
        )

    def params(self, params: SamplingParams, parsing: Parsing) -> SamplingParams:
        """With all in the text that has to be seen."""
        if self._special_tokens & markers_of(parsing.tool_parser, parsing.reasoning_parser):
            return replace(params, skip_special_tokens=False)
        return params
