"""What a request asks of the sampler: its parameters, which check themselves, and a model's own."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import chain

from msi.errors import InvalidRequest, shown
from msi.structured_outputs import StructuredOutputs

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 4096
MAX_LISTED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 4096
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_INTEGER = 2**63 - 1  # what crosses between processes
MIN_TEMPERATURE = 1e-5  # vLLM's: below it, dividing by it would choose the best token anyway
MAX_TEMPERATURE = 100
MIN_REPETITION_PENALTY = 0.01  # logits divided by it stay finite in float32


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Names and meanings are vLLM's, and OpenAI's where that has the parameter.

    Numbers are bounded so that arithmetic on them stays finite in float32 and integers fit into 64 bits; what a bound
    leaves out would choose no other token than what it lets in. Lists may be given for tuples, one stop string for a
    tuple of it, and None for none, as to vLLM.

    Attributes:
        max_tokens: the most tokens to generate; the context may end the text before. 0 only computes the prompt.
        temperature: 0 is greedy, and so is everything below `MIN_TEMPERATURE`; otherwise logits are divided by it.
            (vLLM raises what lies between 0 and 0.01 to 0.01. Here it is used as it is: logits are taken relative to
            the best one, so the division cannot go wrong.)
        top_p: sample from the smallest set of tokens whose probabilities reach it, in (0, 1]; never fewer than one.
        top_k: sample from the k most probable tokens; 0 or -1 for all.
        seed: makes the request's randomness a function of (seed, position) alone; None draws one.
        stop: strings that end the text; they are not part of it.
        ignore_eos: go on after an end-of-sequence token.
        min_p: sample from the tokens with at least this share of the best one's probability.
        presence_penalty: subtracted from the logit of every token that the output has.
        frequency_penalty: the same, times how often the output has it.
        repetition_penalty: logits of tokens in prompt or output are divided by it if positive, else multiplied.
        logit_bias: token id to what is added to its logit, from -100 to 100.
        min_tokens: neither an end of sequence nor `stop_token_ids` nor a stop string before so many tokens.
        stop_token_ids: tokens that end the text; they are not part of it.
        logprobs: log-probabilities of each chosen token and of so many of the most probable ones, before temperature,
            penalties and bias; None for none at all.
        prompt_logprobs: the same for each token of the prompt but the first, given those before it. Such a prompt is
            computed whole: it takes nothing from the prefix cache.
        n: choices, each an answer of its own; their seeds derive from `seed`.
        allowed_token_ids: no token but these can be chosen; () for all.
        bad_words: texts whose tokens may not be completed in the output, with a space before them or without.
        bad_words_token_ids: sequences of tokens that may not be completed; what bad_words are to the sampler.
        skip_special_tokens: special tokens are no part of the text.
        include_stop_str_in_output: what ends the text (a stop string, or a token) is part of it.
        truncate_prompt_tokens: so many of the prompt's last tokens are taken, the tokenizer's own special ones among
            them; -1 for as many as leave room for max_tokens. None takes all.
        structured_outputs: what the answer has to be; None for any text. It ends once nothing can follow.

    Raises:
        InvalidRequest: names the parameter, what was given and what is allowed.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    n: int = 1
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in _LISTS:
            if type(value := getattr(self, name)) is not tuple:
                is_one = name == "stop" and isinstance(value, str)
                object.__setattr__(self, name, (value,) if is_one else _as_tuple(value))
        if _is_none(self.logit_bias):
            object.__setattr__(self, "logit_bias", {})
        _require("max_tokens", self.max_tokens, _is_int(self.max_tokens, 0), "an integer >= 0 of 63 bits")
        ok = _is_number(self.temperature, 0, MAX_TEMPERATURE)
        _require("temperature", self.temperature, ok, f"a number from 0 (greedy) to {MAX_TEMPERATURE}")
        _require("top_p", self.top_p, _is_number(self.top_p, 0, 1) and self.top_p > 0, "a number in (0, 1]")
        _require("top_k", self.top_k, _is_int(self.top_k, -1), "an integer >= 1 of 63 bits, or 0 or -1 for all")
        ok = self.seed is None or _is_int(self.seed, -(2**63), 2**64 - 1)
        _require("seed", self.seed, ok, "an integer of 64 bits, or null")
        ok = isinstance(self.stop, tuple) and len(self.stop) <= MAX_STOP_STRINGS and all(map(_is_stop, self.stop))
        _require("stop", self.stop, ok,
                 f"up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters of Unicode")  # fmt: skip
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            value = getattr(self, name)
            _require(name, value, isinstance(value, bool), "true or false")
        _require("min_p", self.min_p, _is_number(self.min_p, 0, 1), "a number from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(name, value, _is_number(value, -2, 2), "a number from -2 to 2")
        ok = _is_number(self.repetition_penalty, MIN_REPETITION_PENALTY, 100)
        _require("repetition_penalty", self.repetition_penalty, ok,
                 f"a number from {MIN_REPETITION_PENALTY} to 100; 1 changes nothing")  # fmt: skip
        self._check_listed_tokens()
        ok = _is_int(self.min_tokens, 0, self.max_tokens)
        _require("min_tokens", self.min_tokens, ok, f"an integer from 0 to max_tokens, which is {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            ok = value is None or _is_int(value, 0, MAX_LOGPROBS)
            _require(name, value, ok, f"an integer from 0 to {MAX_LOGPROBS}, or null")
        _require("n", self.n, _is_int(self.n, 1, MAX_CHOICES), f"an integer from 1 to {MAX_CHOICES}")
        limit = self.truncate_prompt_tokens
        ok = limit is None or (_is_int(limit, -1) and limit != 0)
        _require("truncate_prompt_tokens", limit, ok, "an integer >= 1, -1 for all that there is room for, or null")
        asked = self.structured_outputs
        _require("structured_outputs", asked, asked is None or isinstance(asked, StructuredOutputs), "such, or None")

    def _check_listed_tokens(self) -> None:
        bias = self.logit_bias
        ok = isinstance(bias, dict) and len(bias) <= MAX_LISTED_TOKENS and _are_tokens(bias)
        ok = ok and _are_all(bias.values(), (int, float)) and all(-100 <= value <= 100 for value in bias.values())
        _require("logit_bias", bias, ok, f"a map of up to {MAX_LISTED_TOKENS} token ids to numbers from -100 to 100")
        ids = self.stop_token_ids
        ok = isinstance(ids, tuple) and len(ids) <= MAX_LISTED_TOKENS and _are_tokens(ids)
        _require("stop_token_ids", ids, ok, f"up to {MAX_LISTED_TOKENS} token ids")
        ids = self.allowed_token_ids
        ok = isinstance(ids, tuple) and len(ids) <= MAX_ALLOWED_TOKENS and _are_tokens(ids)
        _require("allowed_token_ids", ids, ok, f"up to {MAX_ALLOWED_TOKENS} token ids")
        if any(type(one) is not tuple or one for one in (self.bad_words, self.bad_words_token_ids)):
            self._check_bad_words()

    def _check_bad_words(self) -> None:
        words, sequences = self.bad_words, self.bad_words_token_ids
        ok = isinstance(words, tuple) and len(words) <= MAX_BAD_WORDS
        ok = ok and all(_is_text(one, MAX_BAD_WORD_CHARS) and not one.isspace() for one in words)
        allowed = f"up to {MAX_BAD_WORDS} strings of 1 to {MAX_BAD_WORD_CHARS} characters, not all spaces"
        _require("bad_words", words, ok, allowed)
        most = 4 * MAX_BAD_WORD_CHARS + 1  # a token for each byte, and the space
        ok = isinstance(sequences, tuple) and len(sequences) <= 2 * MAX_BAD_WORDS
        ok = ok and all(isinstance(one, tuple) and 0 < len(one) <= most for one in sequences)
        ok = ok and _are_tokens(list(chain.from_iterable(sequences)))
        _require("bad_words_token_ids", sequences, ok,
                 f"up to {2 * MAX_BAD_WORDS} sequences of 1 to {most} token ids")  # fmt: skip


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """A model's own parameters, for requests that leave them out; None where the model says nothing.

    Attributes:
        is_limit: no request gets more than `max_tokens`.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    is_limit: bool = False

    def values(self) -> dict[str, float | int]:
        """What the model says, by the parameter's name."""
        return {name: value for name in DEFAULTED if (value := getattr(self, name)) is not None}

    def params(self) -> SamplingParams:
        """For a request that says nothing. Raises InvalidRequest: a value that is not allowed."""
        return SamplingParams(**self.values())  # type: ignore[arg-type]

    def limited(self, params: SamplingParams) -> SamplingParams:
        """With no more tokens than the limit."""
        if not self.is_limit or self.max_tokens is None or params.max_tokens <= self.max_tokens:
            return params
        return replace(params, max_tokens=self.max_tokens, min_tokens=min(params.min_tokens, self.max_tokens))


NO_DEFAULTS = SamplingDefaults()
_LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "bad_words_token_ids")
DEFAULTED = tuple(one.name for one in fields(SamplingDefaults) if one.name != "is_limit")


def _is_none(value: object) -> bool:
    return value is None


def _as_tuple(value: object) -> object:
    """A list, or nothing, as a tuple; what is neither stays as it is, to be refused."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple([_as_tuple(one) if isinstance(one, list | tuple) else one for one in value])
    return value


def _is_int(value: object, least: int, most: int = MAX_INTEGER) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _are_tokens(values: Collection[int]) -> bool:
    """Looked at all together: every choice of a request has them anew."""
    return not values or (_are_all(values, (int,)) and min(values) >= 0 and max(values) < 2**31)


def _are_all(values: Iterable[object], kinds: tuple[type, ...]) -> bool:
    """Whether they are of these types; a bool is no number."""
    return all(issubclass(kind, kinds) and kind is not bool for kind in set(map(type, values)))


def _is_number(value: object, least: float, most: float) -> bool:
    """Never of an infinity or NaN, nor of an integer that no float can express: the comparisons see to that."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_stop(text: object) -> bool:
    return _is_text(text, MAX_STOP_CHARS)


def _is_text(text: object, most: int) -> bool:
    return isinstance(text, str) and 0 < len(text) <= most and is_unicode(text)


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8: it has no half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _require(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise InvalidRequest(f"{name} is {shown(value)}; it must be {allowed}", param=name)
