"""One group of rollouts: its places on the samplers, in fair shares, and again where a sampler dies under it.

A prompt that kills its sampler kills what runs beside it. Groups that have seen several deaths go one at a time, so that the
guilty one alone comes to MAX_DEATHS, and its adapter alone is at fault.
"""

from __future__ import annotations

import asyncio
import contextlib

from weft.pipeline.adapter import Adapter
from weft.pipeline.interfaces import Samplers
from weft.pipeline.journal import Journal
from weft.pipeline.schedule import FairShare
from weft.transport.errors import AdapterFault, InstallError, PeerDiedError
from weft.transport.messages import Group

MAX_DEATHS = 5  # of samplers under one group: more are no accident
SUSPECT_DEATHS = 2  # under one group: chance gives it one, seldom two
HELD_OUT_TOLD = 4  # of an evaluation: its first prompts come with texts


class Rollouts:
    """Every adapter's, on one pool of samplers."""

    def __init__(self, samplers: Samplers, share: FairShare, journal: Journal) -> None:
        self._samplers = samplers
        self._share = share
        self._journal = journal
        self._suspects = asyncio.Lock()

    async def sample(
        self, adapter: Adapter, prompt_index: int, epoch: int = 0, held_out: bool = False, texts: bool = False
    ) -> Group | None:
        """One group under the version installed when its turn comes. None: the adapter is interrupted with the reason."""
        size, ticket = 1 if held_out else adapter.config.group_size, self._share.ticket()
        texts = texts or (held_out and prompt_index < HELD_OUT_TOLD)
        for deaths in range(MAX_DEATHS):
            alone = self._suspects if deaths >= SUSPECT_DEATHS else contextlib.nullcontext()
            async with alone, self._share.places(adapter.name, size, ticket) as seat:
                began = self._journal.now()
                assert adapter.installed is not None
                try:
                    group = await self._samplers.rollout(adapter.installed, prompt_index, size, held_out, seat, epoch, texts)
                except PeerDiedError as error:
                    died = error
                except (AdapterFault, InstallError) as fault:
                    adapter.interrupt(fault)
                    return None
                else:
                    self._journal.group_sampled(adapter, group, began, held_out)
                    return group
            if deaths + 1 >= SUSPECT_DEATHS:
                await self._samplers.wait_ready()  # so that a guilty one takes them down one at a time
        adapter.interrupt(AdapterFault(f"{adapter.name}: {MAX_DEATHS} samplers died of prompt {prompt_index}: {died}"))
        return None
