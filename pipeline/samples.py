"""samples.jsonl: rollouts as people read them. An observer of `events`, for the curve does not show how a reward was earned.

In `folder`, one line a rollout, appended, with the messages of the prompt and all since (tool outputs too, in order):
    of each optimizer step    the worst and the best rewarded rollout of the first of its groups (one, where none was better)
    of each evaluation        its first few held-out prompts (rollout.HELD_OUT_TOLD)
`step` is that of metrics.jsonl: the version after the step, or the one evaluated; `versions` are those that sampled it. As
there, what a rollback or a resume undoes stays in the file: of one step, the lines of the highest lineage count. A prompt or
completion of more than 20,000 characters says how many of its middle are left out (actors/transcript.py).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weft.pipeline.events import Event, SampleTold
from weft.pipeline.metrics import finite, open_lines

SAMPLES_FILE = "samples.jsonl"
_WHOLE = re.compile(rb'(\{"adapter":.*?),"lineage":.*,"at":[^"]*\}\n')  # within a text, quotation marks are escaped


class Samples:
    """The observer. No file is held open. What cannot be written is left out, and `warn` is called the first time.

    session: as in metrics.jsonl; clock: Unix seconds.
    """

    def __init__(
        self, folder: str | Path, session: int, warn: Callable[[str], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._path = Path(folder) / SAMPLES_FILE
        self._session = session
        self._warn = warn
        self._clock = clock
        self._whole = False  # whether what the file holds ends with a line's end
        self._warned = False

    def __call__(self, event: Event) -> None:
        if not isinstance(event, SampleTold):
            return
        line = json.dumps(finite(sample_line(event, self._session, self._clock())), separators=(",", ":")) + "\n"
        try:
            if not self._whole:
                open_lines(self._path).close()
            self._whole = False
            with self._path.open("ab") as file:
                file.write(line.encode())
            self._whole = True
        except OSError as error:
            if not self._warned:
                self._warn(f"{self._path} misses samples of rollouts: {error.strerror}")
            self._warned = True


def sample_line(event: SampleTold, session: int, at: float) -> dict[str, Any]:
    """One line of samples.jsonl. `newest_samples` knows its first field and its last."""
    told = event.transcript
    return {
        "adapter": event.adapter,
        "lineage": event.lineage,
        "step": event.version,
        "held_out": event.held_out,
        "versions": list(told.versions),
        "prompt_index": told.prompt_index,
        "reward": told.reward,
        "tokens": told.tokens,
        "turns": told.turns,
        "truncated": told.truncated,
        "prompt": list(told.prompt),
        "completion": list(told.completion),
        "session": session,
        "time": event.time,
        "at": at,
    }


def newest_samples(folder: str | Path) -> dict[str, Mapping[str, Any]]:
    """The last whole line of each adapter, which no later one undoes; nothing if there is no file. No other is parsed: there
    may be gigabytes."""
    path, newest = Path(folder) / SAMPLES_FILE, dict[bytes, bytes]()
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if (whole := _WHOLE.fullmatch(line)) is not None:
                    newest[whole[1]] = line
    lines = [json.loads(line) for line in newest.values()]
    return {line["adapter"]: line for line in lines}
