"""What an operator tells a running instance, and what it hears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

Number = Annotated[int, range(2**31)]


@dataclass(frozen=True, slots=True)
class Order:
    """From a client to the coordinator, which answers once it is done.

    Attributes:
        number: names it in the answer.
        verb: status, placement, drain, remove, add or rebalance.
        worker_id: of drain and remove.
        role: of add.
        within_s: of drain and remove: what an attention worker runs then goes on elsewhere.
    """

    number: Number
    verb: str
    worker_id: str = ""
    role: str = ""
    within_s: Annotated[float, (0.0, 1e6)] = 60.0


@dataclass(frozen=True, slots=True)
class Ordered:
    """The answer.

    Attributes:
        text: what was done, in a sentence.
        report: a JSON object with what there is to know.
        failure: why it was not done; "" where it was.
    """

    number: Number
    text: str = ""
    report: str = "{}"
    failure: str = ""
