"""An adapter's life in the trainer: made, saved, loaded, published, exported, dropped."""

import errno
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from weft.actors.canary import canary_allowance, canary_tokens
from weft.actors.checksum import checksum
from weft.actors.lora import init_pairs
from weft.actors.peft_folder import read_peft_folder
from weft.actors.slab_ipc import Boxes, Taker
from weft.actors.trainer_state import naming_folder
from weft.configs.expand import to_mapping
from weft.configs.schema import AdapterConfig, LoraConfig, LossConfig, OptimizerConfig
from weft.transport import messages
from weft.transport.errors import AdapterFault, CheckpointError, VersionError
from weft.transport.messages import UNSAMPLED, AdapterRef, TrainBatch

torch.set_num_threads(1)
ONE = AdapterConfig(name="one", optimizer=OptimizerConfig(learning_rate=1e-2))
TWO = AdapterConfig(
    name="two",
    lora=LoraConfig(rank=3, alpha=7.0, target_modules=("q_proj", "down_proj")),
    optimizer=OptimizerConfig(learning_rate=3e-3, betas=(0.8, 0.99), weight_decay=0.1),
    loss=LossConfig(name="gspo", kl_coefficient=0.1),
)
Make = Callable[..., Any]  # conftest.py: adapters' configurations -> Bench
MakeBatch = Callable[..., TrainBatch]


# ---- an adapter's life ----


def test_the_first_weights_are_pefts_and_the_same_in_every_run(make: Make) -> None:
    first, second = make(ONE, TWO), make(TWO, ONE)
    for config in (ONE, TWO):
        state = first.state(config.name)
        assert torch.equal(state, second.state(config.name))
        for a, b in first.trainer._adapters[config.name].layout.views(state[0]).values():
            bound = a.shape[1] ** -0.5  # kaiming uniform with a = sqrt(5)
            assert float(a.abs().max()) <= bound
            assert float(a.abs().max()) > 0.5 * bound
            assert not b.any()
    assert not torch.equal(first.state("one")[0][:8], first.state("two")[0][:8])


def test_an_adapter_for_whose_weights_there_is_no_room_is_refused_alone(make: Make, batch: MakeBatch) -> None:
    bench = make(ONE, TWO, device_adapters=1, host_adapters=1)
    bench.step(batch("one"))  # on the device; the other is on the host
    three = messages.AddAdapter(to_mapping(replace(TWO, name="three")))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # no file takes a byte more
    try:
        for _ in range(2):
            with pytest.raises(AdapterFault, match="three: making its weights raised .*File too large"):
                bench.ask(three)
        assert not bench.step(batch("one", 1))["one"].fault
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    bench.ask(three)
    assert not bench.step(batch("three"))["three"].fault


def test_adding_again_changes_nothing_and_a_new_lineage_starts_over(make: Make, batch: MakeBatch) -> None:
    bench = make(ONE)
    fresh = bench.state("one")
    bench.step(batch("one"))
    kept = bench.state("one")
    bench.ask(messages.AddAdapter(to_mapping(ONE)))
    assert torch.equal(bench.state("one"), kept)
    with pytest.raises(ValueError, match="here with other settings"):
        bench.ask(messages.AddAdapter(to_mapping(replace(ONE, num_steps=7))))
    bench.ask(messages.AddAdapter(to_mapping(ONE), lineage=1))
    assert torch.equal(bench.state("one"), fresh)
    assert bench.trainer._adapters["one"].ref == AdapterRef("one", 1, 0)


def test_an_adapter_that_cannot_be_is_refused_and_leaves_nothing(make: Make, tmp_path: Path) -> None:
    bench = make()
    for lora, text in (
        (LoraConfig(target_modules=("w_proj",)), "target_modules='w_proj'.*q_proj, k_proj"),
        (LoraConfig(warm_start=str(tmp_path / "nowhere")), "nowhere: adapter_config.json cannot be read"),
    ):
        with pytest.raises(AdapterFault, match=text):  # its own alone: what is no AdapterFault ends the run
            bench.ask(messages.AddAdapter(to_mapping(AdapterConfig(name="bad", lora=lora))))
    assert bench.ask(messages.GetStatistics()).adapters == {"device": 0, "host": 0, "disk": 0}


def test_a_dropped_adapter_is_gone(make: Make, batch: MakeBatch) -> None:
    bench = make(ONE, TWO)
    bench.ask(messages.DropAdapter("one"))
    bench.ask(messages.DropAdapter("one"))
    with pytest.raises(ValueError, match="'one' is not in this trainer, which has \\['two'\\]"):
        bench.ask(messages.Save(AdapterRef("one", 0, 0), "/nowhere"))
    assert "not in this trainer" in bench.step(batch("one"), batch("two"))["one"].fault


# ---- weights out and in ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_after_save_and_load_equals_one_without_to_the_bit(
    make: Make, tmp_path: Path, dtype: str, batch: MakeBatch
) -> None:
    bench, other = make(ONE, TWO, dtype=dtype), make(ONE, TWO, dtype=dtype)
    for version in range(3):
        bench.step(batch("two", version), batch("one", version))
    saved = bench.ask(messages.Save(AdapterRef("two", 0, 3), str(tmp_path / "saved")))
    assert set(saved.checksums) == {path.name for path in (tmp_path / "saved").iterdir()}
    other.ask(messages.ForwardBackward((batch("two", 0),)))  # a gradient that must not survive the load
    other.ask(messages.Load(AdapterRef("two", 4, 3), str(tmp_path / "saved")))
    assert torch.equal(other.state("two"), bench.state("two"))
    left = bench.step(batch("two", 3))["two"]
    right = other.step(replace(batch("two", 3), ref=AdapterRef("two", 4, 3)))["two"]
    assert right.ref == AdapterRef("two", 4, 4)
    assert left.metrics == right.metrics
    assert torch.equal(other.state("two"), bench.state("two"))


def test_a_checkpoint_that_is_altered_or_of_another_shape_changes_nothing(make: Make, tmp_path: Path) -> None:
    bench = make(ONE, TWO)
    bench.ask(messages.Save(AdapterRef("two", 0, 0), str(tmp_path)))
    kept = bench.state("one")
    with pytest.raises(ValueError, match="rank=3 there, 8 here"):
        bench.ask(messages.Load(AdapterRef("one", 1, 0), str(tmp_path)))
    with pytest.raises(ValueError, match="version=0 there, 9 here"):
        bench.ask(messages.Load(AdapterRef("two", 1, 9), str(tmp_path)))
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for cut in (len(whole) - 1, 40, 0):
        file.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="cut short or altered"):
            bench.ask(messages.Load(AdapterRef("two", 1, 0), str(tmp_path)))
    file.unlink()
    with pytest.raises(CheckpointError):
        bench.ask(messages.Load(AdapterRef("two", 1, 0), str(tmp_path)))
    assert torch.equal(bench.state("one"), kept)
    assert bench.trainer._adapters["two"].ref == AdapterRef("two", 0, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_published_slab_is_the_weights_of_that_version(make: Make, dtype: str, batch: MakeBatch) -> None:
    bench = make(ONE, TWO, dtype=dtype)
    first = bench.ask(messages.Publish(AdapterRef("two", 0, 0)))
    assert first.canary_logprob is None, "its weights do not wait for it"
    bench.step(batch("two"))
    with pytest.raises(VersionError, match="two/0/0 is asked for, the trainer has two/0/1"):
        bench.ask(messages.Publish(AdapterRef("two", 0, 0)))
    handle = bench.ask(messages.Publish(AdapterRef("two", 0, 1)))
    slab = torch.frombuffer(bytearray(Path(handle.path).read_bytes()), dtype=getattr(torch, dtype))
    assert torch.equal(slab, bench.state("two")[0].to(slab.dtype))
    assert handle.checksum == int(checksum(torch.from_numpy(np.fromfile(handle.path, np.uint8))))
    assert (handle.nbytes, handle.rank, handle.scale) == (slab.nbytes, 3, pytest.approx(7 / 3))
    assert handle.modules == bench.trainer._adapters["two"].layout.modules
    assert handle.base_logprob == first.base_logprob
    again = bench.ask(messages.Publish(AdapterRef("two", 0, 1)))
    assert again.path != handle.path  # whoever takes the first removes its own file
    assert not list(Path(handle.path).parent.glob("*.part"))


def test_where_slabs_stay_on_the_device_a_step_brings_its_versions_slab_and_one_that_is_not_taken_brings_none(
    make: Make, batch: MakeBatch
) -> None:
    bench, buffers = make(ONE, TWO), list[torch.Tensor]()

    def export(buffer: torch.Tensor) -> list[int]:
        buffers.append(buffer)
        return [len(buffers) - 1]

    taker = Taker(lambda address: buffers[address[0]])
    assert bench.step(batch("one"))["one"].slab is None, "a file costs the step its time"
    bench.trainer._outgoing._boxes = Boxes(torch.device("cpu"), export)
    bad = batch("one", 1)
    bad.advantages[0] = np.nan
    results = bench.step(bad, batch("two"))
    assert results["one"].fault and results["one"].slab is None
    slab = results["two"].slab
    assert slab.ref == AdapterRef("two", 0, 1) and slab.on_device and slab.canary_logprob is None
    came = taker.take(Path(slab.path), slab.nbytes)
    assert torch.equal(came.view(torch.float32), bench.state("two")[0]) and int(checksum(came)) == slab.checksum
    unasked = bench.step(batch("two", 1))["two"].slab
    again = bench.ask(messages.Publish(AdapterRef("two", 0, 2)))
    assert again.path != unasked.path and not Path(unasked.path).exists(), "nobody came for that one"
    bench.ask(messages.DropAdapter("two"))
    assert not Path(again.path).exists() and bench.step(batch("one", 1))["one"].slab is not None
    assert len(buffers) == 2, "of two sizes: what has left gives its box back"
    (result,) = bench.ask(messages.ForwardBackward((batch("one", 2),))).results
    assert result.slab is None


def test_a_slab_that_cannot_be_handed_over_with_the_step_and_those_of_many_are_asked_for(
    make: Make, batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(ONE, TWO, replace(ONE, name="three"))
    bench.trainer._outgoing._boxes = Boxes(torch.device("cpu"), lambda buffer: [0])
    together = bench.step(*map(batch, ("one", "two", "three")))
    assert not any(result.slab for result in together.values()), "each would wait for all"
    put, faults = Boxes.put, [torch.OutOfMemoryError("no room for a box"), OSError("no room for its file")]

    def fail(*arguments: Any) -> None:
        raise faults.pop()

    monkeypatch.setattr(Boxes, "put", fail)
    for version in (1, 2):
        result = bench.step(batch("one", version))["one"]
        assert result.slab is None and result.ref.version == version + 1 and not result.fault, "the step has been taken"
    monkeypatch.setattr(Boxes, "put", put)
    assert bench.ask(messages.Publish(AdapterRef("one", 0, 3))).on_device


@pytest.mark.parametrize("on_device", [False, True])
def test_a_slab_whose_file_finds_no_room_leaves_nothing_and_may_be_asked_for_again(make: Make, on_device: bool) -> None:
    bench = make(ONE)
    if on_device:
        bench.trainer._outgoing._boxes = Boxes(torch.device("cpu"), lambda buffer: [0])
    folder, before = bench.trainer._outgoing._folder, resource.getrlimit(resource.RLIMIT_FSIZE)
    for _ in range(2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # no file takes a byte more
        try:
            with pytest.raises(OSError):
                bench.ask(messages.Publish(AdapterRef("one", 0, 0)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list(folder.iterdir())
    handle = bench.ask(messages.Publish(AdapterRef("one", 0, 0)))
    assert list(folder.iterdir()) == [Path(handle.path)]


@pytest.mark.parametrize("ask", [messages.Save, messages.Export])
def test_a_disk_without_room_is_an_os_error_that_names_the_folder_and_leaves_what_was_there(
    make: Make, tmp_path: Path, ask: type
) -> None:
    bench, before = make(ONE), resource.getrlimit(resource.RLIMIT_FSIZE)
    bench.ask(messages.Save(AdapterRef("one", 0, 0), str(tmp_path / "first")))
    (tmp_path / "next").mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # no file takes a byte more
    try:
        with pytest.raises(OSError) as caught:
            bench.ask(ask(AdapterRef("one", 0, 0), str(tmp_path / "next")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "next"))
    assert not list((tmp_path / "next").glob("*.safetensors"))
    bench.ask(messages.Load(AdapterRef("one", 1, 0), str(tmp_path / "first")))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("I/O error: Read-only file system (os error 30)", errno.EROFS),
        ("No space left on device", errno.ENOSPC),
    ],
)
def test_what_the_disk_refused_is_known_by_its_number_and_what_it_did_not_refuse_stays_as_it_is(text: str, number: int) -> None:
    with pytest.raises(OSError) as caught, naming_folder(Path("/full")):
        raise SafetensorError(text)
    assert (caught.value.errno, caught.value.strerror, caught.value.filename) == (number, os.strerror(number), "/full")
    with pytest.raises(SafetensorError), naming_folder(Path("/full")):
        raise SafetensorError("Error while serializing: the tensor has another size")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_canarys_noise_is_roundings_alone(make: Make, dtype: str, batch: MakeBatch) -> None:
    bench = make(ONE, TWO, dtype=dtype)
    bench.perturb("two")
    canary, closely = (bench.ask(messages.AskCanary(AdapterRef("two", 0, 0), closely)) for closely in (False, True))
    assert canary.noise == 0.0 and closely.logprob == canary.logprob
    if dtype == "float32":
        assert closely.noise == 0.0
    else:
        exact = make(ONE, TWO)
        exact.perturb("two")
        rounding = abs(canary.logprob - exact.ask(messages.AskCanary(AdapterRef("two", 0, 0))).logprob)
        assert 0.0 < closely.noise < canary_allowance("bfloat16")
        assert rounding < canary_allowance("bfloat16", closely.noise, 1e9)


def test_a_canary_is_of_exactly_the_version_that_is_asked_for(make: Make, batch: MakeBatch) -> None:
    bench, tokens = make(ONE, TWO), np.array(canary_tokens(61), np.int32)
    scored, count = np.arange(len(tokens)) > 0, len(tokens) - 1

    def ask(name: str, version: int) -> float:
        canary = bench.ask(messages.AskCanary(AdapterRef(name, 0, version)))
        assert canary.ref == AdapterRef(name, 0, version)
        return float(canary.logprob)

    def scored_as(name: str, version: int) -> float:
        ref, none = AdapterRef(name, 0, version), np.zeros(len(tokens), np.float32)
        ends, one = np.array([0, len(tokens)], np.int32), np.zeros(1, np.int32)
        row = messages.TrainBatch(
            ref, tokens, ends, scored, none, np.where(scored, version, UNSAMPLED), one.astype(np.float32), one, count, 1
        )
        return float(bench.ask(messages.Score(row)).logprobs.sum())

    base = bench.ask(messages.Publish(AdapterRef("two", 0, 0))).base_logprob
    assert ask("two", 0) == pytest.approx(base, abs=1e-6)
    for version in (1, 2):
        bench.step(batch("two", version - 1))
        assert ask("two", version) == pytest.approx(scored_as("two", version), abs=1e-3) != ask("one", 0)
        with pytest.raises(VersionError, match=f"two/0/{version - 1} is not here any more"):
            ask("two", version - 1)
    assert ask("one", 0) == pytest.approx(base, abs=1e-6)
    with pytest.raises(VersionError, match="three/0/0"):
        ask("three", 0)


def test_an_exported_folder_holds_the_weights_and_starts_another_adapter(make: Make, tmp_path: Path, batch: MakeBatch) -> None:
    bench = make(ONE, TWO)
    bench.step(batch("two"))
    bench.ask(messages.Export(AdapterRef("two", 0, 1), str(tmp_path / "peft")))
    layout = bench.trainer._adapters["two"].layout
    assert torch.equal(read_peft_folder(tmp_path / "peft", layout, 7.0), bench.state("two")[0])
    warm = replace(TWO, name="warm", lora=replace(TWO.lora, warm_start=str(tmp_path / "peft")))
    bench.ask(messages.AddAdapter(to_mapping(warm)))
    assert torch.equal(bench.state("warm")[0], bench.state("two")[0])
    assert not bench.state("warm")[1:].any()
    blank = torch.empty(layout.numel)
    init_pairs(layout, blank, torch.Generator().manual_seed(0))
    assert not torch.equal(blank, bench.state("warm")[0])
