"""Which generators are in memory: who is loaded next, and who makes room for it."""

from __future__ import annotations

import pytest

from scanloom.errors import ArtefactError, BusyError
from scanloom.sampling.shelf import FAILED_S, STAYS_S, WAITS_S, Shelf


def shelf_of(*names: str, most: int = 2) -> Shelf:
    shelf = Shelf(most)
    for name in names:
        shelf.loaded(name, 0.0)
    return shelf


def idle(_: str) -> bool:
    return True


def busy(_: str) -> bool:
    return False


def test_what_is_wanted_is_loaded_where_there_is_room() -> None:
    shelf = shelf_of("a")
    assert shelf.next(["a"], busy, 1.0) is None
    assert shelf.next(["a", "c", "b"], busy, 1.0) == ("c", None)


def test_the_least_recently_used_one_that_is_idle_makes_room() -> None:
    shelf = shelf_of("a", "b", "c", most=3)
    shelf.used("a")
    assert shelf.next(["d"], lambda name: name != "b", 1.0) == ("d", "c")
    shelf.loaded("d", 2.0)
    assert shelf.next(["c"], idle, 3.0) == ("c", "b")


def test_one_that_never_rests_makes_room_when_it_was_long_enough_there_and_another_waited() -> None:
    shelf = shelf_of("a", "b")
    shelf.loaded("b", 10.0)
    at = STAYS_S + 1.0
    assert shelf.next(["c"], busy, at) is None
    shelf.require("a", at)
    assert shelf.next(["c"], busy, at + WAITS_S) is None
    with pytest.raises(BusyError) as leaving:
        shelf.require("a", at + WAITS_S)
    assert leaving.value.retry_after_s > 0.0
    shelf.require("b", at + WAITS_S)
    # Another that happens to be idle goes later than the one that had to refuse orders.
    shelf.used("a")
    assert shelf.next(["c"], idle, at + WAITS_S + 1.0) == ("c", "a")
    shelf.require("a", at + WAITS_S + 1.0)


def test_nobody_makes_room_for_one_that_is_wanted_no_more() -> None:
    shelf = shelf_of("a", most=1)
    shelf.next(["b"], busy, 100.0)
    shelf.next(["b"], busy, 100.0 + WAITS_S)
    assert shelf.leaving == "a"
    assert shelf.next(["a"], busy, 107.0) is None
    shelf.require("a", 107.0)
    # Who is wanted anew has not waited yet.
    assert shelf.next(["b"], busy, 200.0) is None
    assert shelf.leaving is None


def test_one_that_could_not_be_loaded_is_not_tried_again_for_a_while() -> None:
    shelf = shelf_of()
    shelf.failed("lost", ArtefactError("no artefact here"), 0.0)
    with pytest.raises(ArtefactError, match="no artefact here"):
        shelf.require("lost", FAILED_S - 1.0)
    shelf.require("lost", FAILED_S)
    for number in range(1000):
        shelf.failed(f"lost-{number}", ArtefactError("no artefact here"), 100.0 * number)
    assert len(shelf._failed) == 1


def test_who_made_room_comes_back_where_the_other_cannot_be_loaded_and_nobody_else_is_wanted() -> None:
    for wanted, comes in (([], "a"), (["c"], "c")):
        shelf = shelf_of("a", most=1)
        assert shelf.first(["b"], 0.5) == "b"
        assert shelf.next(["b"], idle, 1.0) == ("b", "a")
        shelf.failed("b", RuntimeError(), 2.0)
        assert shelf.first(wanted, 2.5) is None
        assert shelf.next(wanted, idle, 3.0) == (comes, None)
        shelf.loaded(comes, 4.0)
        assert shelf.next([], idle, 5.0) is None
