"""Errors that cross processes keep their class and their fields."""

from __future__ import annotations

import pytest

from msi import errors
from msi.errors import KINDS, EngineError, Failure, InvalidRequest, TransportError

OF_PEERS = {kind for kind, known in KINDS.items() if issubclass(known, TransportError)}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OF_PEERS])
def test_an_error_comes_out_of_a_failure_as_what_it_was(kind):
    error = KINDS[kind]("a sentence", param="stop", code="a_code")
    back = Failure.of(error).error()
    assert (type(back), str(back), back.param, back.code) == (KINDS[kind], "a sentence", "stop", "a_code")


@pytest.mark.parametrize("kind", sorted(OF_PEERS))
def test_a_transport_error_still_names_its_peer(kind):
    back = Failure.of(KINDS[kind]("expert-0", "it died")).error()
    assert (type(back), back.peer, back.reason) == (KINDS[kind], "expert-0", "it died")


def test_every_class_of_the_tree_has_a_kind():
    tree = {one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, EngineError)}
    assert set(KINDS.values()) == tree
    assert all(Failure.of(known("x")).kind == kind for kind, known in KINDS.items() if kind not in OF_PEERS)


def test_a_subclass_travels_as_its_base_and_an_unknown_kind_as_the_root():
    class Special(InvalidRequest):
        pass

    assert type(Failure.of(Special("x")).error()) is InvalidRequest
    assert type(Failure("of the future", "x").error()) is EngineError
