"""What an answer has to be: JSON that fits a schema, a text of a form, one of several, or a sentence of a grammar."""

from __future__ import annotations

from dataclasses import dataclass, fields

from msi.errors import InvalidRequest, shown

MAX_BYTES = 128 * 1024  # of a schema, a regular expression, all choices together, or a grammar
MAX_CHOICES = 4096
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """Exactly one of the first six is given. Names and meanings are vLLM's.

    Attributes:
        json: a JSON schema, as JSON.
        regex: a regular expression for the whole answer, in Rust's syntax; without look-around.
        choice: the answers that are allowed.
        grammar: a context-free grammar, in Lark's syntax or in GBNF ("root ::= ...").
        json_object: any JSON object.
        structural_tag: text in which tags hold to a form, as JSON; see `msi.text.structural_tags`.
        whitespace_pattern: a regular expression for the white space within JSON, wherever JSON allows some. By default
            there may be a space behind a comma and a colon, so that an answer comes to its end.
        disable_any_whitespace: there is no white space within JSON.

    Raises:
        InvalidRequest: names the parameter, what was given and what is allowed.
    """

    json: str = ""
    regex: str = ""
    choice: tuple[str, ...] = ()
    grammar: str = ""
    json_object: bool = False
    structural_tag: str = ""
    whitespace_pattern: str = ""
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "choice":
                ok = isinstance(value, tuple) and len(value) <= MAX_CHOICES and all(_is_text(item) for item in value)
                ok = ok and all(value) and sum(map(len, value)) <= MAX_BYTES
                allowed = f"up to {MAX_CHOICES} strings that are not empty, of {MAX_BYTES} bytes together"
            elif isinstance(one.default, bool):
                ok, allowed = isinstance(value, bool), "true or false"
            else:
                ok, allowed = _is_text(value), f"a text of up to {MAX_BYTES} bytes"
            if not ok:
                raise _invalid(f"{one.name} of structured_outputs is {shown(value)}; it must be {allowed}")
        given = [name for name in KINDS if getattr(self, name)]
        if len(given) != 1:
            raise _invalid(
                f"structured_outputs has {' and '.join(given) or 'nothing'}; give exactly one of {', '.join(KINDS)}"
            )

    @property
    def kind(self) -> str:
        """Which of `KINDS` is given."""
        return next(name for name in KINDS if getattr(self, name))


def _is_text(value: object) -> bool:
    """Of Unicode, and not too long."""
    try:
        return isinstance(value, str) and len(value) <= MAX_BYTES and len(value.encode()) <= MAX_BYTES
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="structured_outputs")
