"""When an adapter should live on another trainer: what has waited beside idle ones, and what a move costs.

An adapter joins where the fewest are. That becomes uneven when some have ended, or where some train for longer: then batches
wait for the launch of one trainer while another has none. What a home has lost so is its regret, in seconds; when it has come
to PATIENCE moves, the next of its adapters that would wait moves to the idle trainer instead. So moves take at most one
PATIENCEth of what was lost before them, and two trainers that are equally busy exchange nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

PATIENCE = 10.0
KEPT = 64  # homes whose regret is remembered: those of trainers that have died are never heard of again
FIRST_MOVE_S = 1.0  # what a move is taken to cost before one was made


class Balance:
    """Bookkeeping; nothing here waits."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since, self._idle, self._idle_seconds = clock(), True, 0.0
        self._regret: dict[Hashable, float] = {}
        self._move_seconds = FIRST_MOVE_S

    def set_idle(self, idle: bool) -> None:
        """Whether some trainer has nothing to do from now on."""
        self._idle_seconds, self._since, self._idle = self.idle_seconds, self._clock(), idle

    @property
    def idle_seconds(self) -> float:
        """How long some trainer has had nothing to do."""
        return self._idle_seconds + (self._clock() - self._since if self._idle else 0.0)

    def note_wait(self, home: Hashable, seconds: float) -> None:
        """A batch was launched at this home that had waited so long while another trainer was idle. What is done without such
        a wait is forgiven the home, half of its regret at a time."""
        regret = self._regret.pop(home, 0.0)
        self._regret[home] = regret + seconds if seconds > 0 else regret / 2
        if len(self._regret) > KEPT:
            del self._regret[next(iter(self._regret))]

    def asks_for_move(self, home: Hashable) -> bool:
        """Whether an adapter that would wait here should move. Once: the regret is gone with the question."""
        asks = self._regret.get(home, 0.0) >= PATIENCE * self._move_seconds
        if asks:
            self._regret.pop(home, None)
        return asks

    def note_move(self, seconds: float) -> None:
        """What one has cost."""
        self._move_seconds = seconds
