"""Log-probabilities of a prompt's tokens: packed where they travel, one by one where they are read.

A prompt has many, and nobody on the way looks at them: so they are bytes between the pass that made them and whoever
shows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from msi.errors import ProtocolError
from msi.sampling_params import MAX_LOGPROBS

NUMBER_BYTES = 4


class ScoredToken(NamedTuple):
    """A prompt's token, given all before it.

    Attributes:
        logprob: its log-probability, of the model's own distribution.
        rank: 1 for the most probable token there.
        top_token_ids: the most probable tokens, best first.
        top_logprobs: theirs.
    """

    logprob: float
    rank: int
    top_token_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of tokens of a prompt that lie behind one another; nothing is before the first of a prompt, so it has none.

    Numbers have 32 bits, in this machine's order.

    Attributes:
        first: the position of the first of these tokens in the prompt.
        num_top: most probable tokens that are told of each position.
        logprobs: float [num_tokens].
        ranks: int [num_tokens].
        top_token_ids: int [num_tokens, num_top].
        top_logprobs: float [num_tokens, num_top].

    Raises:
        ValueError: they are of different numbers of tokens.
    """

    first: Annotated[int, range(1, 2**40)]
    num_top: Annotated[int, range(MAX_LOGPROBS + 1)]
    logprobs: bytes
    ranks: bytes
    top_token_ids: bytes
    top_logprobs: bytes

    def __post_init__(self) -> None:
        sizes = (len(self.logprobs), len(self.ranks), len(self.top_token_ids), len(self.top_logprobs))
        each, top = NUMBER_BYTES * len(self), NUMBER_BYTES * len(self) * self.num_top
        if sizes != (each, each, top, top):
            raise ValueError(f"log-probabilities of {len(self)} tokens with {self.num_top} others: {sizes} bytes")

    def __len__(self) -> int:
        return len(self.logprobs) // NUMBER_BYTES

    def tokens(self, start: int = 0, stop: int | None = None) -> Iterator[ScoredToken]:
        """Those from index `start` to `stop`; index 0 is position `first`."""
        logprobs, top_logprobs = memoryview(self.logprobs).cast("f"), memoryview(self.top_logprobs).cast("f")
        ranks, top_token_ids = memoryview(self.ranks).cast("i"), memoryview(self.top_token_ids).cast("i")
        num_top = self.num_top
        for index in range(start, len(self) if stop is None else min(stop, len(self))):
            top = slice(index * num_top, (index + 1) * num_top)
            yield ScoredToken(
                logprobs[index], ranks[index], tuple(top_token_ids[top].tolist()), tuple(top_logprobs[top].tolist())
            )

    @staticmethod
    def joined(parts: Sequence[PromptLogprobs]) -> PromptLogprobs:
        """Parts of one prompt, from its second token on, as one. Raises ProtocolError: some are missing."""
        position, num_top = 1, parts[0].num_top if parts else 0
        for part in parts:
            if part.first != position or part.num_top != num_top:
                raise ProtocolError(f"log-probabilities of a prompt go on at {part.first}, and not at {position}")
            position += len(part)
        fields = ("logprobs", "ranks", "top_token_ids", "top_logprobs")
        return PromptLogprobs(1, num_top, *(b"".join(getattr(part, name) for part in parts) for name in fields))
