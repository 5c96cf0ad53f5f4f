"""Which syntax a model writes: by the name that a user gives, or by the text of the model's chat template."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from msi.server.parsing.readers import HARMONY_MARKERS
from msi.server.parsing.syntaxes import SECTION_BEGIN, SYNTAXES, TOOL_CALLS_BEGIN, Syntax

HARMONY = ("openai", "openai_gptoss")
JSON_CALLS = "json"  # how a model is made to write calls whose own way nobody knows; no parser that can be named


@dataclass(frozen=True, slots=True)
class ReasoningSyntax:
    """Markers around what a model thinks.

    Attributes:
        is_implied: the text begins with it, even where `start` was left out.
        is_shown: it stays in the text, with its markers, for a template that wants it back there.
    """

    start: str
    end: str
    is_implied: bool = False
    is_shown: bool = False


_THINK = ReasoningSyntax("<think>", "</think>")
TOOL_PARSERS = {  # vLLM's names
    "hermes": "hermes", "qwen3_xml": "qwen3_xml", "qwen3_coder": "qwen3_xml", "mistral": "mistral",
    "deepseek_v3": "deepseek", "deepseek_v31": "deepseek", "glm45": "glm", "glm47": "glm", "kimi_k2": "kimi",
    "minimax_m2": "minimax", "openai": "",
}  # fmt: skip
REASONING_PARSERS = {  # vLLM's names
    "deepseek_r1": ReasoningSyntax("<think>", "</think>", is_implied=True),
    "deepseek_v3": _THINK, "qwen3": _THINK, "glm45": _THINK, "kimi_k2": _THINK, "minimax_m2": _THINK,
    "minimax_m2_append_think": ReasoningSyntax("<think>", "</think>", is_shown=True),
    "mistral": ReasoningSyntax("[THINK]", "[/THINK]"), "openai_gptoss": None,
}  # fmt: skip
# most specific first; "" for a syntax that is not known here
TOOL_MARKERS = (
    ("<|channel|>", "openai"), ("DSML", ""), (TOOL_CALLS_BEGIN, "deepseek_v3"), (SECTION_BEGIN, "kimi_k2"),
    ("[TOOL_CALLS]", "mistral"), ("<minimax:tool_call>", "minimax_m2"), ("<function=", "qwen3_xml"),
    ("<arg_key>", "glm45"), ("<tool_call>", "hermes"),
)  # fmt: skip
REASONING_MARKERS = (("<|channel|>", "openai_gptoss"), ("[THINK]", "mistral"), ("</think>", "qwen3"))


def is_harmony(name: str) -> bool:
    """Whether a parser of either kind is gpt-oss's, which does both."""
    return name in HARMONY


def tool_syntax(name: str) -> Syntax | None:
    """Of a parser's name; None for "" and harmony."""
    syntax = JSON_CALLS if name == JSON_CALLS else TOOL_PARSERS.get(name)
    return SYNTAXES[syntax] if syntax else None


def reasoning_syntax(name: str) -> ReasoningSyntax | None:
    """Of a parser's name; None for "" and harmony."""
    return REASONING_PARSERS.get(name)


def chosen_tool_parser(name: str, templates: Iterable[str]) -> str:
    """A parser's name, "" for none: `auto` is by the templates' text."""
    return _chosen(name, templates, TOOL_MARKERS)


def chosen_reasoning_parser(name: str, templates: Iterable[str]) -> str:
    """A parser's name, "" for none: `auto` is by the templates' text."""
    return _chosen(name, templates, REASONING_MARKERS)


def _chosen(name: str, templates: Iterable[str], markers: Iterable[tuple[str, str]]) -> str:
    if name != "auto":
        return "" if name == "none" else name
    text = "\n".join(templates)
    return next((parser for marker, parser in markers if marker in text), "")


def begins_thinking(prompt: str, reasoning_parser: str) -> bool:
    """Whether an answer to this prompt begins with what is thought: the prompt ends with its marker, or needs none."""
    syntax, end = reasoning_syntax(reasoning_parser), prompt.rstrip()
    if syntax is None:
        return False
    return end.endswith(syntax.start) or (syntax.is_implied and not end.endswith(syntax.end))


def markers_of(tool_parser: str, reasoning_parser: str) -> set[str]:
    """Texts that these parsers need to see, be they special tokens or not."""
    if is_harmony(tool_parser) or is_harmony(reasoning_parser):
        return set(HARMONY_MARKERS)
    found: set[str] = set()
    if (syntax := tool_syntax(tool_parser)) is not None:
        found |= {*syntax.openings, *syntax.markers}
    if (thinking := reasoning_syntax(reasoning_parser)) is not None:
        found |= {thinking.start, thinking.end}
    return found
