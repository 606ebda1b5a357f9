"""What lets an adapter survive: where it begins (anew, resumed, rolled back), its checkpoints, its export.

Every call of the trainer here may raise PeerDiedError, which leaves the disk as it was: the next lineage begins from it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from weft.configs.schema import AdapterConfig, RunConfig
from weft.pipeline.adapter import Adapter, Progress
from weft.pipeline.checkpoint import Checkpoints, replace_folder, settle_folder
from weft.pipeline.events import CheckpointWritten, Phase
from weft.pipeline.interfaces import Trainers
from weft.pipeline.journal import Journal

KEEP = 2  # checkpoints of an adapter: the newest, and the one before it in case the newest was altered


class Recovery:
    """Of all adapters of one run."""

    def __init__(self, settings: RunConfig, trainers: Trainers, journal: Journal) -> None:
        self._folder = Path(settings.dir).absolute()  # a trainer has a working directory of its own
        self._trainers = trainers
        self._journal = journal

    def finished(self, config: AdapterConfig) -> Progress | None:
        """Where an earlier run took this adapter to its end, if one did. Its exported folder is in its place then."""
        settle_folder(self._exported(config.name))  # a kill may have left it aside
        return self._checkpoints(config.name).finished(config)

    async def begin_lineage(self, adapter: Adapter) -> None:
        """Put it on a trainer under a new lineage: from its newest checkpoint, or at version 0, which is checkpointed."""
        checkpoints = self._checkpoints(adapter.name)
        found, damaged = await asyncio.to_thread(checkpoints.newest)
        for line in damaged:
            self._journal.warn(adapter.name, line)
        lineage = await asyncio.to_thread(checkpoints.next_lineage)
        saved, before = found.progress if found else Progress(), adapter.progress
        ended = saved.version >= adapter.config.num_steps
        adapter.begin_lineage(
            dataclasses.replace(
                saved,
                lineage=lineage,
                rollbacks=max(saved.rollbacks, before.rollbacks),
                max_staleness_seen=max(saved.max_staleness_seen, before.max_staleness_seen),
                eval_base=before.eval_base if saved.eval_base is None else saved.eval_base,
                eval_final=before.eval_final if ended else None,
            )
        )
        await self._trainers.add(adapter.config, lineage)
        if found is None:
            await self.checkpoint(adapter)
        else:
            await self._trainers.load(adapter.ref, str(found.folder))
            adapter.checkpointed = adapter.version

    async def checkpoint(self, adapter: Adapter) -> None:
        """Make the adapter's present state one that survives `kill -9`; returns once it is on the disk."""
        self._journal.enter(adapter, Phase.CHECKPOINTING)
        began = self._journal.now()
        checkpoints = self._checkpoints(adapter.name)
        folder = await asyncio.to_thread(checkpoints.begin)
        saved = await self._trainers.save(adapter.ref, str(folder))
        path = await asyncio.to_thread(checkpoints.commit, adapter.config, adapter.progress, saved.checksums)
        adapter.checkpointed = adapter.version
        now = self._journal.now()
        self._journal.tell(CheckpointWritten(now, adapter.name, adapter.ref.lineage, adapter.version, str(path), now - began))

    async def export(self, adapter: Adapter) -> None:
        """Write the PEFT folder, and note that the adapter is done if it is."""
        self._journal.enter(adapter, Phase.EXPORTING)
        final = self._exported(adapter.name)
        written = final.with_name(f".{adapter.name}.writing")
        await asyncio.to_thread(_empty_folder, written)
        await self._trainers.export(adapter.ref, str(written))
        await asyncio.to_thread(replace_folder, written, final)
        adapter.progress = dataclasses.replace(adapter.progress, peft_path=str(final))
        if adapter.version >= adapter.config.num_steps:
            await asyncio.to_thread(self._checkpoints(adapter.name).finish, adapter.config, adapter.progress)

    def _exported(self, name: str) -> Path:
        return self._folder / "adapters" / name

    def _checkpoints(self, name: str) -> Checkpoints:
        return Checkpoints(str(self._folder), name, KEEP)


def _empty_folder(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def goes_on(adapters: Sequence[AdapterConfig], found: Mapping[str, int], width: int) -> str:
    """One line: from which step each adapter goes on. found: by name, the version of its newest checkpoint, if it has one.

    As many by name as `width` has room for; the others are counted.
    """
    steps = {adapter.name: found.get(adapter.name, 0) for adapter in adapters}
    through = sum(steps[adapter.name] >= adapter.num_steps for adapter in adapters)
    begun = [(adapter.name, steps[adapter.name]) for adapter in adapters if 0 < steps[adapter.name] < adapter.num_steps]
    anew = len(adapters) - through - len(begun)
    line = ""
    for shown in range(min(len(begun), width // len("x from step 1, ")), -1, -1):
        named = ", ".join(f"{name} from step {step}" for name, step in begun[:shown])
        rest = [step for _, step in begun[shown:]]
        span = f"steps {min(rest)} to {max(rest)}" if len({*rest}) > 1 else f"step {rest[0]}" if rest else ""
        counts = [(len(rest), f"{'more ' if shown else ''}from {span}"), (anew, "from step 0"), (through, "done")]
        counted = ", ".join(f"{number} {what}" for number, what in counts if number)
        line = f"goes on: {named} ({counted})" if named and counted else f"goes on: {named}{counted}"
        if len(line) <= width:
            break
    return line
