"""What a worker's earlier life had is freed, though the garbage collector was told to leave alone what was there."""

from __future__ import annotations

import gc
import weakref

from msi.worker.torch_host import free_circles


class Held:
    """In a circle with itself."""

    def __init__(self):
        self.itself = self


def test_a_circle_that_was_frozen_goes_and_the_rest_is_frozen_again():
    held = Held()
    gone = weakref.ref(held)
    gc.freeze()
    try:
        del held
        gc.collect()
        assert gone() is not None
        free_circles()
        assert gone() is None
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_where_nothing_is_frozen_nothing_is_after_it():
    held = Held()
    gone = weakref.ref(held)
    del held
    gc.unfreeze()
    free_circles()
    assert gone() is None
    assert gc.get_freeze_count() == 0
