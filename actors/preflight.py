"""Everything of a user's that can be wrong, found before anything is started: nothing here starts a process or writes a file.

Every SettingError names the setting, its value and the rule. The order is that of cost: what is quick to refuse comes first.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.actors.affinity import engine_places
from weft.actors.blame import shown
from weft.actors.environment import Environment, Prompt
from weft.actors.environments.jsonl import Jsonl
from weft.actors.environments.load import load_environment
from weft.actors.sampler_engine import LORA_RANKS, TESTED
from weft.configs.build import SettingError
from weft.configs.schema import AdapterConfig, ClusterConfig, Config, ModelConfig

if TYPE_CHECKING:
    from weft.actors.episode import Chat

PROCESS_BYTES = 200 << 20  # of its own that each takes at least: of the smallest model, 240 MB a trainer and 470 MB a sampler
SOCKET_NAMES = len("/weft-ray-01234567/session_2026-01-01_00-00-00_000000_0123456/sockets/plasma_store")


def preflight(config: Config) -> tuple[str, ...]:
    """Raises SettingError for the first thing that would fail once the run is under way.

    Returns what the user should know and need not act on, each once.
    """
    check_output(config.run.dir)
    check_temporary_folder()
    check_ranks(config)
    check_processes(config.cluster)
    check_gpus(config.cluster)
    check_vllm(config)
    folder = check_model(config)
    if config.cluster.gpus_per_sampler:
        check_places(config, folder, _card_bytes())
    use_working_directory()
    tokenizer = _tokenizer(config.model, folder)
    loaded: dict[str, Environment] = {}
    notices: dict[str, None] = {}
    for adapter in config.adapters:
        check_lora(adapter, folder)
        environment, prompt = check_environment(adapter, tokenizer, config.cluster.sampler.max_model_len, loaded)
        if isinstance(environment, Jsonl) and (said := environment.reused(adapter.eval_prompts)):
            notices[said] = None
        of_template = told_of_unread(adapter, tokenizer, prompt), told_of_turn_end(adapter, tokenizer, folder, prompt)
        for said in (told_of_truncation(adapter), *of_template):
            if said:
                notices[said] = None
    check_port(config.cluster)  # at last: while another run is up it would hide every other mistake
    return tuple(notices)


def model_folder(model: ModelConfig) -> str:
    """The folder of `model.path`, which may be the name of a base that ships with weft."""
    from weft.actors.base_model import tiny_path

    return tiny_path() if model.path == "tiny" else str(Path(model.path).expanduser())


def max_lora_rank(config: Config) -> int:
    """What the samplers are told: the setting, or the smallest rank that vLLM takes and that holds every adapter."""
    chosen = config.cluster.sampler.max_lora_rank
    highest = max(adapter.lora.rank for adapter in config.adapters)
    return chosen or min(rank for rank in LORA_RANKS if rank >= highest)


def use_working_directory() -> None:
    """A user's own module is looked for where the command is given, after everything that is installed."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def check_output(folder: str) -> None:
    """The output folder is one that can be made or written to."""
    if not folder:
        raise SettingError("run.dir='': must be a folder")
    path = Path(folder).absolute()
    with writing(folder):
        parent = next(parent for parent in (path, *path.parents) if parent.exists())
    if not parent.is_dir():
        raise SettingError(f"run.dir={folder!r}: must be a folder, and {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise SettingError(f"run.dir={folder!r}: must be writable, and {parent} is not")


@contextmanager
def writing(folder: str) -> Iterator[None]:
    """What the system refuses to write as run.dir's fault."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise SettingError(f"run.dir={folder!r}: must be a folder that can be written: {error.strerror}{where}") from error


def check_temporary_folder() -> None:
    """Ray's sockets fit: the system takes paths of 107 bytes, of which Ray's own names and weft's take SOCKET_NAMES."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > 107 - SOCKET_NAMES:
        raise SettingError(f"TMPDIR={folder!r}: must be at most {107 - SOCKET_NAMES} bytes long, for the sockets in it")


def check_ranks(config: Config) -> None:
    """vLLM takes few maximal ranks, and a trainer's kernels none above theirs; what no vLLM takes is refused by the schema."""
    chosen = config.cluster.sampler.max_lora_rank
    if chosen is not None and chosen not in LORA_RANKS:
        raise SettingError(f"cluster.sampler.max_lora_rank={chosen}: must be one of {', '.join(map(str, LORA_RANKS))}")
    if config.cluster.gpus_per_trainer:
        from weft.kernels.lora.tables import RANK_BLOCKS

        for adapter in (one for one in config.adapters if one.lora.rank > RANK_BLOCKS[-1]):
            rule = f"must be at most {RANK_BLOCKS[-1]} where trainers run on GPUs"
            raise SettingError(f"adapters.{adapter.name}.lora.rank={adapter.lora.rank}: {rule}")


def check_processes(cluster: ClusterConfig) -> None:
    """A number that was mistyped does not fill the machine with processes that no signal ends in time."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = int(memory / PROCESS_BYTES)
    if cluster.samplers + cluster.trainers > most:
        sizes = f"cluster.samplers={cluster.samplers}, cluster.trainers={cluster.trainers}"
        rule = f"{most} processes at most fit into this machine's memory of {memory / 2**30:.0f} GiB"
        raise SettingError(f"{sizes}: {rule}, whatever the model")


def check_gpus(cluster: ClusterConfig) -> None:
    """GPUs that are asked for are there."""
    backend, sampler, trainer = cluster.sync.backend, cluster.gpus_per_sampler, cluster.gpus_per_trainer
    if backend != "gloo" and not (sampler and trainer):
        rule = "must be gloo unless gpus_per_sampler and gpus_per_trainer are above 0"
        raise SettingError(f"cluster.sync.backend={backend!r}: {rule}")
    if backend != "gloo" and (sampler < 1 or trainer < 1):
        raise SettingError(f"cluster.sync.backend={backend!r}: must be gloo where samplers and trainers share a card")
    if not cluster.gpus:
        return
    import torch

    there = torch.cuda.device_count()
    if cluster.gpus > there:
        raise SettingError(gpu_message(cluster, there))


def gpu_message(cluster: ClusterConfig, there: int) -> str:
    """Says both sides: what the pools ask for and what there is."""
    samplers = f"cluster.samplers={cluster.samplers} x gpus_per_sampler={cluster.gpus_per_sampler:g}"
    trainers = f"cluster.trainers={cluster.trainers} x gpus_per_trainer={cluster.gpus_per_trainer:g}"
    return f"{samplers} + {trainers} ask for {cluster.gpus:g} GPUs: must be at most the {there} that are there"


def check_vllm(config: Config) -> None:
    """The vLLM that the samplers take is one that weft was tested with: what runs inside its worker knows its insides."""
    kind = "cuda" if config.cluster.gpus_per_sampler else "cpu"
    distribution, tested = TESTED[kind]
    if kind == "cuda" and config.model.tensors != "bfloat16":
        raise SettingError(f"model.dtype={config.model.dtype!r}: must be bfloat16 where samplers run on GPUs")
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        found = "not installed"
    if found not in tested:
        rule = f"must be one of those that weft was tested with: {', '.join(tested)}"
        raise SettingError(f"{distribution} is {found}, and {rule}")


def check_port(cluster: ClusterConfig) -> None:
    """The dashboard's port is free."""
    if not cluster.dashboard_port:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that has just been given back is free
        try:
            probe.bind(("127.0.0.1", cluster.dashboard_port))
        except OSError as error:
            rule = f"must be free, or 0 for any free port: {os.strerror(error.errno or 0)}"
            raise SettingError(f"cluster.dashboard_port={cluster.dashboard_port}: {rule}") from None


def check_model(config: Config) -> str:
    """The base is a whole Hugging Face folder of a family that weft runs, and long enough. Returns the folder."""
    from weft.actors.model import check_folder, read_config

    folder = model_folder(config.model)
    with _blaming(f"model.path={config.model.path!r}: "):
        check_folder(folder)
        found = read_config(folder)
        longest = found.get("max_position_embeddings")
    wanted = config.cluster.sampler.max_model_len
    if isinstance(longest, int) and wanted > longest:
        rule = f"must be at most max_position_embeddings={longest} of model.path={config.model.path!r}"
        raise SettingError(f"cluster.sampler.max_model_len={wanted}: {rule}")
    check_split(config.cluster, found, config.model.path)
    return folder


def check_places(config: Config, folder: str, card_bytes: int) -> None:
    """What each sampler keeps a place for, every live version at the engine's rank, fits the memory that it may take."""
    from weft.actors.lora import SlabLayout, linear_shapes
    from weft.actors.model import read_config

    cluster, rank = config.cluster, max_lora_rank(config)
    places, _ = engine_places([adapter.live_versions for adapter in config.adapters], cluster.samplers)
    shapes = linear_shapes(read_config(folder))
    place = SlabLayout.build(shapes, list(shapes), rank).numel * 2 / cluster.tensor_parallel  # bytes, in bfloat16
    room = card_bytes * cluster.sampler.gpu_memory_utilization
    if places * place > room:
        needed = f"each sampler needs {places} places of {place / 1e6:.0f} MB (rank {rank}), {places * place / 1e9:.0f} GB"
        rule = "must be fewer, of lower rank or max_staleness, or on more samplers"
        raise SettingError(f"adapters: {rule}: {needed}, and may take {room / 1e9:.0f} GB of its card")


def _card_bytes() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def check_split(cluster: ClusterConfig, model: Mapping[str, Any], path: str) -> None:
    """The model's heads and its hidden units divide evenly over the cards of one sampler."""
    workers, key_value = cluster.tensor_parallel, model.get("num_key_value_heads") or model["num_attention_heads"]
    for name in ("num_attention_heads", "intermediate_size"):
        if model[name] % workers:
            rule = f"must divide {name}={model[name]} of model.path={path!r}"
            raise SettingError(f"cluster.gpus_per_sampler={cluster.gpus_per_sampler:g}: {rule}")
    if key_value % workers and workers % key_value:
        rule = f"must divide num_key_value_heads={key_value} of model.path={path!r}, or be a multiple of it"
        raise SettingError(f"cluster.gpus_per_sampler={cluster.gpus_per_sampler:g}: {rule}")


def check_lora(adapter: AdapterConfig, folder: str) -> None:
    """The model has the target modules, and a warm start is of the adapter's shape."""
    from weft.actors.lora import SlabLayout, linear_shapes, resolve_targets
    from weft.actors.model import read_config
    from weft.actors.peft_folder import check_peft_folder

    lora = adapter.lora
    shapes = linear_shapes(read_config(folder))
    with _blaming(f"adapters.{adapter.name}.lora."):
        modules = resolve_targets(shapes, lora.target_modules, lora.exclude_modules)
    if lora.warm_start is not None:
        with _blaming(f"adapters.{adapter.name}.lora.warm_start={lora.warm_start!r}: "):
            check_peft_folder(Path(lora.warm_start), SlabLayout.build(shapes, modules, lora.rank), lora.alpha)


def told_of_truncation(adapter: AdapterConfig) -> str:
    """What top-p and top-k do to a loss with ratios; empty where there is neither."""
    sampling, loss = adapter.sampling, adapter.loss
    if (sampling.top_p == 1 and sampling.top_k == -1) or loss.name == "cross_entropy":
        return ""
    clips = loss.name not in ("importance_sampling", "cispo")
    lost = f"; beyond loss.clip_low={loss.clip_low:g} what was worse than its siblings has no gradient" if clips else ""
    unknown = f"sampling.top_p={sampling.top_p:g}, top_k={sampling.top_k}: the trainer's log-probabilities know neither"
    return f"{unknown}, so ratios of {loss.name} are below 1 before any step{lost}"


def told_of_unread(adapter: AdapterConfig, tokenizer: Any, prompt: Prompt) -> str:
    """Which arguments of its task's the chat template never names; empty where it names them all."""
    from weft.actors.episode import Chat

    unread = Chat(tokenizer).unread(prompt)
    if not unread:
        return ""
    names = ", ".join(f"chat_template_kwargs.{name}" for name in unread)
    return f"environment.target={adapter.environment.target!r}: the chat template never reads {names}, which changes nothing"


def told_of_turn_end(adapter: AdapterConfig, tokenizer: Any, folder: str, prompt: Prompt) -> str:
    """That nothing ends a turn where the chat template does, as in many a base model; empty where something does."""
    from transformers import GenerationConfig

    from weft.actors.episode import Chat
    from weft.actors.model import read_config

    try:
        end = Chat(tokenizer).turn_end(prompt)
    except Exception:  # noqa: BLE001  a template may refuse these two messages, and yet take all that the task has
        end = None
    if end is None:
        return ""
    try:  # where vLLM looks
        named = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except OSError:
        named = read_config(folder).get("eos_token_id")
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named]), *adapter.sampling.stop_token_ids}
    text = tokenizer.decode([end])
    if end in ends or any(stop in text for stop in adapter.sampling.stop):
        return ""
    return (
        f"the chat template ends a turn with {text!r}, which neither the tokenizer nor generation_config.json says: the model "
        f"goes on behind it to sampling.max_tokens, and sampling.stop_token_ids=[{end}] would end its turn"
    )


def check_environment(
    adapter: AdapterConfig, tokenizer: Any, max_model_len: int, loaded: dict[str, Environment]
) -> tuple[Environment, Prompt]:
    """The environment imports, takes its settings and fits the protocol; its first prompt, and the longest ones of a file,
    render and leave room to answer. Returns it, and its first prompt.

    loaded: environments by what they were built from; adapters of one task share theirs here.
    """
    from weft.actors.episode import Chat

    chat, target = Chat(tokenizer), adapter.environment.target
    key = json.dumps([target, adapter.environment.settings], sort_keys=True, default=str)
    first: dict[bool, Prompt] = {}
    with _blaming(f"adapters.{adapter.name}."):
        if key not in loaded:
            loaded[key] = load_environment(target, adapter.environment.settings)
        for held_out in (False, True) if adapter.eval_prompts else (False,):
            first[held_out], tokens = _check_prompt(loaded[key], target, 0, held_out, chat, max_model_len)
            room, wanted = max_model_len - tokens, adapter.sampling.max_tokens
            if wanted > room:
                why = f"cluster.sampler.max_model_len={max_model_len} less the {tokens} tokens of prompt(0, {held_out})"
                raise ValueError(f"sampling.max_tokens={wanted}: must be at most {room}, which is {why}")
            for index in loaded[key].longest(held_out) if isinstance(loaded[key], Jsonl) else ():
                if not held_out or index < adapter.eval_prompts:  # the others are not asked
                    _check_prompt(loaded[key], target, index, held_out, chat, max_model_len)
    return loaded[key], first[False]


def _check_prompt(
    environment: Environment, target: str, index: int, held_out: bool, chat: Chat, max_model_len: int
) -> tuple[Prompt, int]:
    """One prompt renders and leaves room to answer; returned with the number of its tokens."""
    which = f"environment.target={target!r}: prompt({index}, {held_out})"
    try:
        prompt = environment.prompt(index, held_out)
        tokens = len(chat.prompt(prompt))
    except BaseException as error:  # a user's prompt, through a model's template: either may raise anything
        if isinstance(error, KeyboardInterrupt):
            raise  # somebody's Ctrl-C
        raise ValueError(f"{which} cannot be rendered: {type(error).__name__}: {shown(error)}") from error
    if tokens >= max_model_len:
        last = shown(prompt, lambda one: repr(one.messages[-1]["content"]))
        rule = f"cluster.sampler.max_model_len={max_model_len} must be above that"
        raise ValueError(f"{which} has {tokens} tokens, and {rule}; its last message is {last:.60}...")
    return prompt, tokens


def _tokenizer(model: ModelConfig, folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001  transformers raises many kinds for a file that is absent or broken
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SettingError(f"model.path={model.path!r}: its tokenizer does not load: {said}") from None
    if not tokenizer.chat_template:
        raise SettingError(f"model.path={model.path!r}: its tokenizer must have a chat template, and has none")
    return tokenizer


@contextmanager
def _blaming(prefix: str) -> Iterator[None]:
    """A ValueError as the setting's."""
    try:
        yield
    except ValueError as error:
        raise SettingError(f"{prefix}{error}") from error
