"""How much of prompts is computed at a time beside sequences that decode, so that these are not kept waiting.

Who decodes gets a token when a pass is through, and a pass takes as long as the prompts in it and in those of other
lanes do. How long that is nobody knows beforehand: it depends on the model, on the device, and on who else uses it. So
it is measured, and the tokens of prompts that may be under way follow. Decides; does not act. Knows no clock.
"""

from __future__ import annotations

LEAST_TOKENS = 128  # of a pass: less would hardly be faster, as all weights are read for them
LEAST_BESIDE = 32  # where other lanes have such passes under way
FIRST_TOKENS = 256  # before anything was measured
TIMES_DECODING = 3.0  # a pass with prompts may take so many times as long as one without, where that is longer
GROWTH = 1.25
LEAST_SHRINKING = 0.5  # by one pass, which may have taken long for other reasons
DECODING_WEIGHT = 0.2  # of the last pass without prompts


class PromptShare:
    """Of one attention worker.

    Args:
        most_tokens: of a pass.
        delay_s: what a pass with prompts may take.
    """

    def __init__(self, most_tokens: int, delay_s: float) -> None:
        self._most = most_tokens
        self._least = min(LEAST_TOKENS, most_tokens)
        self._delay_s = delay_s
        self._tokens = float(min(FIRST_TOKENS, most_tokens))
        self._decoding_s = 0.0

    def room(self, under_way: int) -> int:
        """Tokens of prompts that one more pass may have.

        Args:
            under_way: in passes of other lanes.
        """
        least = min(self._least, LEAST_BESIDE) if under_way else self._least
        return max(least, int(self._tokens) - under_way)

    def passed(self, seconds: float, *, is_full: bool) -> None:
        """A pass with prompts took so long while others decoded; `is_full`: it had as many tokens as `room` said."""
        target_s = max(self._delay_s, TIMES_DECODING * self._decoding_s)
        if seconds > target_s:
            self._tokens = max(self._least, self._tokens * max(LEAST_SHRINKING, target_s / seconds))
        elif is_full:
            self._tokens = min(self._most, self._tokens * GROWTH)

    def decoded(self, seconds: float) -> None:
        """A pass without prompts took so long, and no lane had any."""
        if not self._decoding_s:
            self._decoding_s = seconds
        else:  # one that stood still says nothing
            self._decoding_s += DECODING_WEIGHT * (min(seconds, 2 * self._decoding_s) - self._decoding_s)
