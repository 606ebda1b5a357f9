"""Where the trainer's adapters live: on the device while they train, in pinned host memory and on disk while they wait.

D elements of one adapter. What an adapter must keep is fp32 [3, D]: master weights, first and second moments; and a gradient
[D] while it holds one. The model's weights are the master, rounded; they exist on the device alone.

    device  <- hold(names) brings them here, and pins them until its block ends
      |  the least recently used that nobody holds makes way when there are more than `device_capacity`
    host       pinned, so that a copy runs at the speed of the bus; of one that never was on the device, its master, as it came
      |  ... more than `host_capacity`
    disk       one safetensors file each

A move changes no bit. It is finished at its destination before its source lets go: a full disk loses nothing.
Several threads may hold adapters at once; who may change an adapter that two hold is for them to settle.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass
class Slabs:
    """One adapter on the device. `gradient` is the trainer's to make and to let go."""

    state: Tensor  # fp32 [3, D]: master, exp_avg, exp_avg_sq
    weights: Tensor  # [D], of the model's type; the master itself where that is fp32
    gradient: Tensor | None = None  # fp32 [D]

    @property
    def master(self) -> Tensor:
        return self.state[0]

    @property
    def exp_avg(self) -> Tensor:
        return self.state[1]

    @property
    def exp_avg_sq(self) -> Tensor:
        return self.state[2]

    def replace_state(self, state: Tensor) -> None:
        """Take other masters and moments, fp32 [3, D]; a gradient goes."""
        assert state.shape == self.state.shape, f"state of shape {tuple(state.shape)}, not {tuple(self.state.shape)}"
        self.state.copy_(state)
        if self.weights.data_ptr() != self.state.data_ptr():
            self.weights.copy_(self.master)
        self.gradient = None


@dataclass(frozen=True)
class StoreStatistics:
    """Adapters by tier, gradients that exist, bytes moved up to the device and down from it since the start."""

    device: int
    host: int
    disk: int
    gradients: int
    bytes_up: int
    bytes_down: int


Parked = dict[str, Tensor]  # "state", and "gradient" where there is one; or "master" alone, of one that never was held


class AdapterStore:
    """Every adapter of one trainer."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, device_capacity: int, host_capacity: int, folder: Path
    ) -> None:
        """dtype: of the model's weights. folder: of the disk tier; made when it is first needed."""
        self.device_capacity = device_capacity
        self._device, self._dtype, self._host_capacity, self._folder = device, dtype, host_capacity, folder
        self._on_device: OrderedDict[str, Slabs] = OrderedDict()  # least recently used first
        self._on_host: OrderedDict[str, Parked] = OrderedDict()
        self._on_disk: dict[str, Path] = {}
        self._pins: dict[str, int] = {}
        self._bytes_up = self._bytes_down = 0
        self._moving = threading.RLock()  # held while adapters change places, never while a block has them

    def __contains__(self, name: str) -> bool:
        return name in self._on_device or name in self._on_host or name in self._on_disk

    def add(self, name: str, master: Tensor) -> None:
        """A new adapter, master fp32 [D], moments zero. The master alone waits, as it came, until it is first held: to pin host
        memory for the whole takes longer than a training step, and holds up what else asks the driver.

        Raises OSError or SafetensorError when the tiers are full and the disk is too: then nothing of it is here.
        """
        own = master.clone()
        with self._moving:
            assert name not in self, f"adapter {name!r} is in the store already"
            self._on_host[name] = {"master": own}
            try:
                self._trim_host()
            except BaseException:  # no room on the disk
                del self._on_host[name]  # where it still is: it is the last to go down
                raise

    def drop(self, name: str) -> None:
        """Forget it, wherever it is. It must not be held."""
        with self._moving:
            assert name in self and name not in self._pins, f"adapter {name!r} cannot be dropped: held, or not in the store"
            self._on_device.pop(name, None)
            self._on_host.pop(name, None)
            path = self._on_disk.pop(name, None)
        if path is not None:
            path.unlink()

    @contextmanager
    def hold(self, names: Sequence[str]) -> Iterator[list[Slabs]]:
        """The slabs of these adapters, on the device until the block ends. At most `device_capacity` names; while several
        blocks together hold more, the device has that many."""
        assert len(names) <= self.device_capacity, f"{len(names)} adapters at once, room for {self.device_capacity}"
        with self._moving:
            for name in names:
                self._pins[name] = self._pins.get(name, 0) + 1
        try:
            with self._moving:
                held = [self._lift(name) for name in names]
            yield held
        finally:
            with self._moving:
                for name in names:
                    self._pins[name] -= 1
                    if not self._pins[name]:
                        del self._pins[name]
                self._trim_device()

    def statistics(self) -> StoreStatistics:
        """Never waits for a move, so an adapter on its way may be counted twice."""
        held = [slabs.gradient for slabs in list(self._on_device.values())]
        parked = [tensors.get("gradient") for tensors in list(self._on_host.values())]
        gradients = sum(gradient is not None for gradient in held + parked)
        tiers = (len(self._on_device), len(self._on_host), len(self._on_disk))
        return StoreStatistics(*tiers, gradients, self._bytes_up, self._bytes_down)

    def _lift(self, name: str) -> Slabs:
        """To the device, as the most recently used."""
        if name not in self._on_device:
            on_disk = self._on_disk.get(name)
            parked = self._on_host[name] if on_disk is None else load_file(on_disk)
            state = self._state(parked)
            weights = state[0] if self._dtype == torch.float32 else state[0].to(self._dtype)
            gradient = parked.get("gradient")
            self._on_device[name] = Slabs(state, weights, None if gradient is None else gradient.to(self._device))
            if self._device.type == "cuda":  # this thread's stream rounds the weights, and those that read them wait for none
                torch.cuda.current_stream(self._device).synchronize()
            self._bytes_up += _nbytes(parked)
            self._on_host.pop(name, None)
            if on_disk is not None:
                del self._on_disk[name]
                on_disk.unlink()
            self._trim_device()
        self._on_device.move_to_end(name)
        return self._on_device[name]

    def _state(self, parked: Parked) -> Tensor:
        if "state" in parked:
            return parked["state"].to(self._device)
        master = parked["master"]
        state = torch.zeros(3, master.numel(), dtype=torch.float32, device=self._device)
        state[0].copy_(master)
        return state

    def _trim_device(self) -> None:
        while len(self._on_device) > self.device_capacity:
            name = next((name for name in self._on_device if name not in self._pins), None)
            if name is None:
                return
            slabs = self._on_device[name]
            parked = {"state": self._to_host(slabs.state)}
            if slabs.gradient is not None:
                parked["gradient"] = self._to_host(slabs.gradient)
            self._on_host[name] = parked
            del self._on_device[name]
            self._bytes_down += _nbytes(parked)
            self._trim_host()

    def _trim_host(self) -> None:
        while len(self._on_host) > self._host_capacity:
            name, parked = next(iter(self._on_host.items()))
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{name}.safetensors"
            save_file(parked, path)
            self._on_disk[name] = path
            del self._on_host[name]

    def _to_host(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor
        return self._host_empty(tuple(tensor.shape)).copy_(tensor)

    def _host_empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, pin_memory=self._device.type == "cuda")


def _nbytes(parked: Parked) -> int:
    return sum(tensor.nbytes for tensor in parked.values())
