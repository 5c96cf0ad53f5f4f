"""Tokens as numbers: vLLM's `return_token_ids`, and `return_tokens_as_token_ids` for log-probabilities.

Pure; knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orjson

from msi.types import Output, TokenText


def id_name(token_id: int) -> str:
    """What stands for a token where its text does not."""
    return f"token_id:{token_id}"


def named_by_id(token_text: Callable[[int], TokenText]) -> Callable[[int], TokenText]:
    """The same tokens, called by their ids; their bytes are what they add to the text all the same."""
    return lambda token_id: TokenText(id_name(token_id), token_text(token_id).data)


class TokenIds:
    """Of one request.

    Args:
        prompts: tokens of each.
        num_choices: of each prompt; choices are numbered prompt by prompt.
    """

    def __init__(self, prompts: Sequence[tuple[int, ...]], num_choices: int) -> None:
        self._prompts = prompts
        self._num_choices = num_choices
        self._written: dict[int, orjson.Fragment] = {}  # by prompt; a prompt may have a million, and many choices
        self._answers: dict[int, list[int]] = {}  # by choice

    def of_prompt(self, index: int) -> dict[str, Any]:
        """The field that has the tokens of a choice's prompt."""
        number = index // self._num_choices
        if number not in self._written:
            self._written[number] = orjson.Fragment(orjson.dumps(self._prompts[number]))
        return {"prompt_token_ids": self._written[number]}

    def first_of(self, output: Output) -> dict[str, Any]:
        """`of_prompt`, where a choice begins with this output; else {}. Asked before `take`."""
        return {} if output.index in self._answers else self.of_prompt(output.index)

    def take(self, output: Output) -> dict[str, Any]:
        """The field that has the tokens of an output."""
        self._answers.setdefault(output.index, []).extend(output.token_ids)
        return {"token_ids": output.token_ids}

    def whole(self, index: int) -> dict[str, Any]:
        """The same of a choice, once it has ended."""
        return {"token_ids": self._answers.get(index, [])}
