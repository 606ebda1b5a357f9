"""Which adapter versions a sampler holds, and who still uses them. Pure bookkeeping: the engine is not touched here.

    Install ──> live ──Retire──> retired ──last lease ends──> removable ──engine has let go──> forgotten

A rollout leases the version it starts on and keeps it (DESIGN law 4). Integer ids come from one counter and are never
reused: vLLM keys its adapters by them, and an id with a second meaning would load the wrong weights.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from weft.transport.errors import InstallError
from weft.transport.messages import AdapterRef


@dataclass
class Version:
    """One set of weights in the engine. lora_id: its number there; leases: rollouts that may still name it; retired: no new one
    may; installing: it has a place, and is nobody's yet; dropped: its adapter has left meanwhile; removing: the engine may have
    let go of it, so it never comes back."""

    ref: AdapterRef
    lora_id: int
    leases: int = 0
    retired: bool = False
    installing: bool = False
    dropped: bool = False
    removing: bool = False


@dataclass
class Lease:
    """One rollout's hold on a version. Owned by whoever called `Leases.acquire`, who must release it."""

    version: Version


class Leases:
    """Live versions of every adapter, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._versions: dict[AdapterRef, Version] = {}
        self._ids = itertools.count(1)

    @property
    def live(self) -> tuple[AdapterRef, ...]:
        """Every version that occupies a place, retired ones that are still leased among them."""
        return tuple(self._versions)

    def holds(self, ref: AdapterRef) -> bool:
        """New rollouts may name it."""
        version = self._versions.get(ref)
        return version is not None and not version.retired

    def new_id(self) -> int:
        """A number that no version had or will have."""
        return next(self._ids)

    def reserve(self, ref: AdapterRef, lora_id: int) -> Version:
        """A place for `ref`, which no rollout can name before `publish`; `publish` it or `give_up`. lora_id: of `new_id`.

        Raises InstallError when every place is taken.
        """
        if len(self._versions) >= self.limit:
            held = ", ".join(map(str, self._versions))
            raise InstallError(
                f"{ref}: {len(self._versions)} versions are live and max_live_versions is {self.limit}; live: {held}"
            )
        assert ref not in self._versions, f"{ref} has a place already"
        version = self._versions[ref] = Version(ref, lora_id, retired=True, installing=True)
        return version

    def publish(self, version: Version) -> None:
        """From here on new rollouts may name it; not one that was dropped, which stays retired and is removable now."""
        version.installing, version.retired = False, version.dropped

    def give_up(self, version: Version) -> None:
        """Its install has failed, and the engine may hold something of it: it is removable."""
        version.installing, version.removing = False, True

    def restore(self, ref: AdapterRef) -> bool:
        """Take back the retirement of a version that is still leased. False: the engine does not hold it (any more)."""
        version = self._versions.get(ref)
        if version is None or version.installing or version.removing:
            return False
        version.retired = False
        return True

    def acquire(self, ref: AdapterRef) -> Lease:
        """Lease `ref`, or the newest later version of its lineage if `ref` is offered no more. Raises InstallError if none is:
        an older one would be staler than whoever asks has counted on."""
        version = self._versions.get(ref)
        if version is None or version.retired:
            version = self._newest(ref)
        if version is None or version.ref.version < ref.version:
            held = ", ".join(str(v.ref) for v in self._versions.values() if not v.retired) or "nothing"
            raise InstallError(f"{ref}: neither it nor a later version of its lineage is installed here; installed: {held}")
        version.leases += 1
        return Lease(version)

    def renew(self, lease: Lease) -> AdapterRef:
        """Move the lease to the newest version of its lineage, if there is a newer one."""
        newest = self._newest(lease.version.ref)
        if newest is not None and newest.ref.version > lease.version.ref.version:
            lease.version.leases -= 1
            newest.leases += 1
            lease.version = newest
        return lease.version.ref

    def release(self, lease: Lease) -> None:
        """The rollout has ended; exactly once a lease."""
        lease.version.leases -= 1
        assert lease.version.leases >= 0, f"{lease.version.ref} was released more often than leased"

    def retire(self, ref: AdapterRef) -> None:
        """No new rollout gets it. Unknown versions are fine: a retirement may be told twice."""
        if ref in self._versions:
            self._versions[ref].retired = True

    def retire_all(self, name: str) -> None:
        """Retire every version of one adapter, which has left: one that is being installed is never offered."""
        for version in self._versions.values():
            if version.ref.name == name:
                version.retired, version.dropped = True, version.installing

    def next_removable(self) -> Version | None:
        """A retired version that nobody leases: remove it from the engine, then `forget` it.

        Until then it keeps its place, since the engine would otherwise be asked to hold one too many, and is handed out again,
        since a removal may be cut short.
        """
        version = next((v for v in self._versions.values() if v.retired and not v.leases and not v.installing), None)
        if version is not None:
            version.removing = True
        return version

    def forget(self, version: Version) -> None:
        """The engine has let go of it: its place is free."""
        del self._versions[version.ref]

    def _newest(self, ref: AdapterRef) -> Version | None:
        offered = [
            v for v in self._versions.values() if not v.retired and (v.ref.name, v.ref.lineage) == (ref.name, ref.lineage)
        ]
        return max(offered, key=lambda v: v.ref.version, default=None)
