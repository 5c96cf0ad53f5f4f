"""What answers of both endpoints share: usage, log-probabilities, OpenAI's error object. Pure; knows no HTTP."""

from __future__ import annotations

from typing import Any

from msi.types import Output, TokenLogprobs

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class Usage:
    """Counts tokens of a request as its outputs pass.

    Args:
        num_choices: of each prompt; choices are numbered prompt by prompt.

    Attributes:
        num_reasoning: those of them that were thought; None where that is not told apart.
    """

    def __init__(self, num_choices: int = 1) -> None:
        self.num_reasoning: int | None = None
        self._num_choices = num_choices
        self._last: dict[int, Output] = {}  # of each choice
        self._num_completion = 0

    def add(self, output: Output) -> None:
        self._num_completion += len(output.token_ids)
        self._last[output.index] = output

    def values(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        of_prompts = {index // self._num_choices: output.num_prompt_tokens for index, output in self._last.items()}
        num_prompt = sum(of_prompts.values())
        firsts = [output for index, output in self._last.items() if index % self._num_choices == 0]
        values = {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_completion,
            "total_tokens": num_prompt + self._num_completion,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in firsts)},
        }  # of choices of one prompt, the others find in the cache what the first has computed
        if self.num_reasoning is not None:
            values["completion_tokens_details"] = {"reasoning_tokens": self.num_reasoning}
        return values


def logprob_values(one: TokenLogprobs) -> tuple[float, list[tuple[int, float]]]:
    """The chosen token's, and (token, log-probability) of the best ones; finite."""
    best = zip(one.top_token_ids, one.top_logprobs, strict=True)
    return max(one.logprob, LOWEST_LOGPROB), [(token, max(value, LOWEST_LOGPROB)) for token, value in best]


def error_object(message: str, status: int, *, param: str = "", code: str = "") -> dict[str, Any]:
    """OpenAI's error object.

    Args:
        status: of HTTP; it is the code, too, where there is no word for the error.
    """
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": param or None, "code": code or status}
