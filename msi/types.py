"""Values that cross boundaries between the parts of msi. No behaviour beyond checking themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple, Protocol

from msi.errors import ConfigError, Failure, InvalidRequest, shown
from msi.prompt_logprobs import PromptLogprobs
from msi.sampling_params import SamplingParams as SamplingParams  # one of these values; it checks itself
from msi.sampling_params import is_unicode

Measured = Annotated[float, (0.0, 1e18)]  # a time, a share or a count: whoever reads it may calculate with it
MAX_PRIORITY = 2**31 - 1
MAX_TIMEOUT_S = 1e6
MAX_TEXT_CHARS = 65536  # of a text that a request carries beside its prompt


@dataclass(frozen=True, slots=True)
class LogitChanges:
    """What is done to one row of logits before a token is chosen: bias, then bans, then penalties.

    Attributes:
        repetition_penalty: applies to `prompt_token_ids` and `output_token_ids`, once per token.
        presence_penalty, frequency_penalty: apply to `output_token_ids`.
        prompt_token_ids: () unless there is a repetition penalty. What comes more than once may be left out.
        output_token_ids: () unless there is a penalty.
        output_counts: how often the output has each of `output_token_ids`; () for once.
        banned_token_ids: tokens that cannot be chosen.
        allowed_token_ids: others than these cannot be chosen; () for all.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    banned_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    output_counts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class SamplingExtras:
    """What few rows want; rows without cost nothing.

    Attributes:
        changes: None when the logits stay as they are.
        logprobs: how many of the most probable tokens are wanted with the chosen one; None for no log-probabilities.
    """

    min_p: float = 0.0
    changes: LogitChanges | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenSampling:
    """How to choose one sequence's next token; `seed` and `position` fix its randomness."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int
    extras: SamplingExtras | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own distribution.

    Attributes:
        logprob: of the token that was chosen.
        top_token_ids: the most probable tokens, best first.
        top_logprobs: theirs.
    """

    token_id: int
    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenText:
    """What a token is in a text.

    Attributes:
        text: what it adds to the text; "" while the bytes of a character are incomplete.
        data: the bytes it adds, which need not be whole characters.
    """

    text: str
    data: bytes


Cause = str | InvalidRequest  # why a sequence cannot go on; the latter where what was asked is to blame


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen tokens of a micro-batch.

    Attributes:
        token_ids: one for each of its `logit_rows`; without meaning for a sequence that failed.
        logprobs: by index into `token_ids`, of the rows that asked.
        failures: why a sequence cannot go on, by its index in the micro-batch. The others are as they were without it.
        ended: indices into `token_ids` of those behind which a grammar allows nothing more.
        prompt_logprobs: of the micro-batch's `prompt_rows`, by the index of their sequence.
    """

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    failures: dict[int, Cause] = field(default_factory=dict)
    ended: tuple[int, ...] = ()
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)


class GrammarState(Protocol):
    """How far one answer has come in the grammar that it is held to; whoever reads it is alone with it."""

    def allowed(self, token_ids: Sequence[int]) -> bytes:
        """A bit for each token that may follow these, the lowest of each byte first; raises where none ever can."""

    def ends_with(self, token_id: int) -> bool:
        """Whether nothing may follow this token, behind those that `allowed` was asked about last; or raises."""


@dataclass(frozen=True, slots=True)
class Constrained:
    """A sequence of a micro-batch whose answer is held to a grammar.

    Attributes:
        row: index into `logit_rows`.
        output_token_ids: of the answer so far.
    """

    row: int
    state: GrammarState
    output_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Tokens of one sequence in a micro-batch whose next tokens are known, and how probable those are is wanted.

    Attributes:
        sequence: its index in the micro-batch.
        first: row of the first of them; the others follow it.
        position: of the first of them in the sequence.
        next_token_ids: the token behind each of them.
        num_top: how many of the most probable tokens are wanted with each.
    """

    sequence: int
    first: int
    position: int
    next_token_ids: tuple[int, ...]
    num_top: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one lane carries through the model once.

    Sequences lie behind one another; sequence i contributes `query_lens[i]` tokens, which end at position
    `context_lens[i]` - 1. A prompt chunk, a decode step and later a speculated run are the same case.

    Attributes:
        token_ids: [num_tokens].
        positions: [num_tokens], of each token in its sequence.
        query_lens: [num_seqs].
        context_lens: [num_seqs], tokens in the KV cache once this pass is through.
        block_tables: [num_seqs], the KV blocks of each sequence.
        logit_rows: rows of `token_ids` whose next token is wanted.
        sampling: one for each of `logit_rows`.
        constrained: those of `logit_rows` that are held to a grammar.
        prompt_rows: of sequences whose prompts are scored, in their order.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: tuple[tuple[int, ...], ...]
    logit_rows: tuple[int, ...] = ()
    sampling: tuple[TokenSampling, ...] = ()
    constrained: tuple[Constrained, ...] = ()
    prompt_rows: tuple[PromptRows, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for. `params.seed` is set: whoever accepted the request has drawn one.

    Attributes:
        trace: W3C's traceparent of the span that it belongs to; "" where nobody traces it.
        output_token_ids: that its client has already, from attention workers that were lost; the answer goes on behind.
        num_scored: tokens of the prompt whose log-probabilities it has from them.
        num_resumptions: how often it was given to another attention worker.
        priority: vLLM's: lower is earlier, and gives its blocks up later.
        timeout_s: from now on, after which nobody wants its answer any more; 0 for none.
        flow: who asks: flows share the instance evenly. "" for the connection that it comes by.
        cache_salt: only requests with the same one find each other's prefixes in the cache.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    trace: str = ""
    output_token_ids: tuple[int, ...] = ()
    num_scored: Annotated[int, range(2**40)] = 0
    num_resumptions: Annotated[int, range(2**16)] = 0
    priority: Annotated[int, range(-MAX_PRIORITY, MAX_PRIORITY + 1)] = 0
    timeout_s: Annotated[float, (0.0, MAX_TIMEOUT_S)] = 0.0
    flow: str = ""
    cache_salt: str = ""

    def __post_init__(self) -> None:
        """Raises InvalidRequest: whoever is sent it could not read it, and would never answer."""
        allowed = f"an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}; lower is earlier"
        is_int = isinstance(self.priority, int) and not isinstance(self.priority, bool)
        self._require("priority", is_int and -MAX_PRIORITY <= self.priority <= MAX_PRIORITY, allowed)
        is_number = isinstance(self.timeout_s, int | float) and not isinstance(self.timeout_s, bool)
        allowed = f"a number of seconds from 0, for no limit, to {MAX_TIMEOUT_S:g}"
        self._require("timeout_s", is_number and 0 <= self.timeout_s <= MAX_TIMEOUT_S, allowed)
        for name in ("request_id", "trace", "flow", "cache_salt"):
            text = getattr(self, name)
            allowed = f"a text of at most {MAX_TEXT_CHARS} characters of Unicode"
            self._require(name, isinstance(text, str) and len(text) <= MAX_TEXT_CHARS and is_unicode(text), allowed)

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise InvalidRequest(f"{name} is {shown(getattr(self, name))}; it must be {allowed}", param=name)


class Progress(NamedTuple):  # one for every token: a tuple is made in a third of the time of a frozen dataclass
    """What is new of a request: one value from the pass that made it to whoever turns tokens into text.

    Attributes:
        finish_reason: "stop", "length" or None while it goes on.
        logprobs: one for each token if they were asked for, else ().
        num_cached_tokens: with the first token, how many of the prompt were known when it was admitted; else 0.
        failure: why it ends without further tokens.
        queued_s: with the first token, how long it had waited at its attention worker to be admitted; else 0.
        keeps_last: the last token is part of the text, though the reason is "stop": its grammar has come to its end.
        prompt_logprobs: of the prompt's tokens that a pass has scored; those that follow come later.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    failure: Failure | None = None
    queued_s: Measured = 0.0
    keeps_last: bool = False
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.failure is not None


class Output(NamedTuple):  # one for every token, as Progress
    """What is new of a request since its last output.

    Attributes:
        text: new text; "" while the bytes of a character are incomplete.
        token_ids: new tokens.
        finish_reason: "stop" (end of sequence, a stop token or string), "length", or None while it goes on.
        index: which of the request's `n` choices this belongs to.
        logprobs: one for each of `token_ids` if they were asked for, else (). Those of tokens whose text is held back,
            because it may become a stop string or bytes may be missing, come with their text.
        num_cached_tokens: tokens of the prompt that the prefix cache had when this choice was admitted.
        token_texts: what each of `logprobs` adds to the text; joined over a choice they are its text.
        queued_s: as in `Progress`.
        prompt_logprobs: of the prompt's tokens from the second on, if they were asked for: all with the first output,
            which is one of choice 0; else None.
        stopped_by: the stop string that ended it, "" where none did.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    index: int = 0  # type: ignore[assignment]  # a tuple's own, which nobody asks here
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    token_texts: tuple[TokenText, ...] = ()
    queued_s: float = 0.0
    prompt_logprobs: PromptLogprobs | None = None
    stopped_by: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker stands in its role. The ranks of a node share the work of every layer.

    Attributes:
        size: ranks of the node.

    Raises:
        ValueError: the node has no such rank.
    """

    node: Annotated[int, range(2**16)]
    rank: Annotated[int, range(2**8)] = 0
    size: Annotated[int, range(1, 2**8 + 1)] = 1

    def __post_init__(self) -> None:
        if self.rank >= self.size:
            raise ValueError(f"node {self.node} has {self.size} ranks, so none is rank {self.rank}")

    @staticmethod
    def at(index: int, size: int) -> Place:
        """The place with this number among all ranks of a role, whose nodes have `size` each."""
        return Place(index // size, index % size, size)

    @property
    def index(self) -> int:
        return self.node * self.size + self.rank

    def check_is_built(self) -> None:
        """Raises ConfigError: tensor parallelism is to come."""
        if self.size != 1:
            raise ConfigError(
                f"this worker is to be rank {self.rank} of {self.size} of node {self.node}; nodes of more than one "
                "rank (tensor parallelism) are not built yet: give every node one worker"
            )


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Medians of the last stages of a worker, in seconds, and what share of the wall time it computed.

    Attributes:
        attention_s: T_a, one micro-batch through one layer's attention half.
        expert_s: T_e, one wave through one layer's experts.
        comm_s: T_c, one way.
        busy: compute time over wall time since the last report.
        bubble: 1 - busy while work was admitted.
    """

    attention_s: Measured = 0.0
    expert_s: Measured = 0.0
    comm_s: Measured = 0.0
    busy: Measured = 0.0
    bubble: Measured = 0.0
