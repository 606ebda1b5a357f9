"""Leases: who may name a version, how long it stays, how many there are."""

from __future__ import annotations

import random

import pytest

from weft.actors.leases import Lease, Leases
from weft.transport.errors import InstallError
from weft.transport.messages import AdapterRef


def ref(version: int, name: str = "a", lineage: int = 0) -> AdapterRef:
    return AdapterRef(name, lineage, version)


def install(leases: Leases, *refs: AdapterRef) -> None:
    for item in refs:
        leases.publish(leases.reserve(item, leases.new_id()))


def removed(leases: Leases) -> list[AdapterRef]:
    """What is removable, which then is forgotten."""
    found = []
    while (version := leases.next_removable()) is not None:
        leases.forget(version)
        found.append(version.ref)
    return found


def test_a_lease_keeps_its_version_until_it_ends() -> None:
    leases = Leases(4)
    install(leases, ref(0), ref(1))
    lease = leases.acquire(ref(0))
    leases.retire(ref(0))
    assert leases.next_removable() is None
    assert lease.version.ref == ref(0)
    leases.release(lease)
    assert removed(leases) == [ref(0)]


def test_a_removable_version_is_handed_out_until_it_is_forgotten_and_holds_its_place() -> None:
    leases = Leases(1)
    install(leases, ref(0))
    leases.retire(ref(0))
    version = leases.next_removable()
    assert version is not None
    assert leases.next_removable() is version, "a removal that was cut short is done again"
    with pytest.raises(InstallError):
        leases.reserve(ref(1), leases.new_id())
    leases.forget(version)
    assert leases.next_removable() is None
    install(leases, ref(1))


def test_a_version_whose_install_is_given_up_is_removable_and_never_comes_back() -> None:
    leases = Leases(1)
    version = leases.reserve(ref(0), leases.new_id())
    assert leases.next_removable() is None and not leases.restore(ref(0))
    leases.give_up(version)
    assert not leases.restore(ref(0))
    with pytest.raises(InstallError):
        leases.acquire(ref(0))
    assert removed(leases) == [ref(0)]


def test_a_retired_version_gives_way_to_the_newest_of_its_lineage_alone() -> None:
    leases = Leases(8)
    install(leases, ref(1), ref(3), ref(2), ref(9, lineage=1), ref(9, name="b"))
    leases.retire(ref(1))
    assert leases.acquire(ref(1)).version.ref == ref(3)
    with pytest.raises(InstallError, match="a/2/0"):
        leases.acquire(ref(0, lineage=2))


def test_no_lease_is_older_than_what_was_asked_for() -> None:
    leases = Leases(8)
    install(leases, ref(1), ref(2))
    with pytest.raises(InstallError, match="a/0/3: neither it nor a later version of its lineage is installed here"):
        leases.acquire(ref(3))
    leases.retire(ref(2))
    with pytest.raises(InstallError, match="a/0/2"):
        leases.acquire(ref(2))


def test_a_reserved_version_is_nobodys_before_it_is_published() -> None:
    leases = Leases(2)
    version = leases.reserve(ref(0), leases.new_id())
    assert not leases.holds(ref(0)) and leases.next_removable() is None
    with pytest.raises(InstallError):
        leases.acquire(ref(0))
    leases.publish(version)
    assert leases.holds(ref(0))


def test_a_version_whose_adapter_leaves_while_it_is_installed_is_never_offered_and_its_place_is_free() -> None:
    leases = Leases(3)
    install(leases, ref(0))
    version, other = [leases.reserve(ref(1, name), leases.new_id()) for name in "ab"]
    leases.retire_all("a")
    assert removed(leases) == [ref(0)], "the engine is at work on the other one"
    leases.publish(version)
    leases.publish(other)
    assert not leases.holds(version.ref) and leases.holds(other.ref)
    with pytest.raises(InstallError):
        leases.acquire(version.ref)
    assert removed(leases) == [version.ref] and leases.live == (other.ref,)


def test_ids_are_never_reused() -> None:
    leases = Leases(1)
    seen = set()
    for number in range(50):
        version = leases.reserve(ref(number % 3), leases.new_id())
        leases.publish(version)
        seen.add(version.lora_id)
        leases.retire(version.ref)
        assert removed(leases) == [version.ref]
    assert len(seen) == 50 and min(seen) >= 1


def test_too_many_versions_are_refused_with_both_numbers() -> None:
    leases = Leases(2)
    install(leases, ref(0), ref(1))
    with pytest.raises(InstallError, match="2 versions are live and max_live_versions is 2"):
        leases.reserve(ref(2), leases.new_id())


def test_renewing_moves_the_lease_to_the_newest_and_frees_the_old() -> None:
    leases = Leases(3)
    install(leases, ref(0))
    lease = leases.acquire(ref(0))
    assert leases.renew(lease) == ref(0)
    install(leases, ref(1))
    leases.retire(ref(0))
    assert leases.renew(lease) == ref(1)
    assert removed(leases) == [ref(0)]


def test_renewing_never_moves_back() -> None:
    leases = Leases(3)
    install(leases, ref(0), ref(1))
    lease = leases.acquire(ref(1))
    leases.retire(ref(1))
    assert leases.renew(lease) == ref(1)


def test_a_retirement_is_taken_back_only_while_the_engine_still_holds_the_version() -> None:
    leases = Leases(2)
    assert not leases.restore(ref(0))
    install(leases, ref(0))
    lease = leases.acquire(ref(0))
    leases.retire(ref(0))
    assert leases.restore(ref(0)) and leases.holds(ref(0))
    leases.retire(ref(0))
    leases.release(lease)
    leases.next_removable()
    assert not leases.restore(ref(0))


@pytest.mark.parametrize("seed", range(50))
def test_no_leased_version_ever_goes_and_the_limit_always_holds(seed: int) -> None:
    rng = random.Random(seed)
    leases, held, newest = Leases(3), list[Lease](), 0
    install(leases, ref(0))
    for _ in range(300):
        action = rng.randrange(5)
        if action == 0:
            held.append(leases.acquire(ref(newest)))
        elif action == 1 and held:
            leases.release(held.pop(rng.randrange(len(held))))
        elif action == 2 and held:
            leases.renew(rng.choice(held))
        elif action == 3 and len(leases.live) < 3:
            newest += 1
            install(leases, ref(newest))
            leases.retire(ref(newest - 1))
        removed(leases)
        assert len(leases.live) <= 3
        assert {lease.version.ref for lease in held} <= set(leases.live)
        assert leases.holds(ref(newest))
