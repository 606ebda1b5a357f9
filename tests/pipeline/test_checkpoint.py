"""Checkpoints on the real disk: cut, altered, killed at any instant."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from weft.configs.schema import AdapterConfig, EnvironmentConfig, LoraConfig, OptimizerConfig
from weft.pipeline.adapter import Progress
from weft.pipeline.checkpoint import MANIFEST, PIPELINE, Checkpoints, check_resume, replace_folder, settle_folder, verify
from weft.transport.errors import CheckpointError

CONFIG = AdapterConfig(name="a", environment=EnvironmentConfig(settings={"digits": 3, "nested": {"x": [1, 2]}}))


def write(checkpoints, version, lineage=0, config=CONFIG):
    """A checkpoint whose tensors say which version they are."""
    folder = checkpoints.begin()
    data = f"weights {lineage} {version}".encode() * 50
    files = {"masters.bin": data, "moments/0.bin": data[::-1]}
    (folder / "moments").mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    progress = Progress(lineage=lineage, version=version, prompts=version * 8, rewards=tuple([0.1] * version))
    return checkpoints.commit(config, progress, sums)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(str(tmp_path), "a", keep=2)


def test_what_was_written_is_read_again(checkpoints):
    path = write(checkpoints, 5)
    found, said = checkpoints.newest()
    assert found.folder == path and not said
    assert found.progress == Progress(version=5, prompts=40, rewards=(0.1,) * 5)
    assert (path / "masters.bin").read_bytes().startswith(b"weights 0 5")


def test_the_newest_of_the_latest_lineage_counts_and_only_some_are_kept(checkpoints):
    for lineage, version in ((0, 5), (0, 10), (1, 5), (1, 6)):
        write(checkpoints, version, lineage)
    found, _ = checkpoints.newest()
    assert (found.progress.lineage, found.progress.version) == (1, 6)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["00001-00000005", "00001-00000006"]


def test_nothing_there_is_nothing_found(checkpoints):
    assert checkpoints.newest() == (None, [])
    assert checkpoints.saved_config() is None


@pytest.mark.parametrize("name", ["masters.bin", "moments/0.bin", MANIFEST, PIPELINE])
@pytest.mark.parametrize("damage", ["cut", "altered", "gone", "empty", "longer"])
def test_a_damaged_checkpoint_is_set_aside_and_said_and_the_one_before_is_used(checkpoints, name, damage):
    write(checkpoints, 5)
    path = write(checkpoints, 10) / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "gone":
        path.unlink()
    else:
        altered = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"cut": content[:middle], "altered": altered, "empty": b"", "longer": content + b"0"}[damage])
    found, said = checkpoints.newest()
    assert found.progress.version == 5
    assert len(said) == 1 and str(path) in said[0] and "the one before it is used" in said[0]
    assert checkpoints.newest()[1] == []  # said once
    write(checkpoints, 11, lineage=1)  # and it does not count among those kept
    assert (checkpoints.folder / "00000-00000005").exists()


def test_every_single_altered_byte_is_noticed(checkpoints):
    path = write(checkpoints, 1)
    chance = random.Random(0)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        content = file.read_bytes()
        for at in chance.sample(range(len(content)), 20):
            file.write_bytes(content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :])
            try:
                assert verify(path).progress == Progress(version=1, prompts=8, rewards=(0.1,))  # white space of ours, at most
                assert file.name in (MANIFEST, PIPELINE)
            except CheckpointError:
                pass
        file.write_bytes(content)
    verify(path)


def reseal(folder, file, change):
    """`change` the body of a sealed file of a checkpoint, and seal it and the checkpoint again, as another weft would have."""
    body = json.loads((folder / file).read_text())["body"]
    body = change(body) or body
    seal(folder / file, body)
    if file != MANIFEST:
        files = json.loads((folder / MANIFEST).read_text())["body"]
        data = (folder / file).read_bytes()
        files["files"][file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        seal(folder / MANIFEST, files)


def seal(path, body):
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"body": body, "sha256": digest}))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (PIPELINE, lambda body: body["progress"].update(mood="good")),
        (PIPELINE, lambda body: body["progress"].pop("rollbacks") and None),
        (PIPELINE, lambda body: body["progress"].pop("rewards") and None),
        (PIPELINE, lambda body: body["progress"].update(version="5")),
        (PIPELINE, lambda body: body["progress"].update(rewards=["high"])),
        (PIPELINE, lambda body: body["progress"].update(eval_base="high")),
        (PIPELINE, lambda body: body.update(progress=[5])),
        (PIPELINE, lambda body: body.pop("progress") and None),
        (PIPELINE, lambda body: body.pop("config") and None),
        (PIPELINE, lambda body: body.update(config=None)),
        (PIPELINE, lambda body: [body]),
        (MANIFEST, lambda body: body.pop("files") and None),
        (MANIFEST, lambda body: body["files"].update({"masters.bin": 3})),
        (MANIFEST, lambda body: body["files"]["masters.bin"].pop("sha256") and None),
    ],
)
def test_a_sealed_file_of_another_form_is_a_damaged_checkpoint(checkpoints, tmp_path, file, change):
    write(checkpoints, 4)
    folder = write(checkpoints, 5)
    reseal(folder, file, change)
    with pytest.raises(CheckpointError, match=str(folder / file)):
        verify(folder)
    check_resume(str(tmp_path), CONFIG)
    found, said = checkpoints.newest()
    assert found.progress.version == 4 and len(said) == 1


def test_a_sealed_file_of_another_form_loses_no_lineage_and_ends_no_adapter(checkpoints):
    assert checkpoints.next_lineage() == 0
    seal(checkpoints.folder / "lineage.json", {"line": 7})
    assert checkpoints.next_lineage() > 7
    checkpoints.finish(CONFIG, Progress(version=30))
    for body in ({}, {"progress": {"version": 30}}, 3):
        seal(checkpoints.folder / "finished.json", body)
        assert checkpoints.finished(CONFIG) is None


def test_brackets_without_end_are_an_altered_file(checkpoints):
    path = write(checkpoints, 5) / MANIFEST
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        checkpoints.newest()


def test_a_file_that_is_not_what_the_trainer_wrote_is_refused_and_the_older_stay(checkpoints):
    write(checkpoints, 5)
    folder = checkpoints.begin()
    (folder / "masters.bin").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="masters.bin: not what the trainer wrote"):
        checkpoints.commit(CONFIG, Progress(version=6), {"masters.bin": hashlib.sha256(b"whole").hexdigest()})
    assert checkpoints.newest()[0].progress.version == 5


def test_what_an_interrupted_write_leaves_is_no_checkpoint(checkpoints):
    write(checkpoints, 5)
    (checkpoints.begin() / "masters.bin").write_bytes(b"half")
    assert checkpoints.newest()[0].progress.version == 5
    write(checkpoints, 10)
    assert checkpoints.newest()[0].progress.version == 10


def test_a_lineage_is_never_used_twice(checkpoints):
    taken = [checkpoints.next_lineage()]
    assert taken == [0]
    write(checkpoints, 5)
    taken += [checkpoints.next_lineage(), checkpoints.next_lineage()]  # the second after a kill before any checkpoint
    shutil.rmtree(checkpoints.folder / "00000-00000005")
    taken.append(checkpoints.next_lineage())
    (checkpoints.folder / "lineage.json").write_text("{")
    taken.append(checkpoints.next_lineage())
    assert taken == sorted(set(taken))


def test_a_finished_adapter_is_remembered_until_it_is_to_go_further(checkpoints):
    progress = Progress(version=30, eval_base=0.25, eval_final=0.75, peft_path="x", rewards=(0.5,) * 30)
    assert checkpoints.finished(CONFIG) is None
    write(checkpoints, 30)
    checkpoints.finish(CONFIG, progress)
    assert checkpoints.finished(CONFIG) == progress
    assert checkpoints.finished(replace(CONFIG, num_steps=40)) is None
    path = checkpoints.folder / "finished.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert checkpoints.finished(CONFIG) is None


@pytest.mark.parametrize(
    ("changed", "setting"),
    [
        (replace(CONFIG, max_staleness=2), "adapters.a.max_staleness=2: must be 1"),
        (replace(CONFIG, lora=LoraConfig(rank=4)), "adapters.a.lora.rank=4: must be 8"),
        (replace(CONFIG, optimizer=OptimizerConfig(betas=(0.5, 0.9))), "adapters.a.optimizer.betas="),
        (replace(CONFIG, environment=EnvironmentConfig(settings={"digits": 4})), "adapters.a.environment.settings.digits=4"),
        (replace(CONFIG, num_steps=10), "adapters.a.num_steps=10: must be 30"),
    ],
)
def test_a_run_resumed_under_another_setting_is_refused_by_name(checkpoints, tmp_path, changed, setting):
    check_resume(str(tmp_path), changed)  # nothing there yet
    write(checkpoints, 5)
    check_resume(str(tmp_path), CONFIG)
    check_resume(str(tmp_path), replace(CONFIG, num_steps=60))
    with pytest.raises(ValueError) as caught:
        check_resume(str(tmp_path), changed)
    assert str(caught.value).startswith(setting) and "run.fresh=true" in str(caught.value)


def test_a_setting_that_an_older_weft_did_not_have_had_its_default_in_that_run(checkpoints, tmp_path):
    def forget(body):
        body["config"].pop("max_staleness")
        body["config"].pop("lora")
        body.pop("defaults")

    reseal(write(checkpoints, 5), PIPELINE, forget)
    check_resume(str(tmp_path), CONFIG)
    with pytest.raises(ValueError, match="adapters.a.max_staleness=2: must be 1"):
        check_resume(str(tmp_path), replace(CONFIG, max_staleness=2))
    with pytest.raises(ValueError, match="adapters.a.lora.rank=4: must be 8"):
        check_resume(str(tmp_path), replace(CONFIG, lora=LoraConfig(rank=4)))


def test_a_setting_of_a_newer_weft_hinders_only_where_it_had_another_value_than_its_default(checkpoints, tmp_path):
    def learn(**values):
        def change(body):
            for name, value in {"warmth": 3, "mirror": {"depth": 2}}.items():
                body["defaults"][name], body["config"][name] = value, values.get(name, value)

        return change

    reseal(write(checkpoints, 5), PIPELINE, learn())
    check_resume(str(tmp_path), CONFIG)
    reseal(write(checkpoints, 6), PIPELINE, learn(warmth=4))
    with pytest.raises(ValueError, match=r"adapters.a.warmth=3: must be 4, as in the run"):
        check_resume(str(tmp_path), CONFIG)
    reseal(write(checkpoints, 7), PIPELINE, learn(mirror={"depth": 5}))
    with pytest.raises(ValueError, match=r"adapters.a.mirror.depth=2: must be 5"):
        check_resume(str(tmp_path), CONFIG)


STEPS = [
    (os, "replace"),
    (os, "fsync"),
    (shutil, "rmtree"),
    (Path, "write_text"),
    (Path, "write_bytes"),
    (Path, "mkdir"),
    (hashlib, "file_digest"),
]


def die_before(die_at, steps):
    """This process kills itself before the `die_at`th of these calls (-1: never)."""
    calls = 0

    def deadly(function):
        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    for owner, name in steps:
        setattr(owner, name, deadly(getattr(owner, name)))


def fork():
    """os.fork, whose child ends nothing that other tests of this process left: that may wait for threads it does not have."""
    gc.disable()
    child = os.fork()
    if child:
        gc.enable()
    return child


def write_for_ever(folder, say, die_at):
    """What a run does, until it is killed: by itself before step `die_at` of those that touch the disk (-1: by others)."""
    die_before(die_at, STEPS)
    checkpoints = Checkpoints(folder, "a", keep=2)
    found, _ = checkpoints.newest()
    lineage, version = checkpoints.next_lineage(), found.progress.version if found else -1
    while True:
        version += 1
        write(checkpoints, version, lineage)
        os.write(say, f"{version}\n".encode())  # from here on it must not be lost


def killed_writer(folder, die_at, seconds=0.0):
    """The versions that a child of this process told of before it was killed."""
    hear, say = os.pipe()
    child = fork()
    if not child:
        try:
            write_for_ever(str(folder), say, die_at)
        finally:
            os._exit(1)  # never back into pytest
    os.close(say)
    with os.fdopen(hear) as told:
        versions = []
        if die_at < 0:
            versions.append(int(told.readline()))
            time.sleep(seconds)  # the instant is what is random here; no outcome depends on it
            os.kill(child, signal.SIGKILL)
        versions += [int(line) for line in told]
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    return versions


def surviving_version(folder, told):
    """The version found after a death, which must be the last one told of, or the one after that (complete, not yet told)."""
    found, damaged = Checkpoints(str(folder), "a", keep=2).newest()
    assert not damaged
    version = found.progress.version if found else -1
    assert version in (max(told, default=-1), max(told, default=-1) + 1)
    if found:
        assert (found.folder / "masters.bin").read_bytes().endswith(f" {version}".encode())
    return version


def test_kill_9_before_any_step_on_the_disk_leaves_what_was_complete(memory_folder):
    reached = set()
    for die_at in range(1, 91):
        folder = memory_folder / str(die_at)
        folder.mkdir()
        reached.add(surviving_version(folder, killed_writer(folder, die_at)))
    assert {-1, 0, 1, 2, 3} <= reached  # far enough for the older ones to be removed


def test_kill_9_at_random_instants_loses_nothing_that_was_complete(tmp_path):
    chance, reached = random.Random(0), -1
    for _ in range(12):  # each goes on from what the one before left
        told = killed_writer(tmp_path, -1, chance.uniform(0.0, 0.05))
        assert told[0] == reached + 1
        reached = surviving_version(tmp_path, told)


def is_killed_while_it_replaces(written, final, die_at):
    child = fork()
    if not child:
        try:
            die_before(die_at, [*STEPS, (os, "unlink"), (os, "rmdir")])
            replace_folder(written, final)
        finally:
            os._exit(0)  # never back into pytest
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_kill_9_before_any_step_of_a_replacement_leaves_the_old_folder_or_the_new_one(memory_folder):
    def fill(folder, word):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("weights", "config"):
            (folder / name).write_text(word)

    def held(folder):
        return {path.name: path.read_text() for path in folder.iterdir()}

    found, die_at, killed = [], 0, True
    while killed:
        die_at += 1
        final, written = memory_folder / str(die_at) / "a", memory_folder / str(die_at) / ".a.writing"
        fill(final, "old")
        fill(written, "new")
        killed = is_killed_while_it_replaces(written, final, die_at)
        assert [path.name for path in final.parent.glob("[!.]*")] in (["a"], []), "none that could be taken for an adapter's"
        settle_folder(final)  # as the next run does
        assert held(final) in ({"weights": word, "config": word} for word in ("old", "new"))
        found.append(held(final)["config"])
        fill(written, "newer")
        replace_folder(written, final)
        assert list(final.parent.iterdir()) == [final] and held(final) == {"weights": "newer", "config": "newer"}
    assert found == sorted(found, reverse=True) and {*found} == {"old", "new"} and len(found) > 8
