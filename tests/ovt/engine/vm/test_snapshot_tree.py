"""Snapshots as a tree: pure records and decisions."""

import json
from typing import Any

import pytest

from ovt.engine.vm.snapshot_tree import Snapshot, Tree, above, draw, merged, merges, unpack, unused, written
from ovt.errors import Conflict, NotFound, OvtError, UsageError


def hardware(*paths: str, **members: Any) -> dict[str, Any]:
    chain = [{"path": path, "format": "raw" if path.startswith("/") else "qcow2"} for path in paths]
    return {"disks": [{"id": "root", "device": "disk", "chain": chain, **members}]}


def chain(packed: dict[str, Any]) -> list[str]:
    return [entry["path"] for entry in packed["disks"][0]["chain"]]


A = Snapshot(1, "a", 0, 1.0, hardware=hardware("/base", "f0"))
B = Snapshot(2, "b", 1, 2.0, hardware=hardware("/base", "f0", "f1"))
C = Snapshot(3, "c", 1, 3.0, hardware=hardware("/base", "f0", "f2"))
FORK = Tree((A, B, C), 3, 4)  # b and c after a; the present state after c
NOW = hardware("/base", "f0", "f2", "f3")


def test_what_is_packed_comes_back() -> None:
    tree = FORK._replace(garbage=("old",), pending={"verb": "create"})
    assert unpack(json.loads(json.dumps(tree.pack()))) == tree


def test_records_of_a_later_version_and_damaged_ones_are_told_apart() -> None:
    with pytest.raises(OvtError, match="layout 99"):
        unpack({**FORK.pack(), "layout": 99})
    with pytest.raises(ValueError, match=r"not there: \[7\]"):
        unpack({**FORK.pack(), "current": 7})


def test_names() -> None:
    assert FORK.new_name() == "snap1"
    assert FORK.new_name("d") == "d"
    with pytest.raises(Conflict, match="'a'"):
        FORK.new_name("a")
    for bad in ("", "/", "a/b", ".x", "x" * 65, "a b"):
        if bad:
            with pytest.raises(UsageError):
                FORK.new_name(bad)
    with pytest.raises(NotFound) as caught:
        FORK.find("z")
    assert "a, b, c" in caught.value.hint


def test_a_new_snapshot_is_the_current_one() -> None:
    tree = FORK.add(Snapshot(4, "d", 3))
    assert tree.current == 4
    assert [entry.name for entry in tree.children(3)] == ["d"]


def test_children_of_a_deleted_snapshot_follow_its_parent() -> None:
    tree = FORK.without(1)
    assert {entry.name: entry.parent for entry in tree.snapshots} == {"b": 0, "c": 0}
    assert FORK.without(3).current == 1


def test_a_snapshot_that_clones_stand_on_is_not_deleted() -> None:
    tree = FORK.put(B._replace(dependants={"0" * 12: "copy"}))
    with pytest.raises(Conflict, match="copy"):
        tree.without(2)


def test_every_written_disk_goes_on_above() -> None:
    new, entries = above(hardware("/base", "f0"), 5)
    assert chain(new) == ["/base", "f0", "disks/root.s5.qcow2"]
    assert entries["root"]["path"] == "disks/root.s5.qcow2"
    assert written(hardware("/cd", device="cdrom")) == written(hardware("/ro", readonly=True)) == []


def test_nothing_is_merged_as_long_as_two_branches_need_it() -> None:
    assert merges(FORK, NOW) == []
    assert merges(FORK.without(1), NOW) == []  # f0 has no name any more, and b and c stand on it


def test_a_file_that_one_other_stands_on_is_merged_with_it() -> None:
    tree = FORK.without(1).without(2)
    assert unused((FORK.without(1), NOW), (tree, NOW)) == ["f1"]
    (merge,) = merges(tree, NOW)
    assert (merge.lower["path"], merge.upper["path"]) == ("f0", "f2")
    after, now = merged(tree, NOW, merge, merge.upper)
    assert chain(now) == ["/base", "f2", "f3"]
    assert chain(after.find("c").hardware) == ["/base", "f2"]
    assert chain(NOW) == ["/base", "f0", "f2", "f3"]  # the arguments are as before
    after, now = merged(tree, NOW, merge, merge.lower)
    assert chain(now) == ["/base", "f0", "f3"]
    assert merges(after, now) == []


def test_the_base_image_is_never_merged_unless_the_machine_wrote_to_it() -> None:
    now, _ = above(hardware("/image"), 1)
    assert merges(Tree(), now)[0].lower == {"path": "/image", "format": "raw", "direct": True}
    assert merges(Tree(), hardware("/base", "f0")) == []


def test_what_a_linked_clone_stands_on_stays() -> None:
    tree = FORK.without(2).put(C._replace(dependants={"0" * 12: "copy"})).without(1)
    assert merges(tree, NOW) == []


def test_the_picture() -> None:
    label = {0: "now", 1: "a", 2: "b", 3: "c"}
    assert draw(FORK, label) == ["└─ a", "   ├─ b", "   └─ c", "      └─ now"]
    assert draw(FORK._replace(current=1), label) == ["└─ a", "   ├─ b", "   ├─ c", "   └─ now"]
    assert draw(Tree(), label) == ["└─ now"]
