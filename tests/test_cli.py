"""The command `weft`: help, configuration, and every mistake of a user's: one message, status 2, nothing started or written."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from weft.actors.base_model import tiny_path
from weft.actors.lora import SlabLayout, linear_shapes, resolve_targets
from weft.actors.model import read_config
from weft.actors.peft_folder import write_peft_folder
from weft.actors.preflight import check_output
from weft.configs.build import SettingError
from weft.configs.compose import compose, descriptions
from weft.configs.expand import expand, to_mapping
from weft.configs.schema import AdapterConfig, Config
from weft.pipeline import main as command
from weft.pipeline.adapter import Progress
from weft.pipeline.checkpoint import Checkpoints
from weft.pipeline.folder import hold, move_aside
from weft.transport.errors import RemoteError, StartError

Output = pytest.CaptureFixture[str]
TRAIN = command._train


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the run was started")

    monkeypatch.setattr(command, "_train", refuse)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> int:
    return command.main(["cluster.dashboard_port=0", "run.dir=out", *arguments])


def refused(output: Output, *arguments: str, mistakes: int = 1) -> str:
    """The message, after checking that it is one line a mistake on stderr, the status 2, and that nothing was written."""
    before = sorted(Path.cwd().rglob("*"))
    status = run(*arguments)
    said = output.readouterr()
    assert status == 2, said
    assert said.out == ""
    assert said.err.startswith("weft: ")
    assert said.err.count("\n") == mistakes, said.err
    assert sorted(Path.cwd().rglob("*")) == before
    return said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["template.learning_rate=1"], "template.learning_rate: unknown setting; did you mean 'optimizer.learning_rate'?"),
        (["num_steps=1"], "num_steps: unknown setting; did you mean 'template.num_steps'?"),
        (["adapters.calculator.num_steps=1", "adapters=single"], "adapters.calculator: unknown setting (there is none here)"),
        (["template.optimizer.lerning_rate=1"], "did you mean 'learning_rate'?"),
        (["modle=tiny"], "modle: unknown setting; did you mean 'model'?"),
        (["model=tinny"], "model=tinny: there is no such choice; did you mean 'tiny'?"),
        (["template.lora.rank=0"], "template.lora.rank=0: must be from 1 to 512"),
        (["template.lora.rank=1000"], "template.lora.rank=1000: must be from 1 to 512"),
        (["template.lora.rank=64", "cluster.sampler.max_lora_rank=32"], "lora.rank=64: must be at most"),
        (["template.lora.target_modules=[qq_proj]"], "target_modules='qq_proj': must be all-linear or a linear of the model"),
        (["sweep.num_steps=[1,1]"], "must be of distinct names"),
        (["template.max_staleness=-1"], "template.max_staleness=-1: must be at least 0"),
        (["template.batch_size=20"], "template.batch_size=20: must be a multiple of group_size=8"),
        (["model=local", "model.path=absent"], "model.path='absent': "),
        (["environment.target=no.such.Task"], "environment.target='no.such.Task': module 'no.such' does not import"),
        (["environment.target=json.JSONDecoder"], "environment.target='json.JSONDecoder': "),
        (["environment=jsonl"], "environment.settings.path is not set"),
        (["environment=jsonl", "environment.settings.path=absent.jsonl"], "absent.jsonl"),
        ([f"run.dir={'x' * 300}"], "must be a folder that can be written: File name too long"),
        (["run.dir=/proc/weft/out"], "run.dir='/proc/weft/out': must be a folder that can be written: "),
        (["template.sampling.max_tokens=4096"], "sampling.max_tokens=4096: must be at most "),
        (["template.lora.warm_start=absent"], "lora.warm_start='absent': "),
        (["cluster.gpus_per_sampler=99"], f"ask for 99 GPUs: must be at most the {torch.cuda.device_count()} that are there"),
        (["--verbose"], "--verbose: there is no such option (there are: --help, --cfg, --config-dir DIR)"),
        (["--config-dir", "absent"], "must be a folder that is there"),
        (["--config-dir"], "--config-dir: must be followed by a folder"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(arguments: list[str], message: str, capsys: Output) -> None:
    assert message in refused(capsys, *arguments)


def test_a_file_of_two_adapters_of_one_name_is_refused(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "own" / "adapters").mkdir(parents=True)
    (tmp_path / "own" / "adapters" / "mine.yaml").write_text("# @package _global_\nadapters:\n  a: {}\n  a: {num_steps: 3}\n")
    assert "one name" in refused(capsys, "--config-dir=own", "adapters=mine")


def test_a_model_folder_that_is_not_whole_is_refused(tmp_path: Path, capsys: Output) -> None:
    shutil.copytree(tiny_path(), tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    assert "model.path='base': " in refused(capsys, "model=local", "model.path=base")


def test_a_model_folder_with_a_missing_shard_or_another_shape_is_refused(tmp_path: Path, capsys: Output) -> None:
    base = Path(shutil.copytree(tiny_path(), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: torch.zeros(3, 5)}, base / "model.safetensors", metadata={"format": "pt"})
    said = refused(capsys, "model=local", "model.path=base")
    assert said.startswith("weft: model.path='base': ")
    assert name in said
    assert "[3, 5]" in said
    (base / "model.safetensors").unlink()
    shards = {key: f"model-0000{1 + (key == name)}-of-00002.safetensors" for key in tensors}
    save_file({key: value for key, value in tensors.items() if key != name}, base / shards["model.norm.weight"])
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    said = refused(capsys, "model=local", "model.path=base")
    assert said.startswith("weft: model.path='base': ")
    assert "model-00002-of-00002.safetensors" in said


def test_a_warm_start_of_another_shape_is_refused(tmp_path: Path, capsys: Output) -> None:
    shapes = linear_shapes(read_config(tiny_path()))
    layout = SlabLayout.build(shapes, resolve_targets(shapes, ["q_proj"]), 4)
    write_peft_folder(tmp_path / "peft", layout, torch.zeros(layout.numel), 8, "tiny")
    said = refused(capsys, "template.lora.warm_start=peft", "template.lora.rank=8")
    assert "lora.warm_start='peft': PEFT folder peft: r=4 there, rank=8 by the configuration" in said
    said = refused(capsys, "template.lora.warm_start=peft", "template.lora.rank=4", "template.lora.alpha=8")
    assert "is missing there" in said


def test_a_jsonl_line_that_is_wrong_is_named_by_file_and_line(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "q", "answer": "a"}\n{"prompt": 3\n')
    said = refused(capsys, "environment=jsonl", "environment.settings.path=q.jsonl")
    assert "q.jsonl" in said
    assert "2" in said.split("q.jsonl", 1)[1]
    (tmp_path / "q.jsonl").write_text('{"prompt": "q", "answer": "a"}\n{"prompt": "q"}\n')
    said = refused(capsys, "environment=jsonl", "environment.settings.path=q.jsonl")
    assert "answer" in said
    assert "2" in said.split("q.jsonl", 1)[1]


def test_what_the_checks_have_to_say_is_the_runs_to_warn_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(config: Config, notices: Sequence[str], console: Console) -> None:
        (said,) = notices
        assert said.startswith("q.jsonl has ") and said.endswith(", fewer than eval_prompts=64: they are asked again")
        raise KeyboardInterrupt

    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"prompt": f"q{i}", "answer": i}) + "\n" for i in range(60)))
    monkeypatch.setattr(command, "_train", begun)
    assert run("environment=jsonl", "environment.settings.path=q.jsonl", "sweep.rank=[2,4]") == command.INTERRUPTED


def test_a_port_in_use_is_refused(capsys: Output) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cluster.dashboard_port={port}: must be free" in refused(capsys, f"cluster.dashboard_port={port}")


@contextmanager
def another_run() -> Iterator[subprocess.Popen[str]]:
    script = "import sys; from pathlib import Path; from weft.pipeline.folder import hold\n"
    script += "with hold(Path('out'), make=True): print('held', flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        try:
            yield other
        finally:
            other.kill()


def test_an_output_folder_that_another_run_uses_is_refused(tmp_path: Path, capsys: Output) -> None:
    with another_run() as other:
        said = refused(capsys)
        assert f"run.dir='out': must not be in use, and process {other.pid} is running there" in said
    with hold(tmp_path / "out"):  # the kernel gave it back
        pass


@pytest.mark.parametrize("fresh", ["false", "true"])
def test_a_run_that_begins_while_another_checks_keeps_its_folder(
    fresh: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    with ExitStack() as others:
        monkeypatch.setattr(command, "preflight", lambda config: others.enter_context(another_run()))
        monkeypatch.setattr(command, "_train", lambda *_: pytest.fail("a second run in one folder"))
        assert run(f"run.fresh={fresh}") == command.MISTAKE
        assert "run.dir='out': must not be in use" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_takes_no_more_at_the_start_is_one_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # what is imported first here would be cached cut short, for good
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))  # bytes a file: room for the lock, not for the configuration
    try:
        said = refused(capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said == "weft: run.dir='out': must be a folder that can be written: File too large\n"
    assert not (tmp_path / "out").exists()


def a_run(folder: Path, config: AdapterConfig, finished: bool) -> None:
    """What a run with one adapter leaves."""
    with hold(folder, make=True):
        checkpoints = Checkpoints(str(folder), config.name, 2)
        checkpoints.begin()
        checkpoints.commit(config, Progress(version=config.num_steps), {})
        if finished:
            checkpoints.finish(config, Progress(version=config.num_steps))
            (folder / "summary.json").write_text("{}")


def test_a_finished_run_says_so_and_how_to_start_afresh(tmp_path: Path, capsys: Output) -> None:
    (config,) = expand(compose([])).adapters
    a_run(tmp_path / "out", config, finished=True)
    assert run() == 0
    said = capsys.readouterr().out
    assert "this run has finished" in said
    assert "out/summary.json" in said
    assert "run.fresh=true" in said


def test_a_reader_that_goes_away_is_told_of_on_stderr(tmp_path: Path) -> None:
    (config,) = expand(compose([])).adapters
    a_run(tmp_path / "out", config, finished=True)
    reader, writer = os.pipe()
    os.close(reader)
    weft = [Path(sys.executable).with_name("weft"), "run.dir=out"]
    done = subprocess.run(weft, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr.startswith("weft: whoever read the output has closed it\n")


def test_a_run_under_other_settings_is_not_resumed_by_mistake(tmp_path: Path, capsys: Output) -> None:
    (config,) = expand(compose([])).adapters
    a_run(tmp_path / "out", config, finished=False)
    said = refused(capsys, "template.lora.rank=4")
    assert "adapters.adapter.lora.rank=4: must be 8, as in the run that out holds" in said
    assert "run.fresh=true" in said


ENDS = [KeyboardInterrupt(), StartError("sampler-0 did not start"), OSError(errno.ENOSPC, "No space left on device")]


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_whatever_ends_a_run_it_names_checkpoints_only_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, end: BaseException
) -> None:
    def said(*arguments: str) -> str:
        assert run(*arguments) == (command.INTERRUPTED if isinstance(end, KeyboardInterrupt) else command.FAILED)
        return capsys.readouterr().err

    def ended(*_: object) -> None:
        raise end

    monkeypatch.setattr(command, "_train", ended)
    for arguments in ((), (), ("run.fresh=true",)):  # the folder is there by the second time, and still no checkpoint
        assert said(*arguments).endswith("no checkpoint has been written yet; the same command starts anew\n")
    (config,) = expand(compose([])).adapters
    a_run(tmp_path / "out", config, finished=False)
    assert said().endswith("the same command goes on from the last checkpoints\n")
    with monkeypatch.context() as patched:
        patched.setattr(command, "preflight", ended)  # before the earlier run is moved aside
        assert said("run.fresh=true").endswith("the same command without run.fresh=true goes on from the last checkpoints\n")


@pytest.mark.parametrize(("kind", "text"), [("OSError", "[Errno 28] No space left on device"), ("KeyError", "'a'")])
def test_a_disk_that_a_process_of_the_pools_finds_full_is_one_line_and_any_other_fault_has_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: Output, kind: str, text: str
) -> None:
    def ended(*_: object) -> None:
        raise RemoteError(f"{kind} at trainer-0: {text}: 'out/checkpoints/a'", kind, "Traceback:\n  there")

    monkeypatch.setattr(command, "_train", ended)
    assert run() == command.FAILED
    trace = [] if kind == "OSError" else ["Traceback:", "  there"]
    said = [f"weft: {kind} at trainer-0: {text}: 'out/checkpoints/a'", *trace]
    assert capsys.readouterr().err.splitlines() == [*said, "no checkpoint has been written yet; the same command starts anew"]


def test_what_is_interrupted_before_it_knows_its_settings_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compose", interrupted)
    assert run() == command.INTERRUPTED
    assert capsys.readouterr().err == "weft: interrupted; nothing has been started\n"


def test_told_to_end_is_interrupted_from_the_first_moment_and_to_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def told(*_: object) -> None:
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL, "which would end these tests"
        signal.raise_signal(signal.SIGTERM)

    async def nothing(*_: object) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, print)

    def deaf(*_: object) -> None:
        raise AssertionError("the command did not take it")

    before = signal.signal(signal.SIGTERM, deaf)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(command, "compose", told)
            assert run() == command.INTERRUPTED
        monkeypatch.setattr(command, "_train", TRAIN)
        monkeypatch.setattr(command, "_session", nothing)
        monkeypatch.setattr(command, "_close", told)
        assert run() == command.INTERRUPTED
        assert signal.getsignal(signal.SIGTERM) is deaf, "whoever calls the command has its own again"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.count("weft: interrupted; ") == 2


def test_a_run_that_goes_on_says_from_which_step_each_adapter_does(tmp_path: Path, capsys: Output) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(AssertionError, match="the run was started"):
            run("sweep.rank=[2,4,8]", *arguments)
        return capsys.readouterr().out

    first, second, _ = expand(compose(["sweep.rank=[2,4,8]"])).adapters
    with hold(tmp_path / "out", make=True):
        for config, version in ((first, 5), (second, 10)):
            checkpoints = Checkpoints("out", config.name, 2)
            checkpoints.begin()
            checkpoints.commit(config, Progress(version=version), {})
    assert said() == f"goes on: {first.name} from step 5, {second.name} from step 10 (1 from step 0)\n"
    assert "goes on" not in said("run.fresh=true")
    assert said() == "", "it was begun, and there is no checkpoint"


def damage(folder: Path, how: str) -> None:
    file = {"truncated": "weights.bin", "altered": "weights.bin", "no manifest": "manifest.json"}[how]
    if how == "truncated":
        os.truncate(folder / file, 3)
    elif how == "altered":
        (folder / file).write_bytes(b"wEights")
    else:
        (folder / file).unlink()


@pytest.mark.parametrize("how", ["truncated", "altered", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_a_run_without_a_whole_one_is_refused(
    tmp_path: Path, capsys: Output, how: str
) -> None:
    (config,) = expand(compose([])).adapters
    checkpoints = Checkpoints("out", config.name, 2)
    with hold(tmp_path / "out", make=True):
        for version in (5, 10):
            (checkpoints.begin() / "weights.bin").write_bytes(b"weights")
            checkpoints.commit(config, Progress(version=version), {})
    older, newer = sorted(checkpoints.folder.glob("0*"))
    damage(newer, how)
    with pytest.raises(AssertionError, match="the run was started"):
        run()
    assert capsys.readouterr().out == "goes on: adapter from step 5\n"
    found, said = checkpoints.newest()
    assert found is not None
    assert found.folder == older
    assert str(newer) in said[0]
    assert said[0].endswith("set aside, the one before it is used")
    damage(older, how)
    (tmp_path / "out" / "config.yaml").unlink()
    message = refused(capsys)
    assert message.startswith(f"weft: run.dir='out': of adapter 'adapter' no checkpoint is whole: {older}/")
    assert "run.fresh=true starts anew" in message
    with pytest.raises(AssertionError, match="the run was started"):
        run("run.fresh=true")


def test_a_run_on_another_base_is_not_resumed_by_mistake(tmp_path: Path, capsys: Output) -> None:
    config = expand(compose(["adapters=single"]))
    a_run(tmp_path / "out", config.adapters[0], finished=False)
    (tmp_path / "out" / "config.yaml").write_text(yaml.safe_dump(to_mapping(config)))
    shutil.copytree(tiny_path(), tmp_path / "other")
    said = refused(capsys, "adapters=single", f"model.path={tmp_path / 'other'}")
    assert "model.path=" in said
    assert "must be 'tiny'" in said
    assert "run.fresh=true" in said


@pytest.mark.parametrize("other", ["settings", "base"])
def test_no_mistake_hides_behind_a_run_under_other_settings(tmp_path: Path, capsys: Output, other: str) -> None:
    config = expand(compose([]))
    a_run(tmp_path / "out", config.adapters[0], finished=True)
    model = to_mapping(config.model) | ({"path": "another"} if other == "base" else {})
    (tmp_path / "out" / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    differs = ("template.lora.rank=4",) if other == "settings" else ()
    said = refused(capsys, *differs, "template.environment.target=no.such.Task", mistakes=2)
    own, before = said.splitlines()
    assert "environment.target='no.such.Task': module 'no.such' does not import" in own
    assert ("as in the run that out holds" if other == "settings" else "model.path='tiny': must be 'another'") in before
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = f"cluster.dashboard_port={taken.getsockname()[1]}"
        assert f"{port}: must be free" in refused(capsys, *differs, port, mistakes=2).splitlines()[0]
        if other == "settings":
            assert run(port) == command.FINISHED, "a finished run needs no port"


def test_fresh_moves_an_earlier_run_aside_and_nothing_else(tmp_path: Path, capsys: Output) -> None:
    (config,) = expand(compose([])).adapters
    folder = tmp_path / "out"
    a_run(folder, config, finished=True)
    assert move_aside(folder) == tmp_path / "out.1"
    assert (tmp_path / "out.1" / "summary.json").is_file()
    assert not folder.exists()
    assert move_aside(folder) is None
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(SettingError, match="must be empty or an earlier run"):
        move_aside(folder)
    assert "must be empty or an earlier run" in refused(capsys, "run.fresh=true")


def test_the_current_folder_is_not_moved_aside_and_no_name_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (config,) = expand(compose([])).adapters
    a_run(tmp_path / "out", config, finished=True)
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(SettingError, match="must not be the current folder"):
        move_aside(Path("."))
    with pytest.raises(SettingError, match="run.dir='': must be a folder"):
        check_output("")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_a_configuration_of_an_earlier_run_that_cannot_be_read_hides_nothing(tmp_path: Path, content: bytes | None) -> None:
    saved = tmp_path / "config.yaml"
    saved.mkdir() if content is None else saved.write_bytes(content)
    assert command._model_before(saved) is None


def test_cfg_prints_the_configuration_that_would_run(capsys: Output) -> None:
    assert run("--cfg", "adapters=demo", "sweep.rank=[2,4]") == 0
    printed = expand(yaml.safe_load(capsys.readouterr().out))
    assert printed == expand(compose(["cluster.dashboard_port=0", "run.dir=out", "adapters=demo", "sweep.rank=[2,4]"]))
    assert len(printed.adapters) == 16


def test_help_names_every_group_every_choice_and_the_main_settings(capsys: Output) -> None:
    assert run("--help") == 0
    page = capsys.readouterr().out
    for group, choices in descriptions().items():
        assert f"{group}=" in page
        assert all(choice in page for choice in choices)
    for word in ("sweep.learning_rate=", "run.fresh", "--config-dir", "max_staleness", "lora.rank", "weft adapters=demo"):
        assert word in page
    assert max(map(len, page.splitlines())) <= 120


def test_the_installed_command_answers(tmp_path: Path) -> None:
    done = subprocess.run([Path(sys.executable).with_name("weft"), "template.lora.rank=0"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "weft: template.lora.rank=0: must be from 1 to 512\n"
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == "[]"


def test_the_command_itself_imports_nothing_that_takes_seconds() -> None:
    slow = "{'torch', 'ray', 'vllm', 'transformers', 'matplotlib'}"
    found = f"import sys, weft.pipeline.main; sys.exit(', '.join({slow} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
