"""What msi-ctl takes for an order."""

from __future__ import annotations

import pytest

from msi.errors import ConfigError
from msi_launch.ctl import parse


@pytest.mark.parametrize("words", [
    ["status"], ["placement", "--json"], ["rebalance"], ["drain", "expert-1"], ["add", "--role", "expert"],
    ["remove", "attention-0", "--within", "0.5"],
], ids=" ".join)  # fmt: skip
def test_every_order_is_understood(words):
    values = parse(words)
    assert values.verb == words[0]
    assert values.worker == (words[1] if words[0] in ("drain", "remove") else "")
    assert (values.role or "") == ("expert" if words[0] == "add" else "")


@pytest.mark.parametrize(("words", "complaint"), [
    ([], "VERB is missing"), (["stop"], "'stop' is not one"), (["add"], "add needs --role"),
    (["add", "--role", "gateway"], "supported: attention, expert"), (["status", "--role", "expert"], "takes no --role"),
    (["drain"], "drain needs a WORKER"), (["rebalance", "expert-1"], "takes no WORKER"),
    (["drain", "expert-1", "--within", "soon"], "give a number"),
], ids=str)  # fmt: skip
def test_what_is_none_is_refused_in_a_sentence(words, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse(words)
