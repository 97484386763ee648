"""lm-eval's own loading of a task: names, data sets, few-shot examples, requests, with its seeds."""

from __future__ import annotations

import contextlib
import importlib
import logging
import random
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from mergemix.errors import BenchmarkError, MergeMixError
from mergemix.evals.files import nearest
from mergemix.evals.lm_eval_tasks.adapter import EngineLM
from mergemix.evals.lm_eval_tasks.spec import LmEvalSpec

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
_FILE_FORMATS = (
    "json",
    "csv",
    "parquet",
    "arrow",
    "text",
    "pandas",
)  # data sets that are files of the user's


@contextlib.contextmanager
def built_tasks(
    spec: LmEvalSpec, include_paths: Sequence[Path], lm: EngineLM
) -> Iterator[tuple[str, list[Any]]]:
    """The name for the whole and its leaf tasks, their requests built, while lm-eval's seeds and silence hold.

    Raises BenchmarkError where lm-eval fails, with the task and what to do.
    """
    with _lm_eval_surroundings():
        try:
            manager, registered = _manager_for(spec.task, tuple(include_paths), lm.root)
            loaded = manager.load([spec.task])
            tasks = list(loaded["tasks"].values())
            for task in tasks:
                _check_answerable(task)
                _configure(task, spec)
                _build(task, spec, lm)
            if not tasks:
                raise BenchmarkError(f"{spec.source}: the group or tag holds no task")
            yield (spec.task if registered else _title(loaded, tasks)), tasks
        except MergeMixError:
            raise
        except Exception as error:
            raise _translated(spec, error) from error


def _manager_for(name: str, include_paths: tuple[Path, ...], root: Path) -> tuple[TaskManager, bool]:
    """What knows `name`, and whether by this name: else `name` is a file.

    lm-eval's own index takes many seconds, so that it is read only where the included directories are not enough.
    """
    own = TaskManager(include_path=list(include_paths), include_defaults=False, metadata=_metadata(root))
    is_file = Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()
    entry = own.task_index.get(name) or (TaskIndex.entry_from_path(Path(name)) if is_file else None)
    if entry is not None and _complete(entry, own.task_index):
        return own, name in own.task_index
    whole = _whole_manager(include_paths, root)
    if name in whole.task_index or is_file:
        return whole, name in whole.task_index
    where = _unreadable(include_paths) if include_paths else "; tasks of your own need --include-path DIR"
    near = nearest(name, whole.all_tasks)
    if near.startswith("known"):
        near = "`lm_eval ls tasks` lists all names"
    raise BenchmarkError(f"lm_eval:{name}: lm-eval has no task, group or tag of this name; {near}{where}")


def _complete(entry: Entry, index: Mapping[str, Entry]) -> bool:
    """Whether all that a group holds is in the index; a task or a tag holds nothing else."""
    if entry.kind is not Kind.GROUP:
        return True
    members = list((entry.cfg or {}).get("task") or [None])
    while members:
        member = members.pop()
        if isinstance(member, dict) and isinstance(member.get("task"), list):
            members += member["task"]
            continue
        name = str(member.get("group", member.get("task")) if isinstance(member, dict) else member)
        if name not in index or not _complete(index[name], index):
            return False
    return True


def _unreadable(include_paths: Sequence[Path]) -> str:
    """The first YAML of these directories that lm-eval passed over in silence, for the end of a message."""
    for file in sorted(file for path in include_paths for file in path.rglob("*.yaml")):
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:
            return f"; {file} could not be read: {' '.join(str(error).split())}"
    return ""


@lru_cache(maxsize=1)
def _whole_manager(include_paths: tuple[Path, ...], root: Path) -> TaskManager:
    log.info("reading lm-eval's list of tasks, which takes a while")
    return TaskManager(include_path=list(include_paths), metadata=_metadata(root))


def _metadata(root: Path) -> dict[str, Any]:
    """Some tasks make their documents with the model's tokenizer: the command gives them its model arguments."""
    return {"pretrained": str(root)}


def _title(loaded: Any, tasks: list[Any]) -> str:
    groups = list(loaded.get("groups", {}))
    return str(groups[0] if groups else tasks[0].task_name)


def _check_answerable(task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise BenchmarkError(
            f"lm_eval:{task.task_name}: runs code that the model wrote, without a sandbox; use a benchmark file with a "
            "code grader instead"
        )
    if getattr(task, "MULTIMODAL", False):
        raise BenchmarkError(
            f"lm_eval:{task.task_name}: asks about images or sounds, and engines here read text alone"
        )


def _configure(task: Any, spec: LmEvalSpec) -> None:
    """As `simple_evaluate` does: a task that sets no examples itself keeps none, whatever is asked."""
    own = task.get_config("num_fewshot")
    if spec.few_shot is None:
        task.set_config(key="num_fewshot", value=own or 0)
    elif own == 0 and spec.few_shot:
        log.warning(
            "%s: few_shot %d has no effect: the task sets num_fewshot to 0 itself, which lm-eval keeps",
            task.task_name,
            spec.few_shot,
        )
    else:
        task.set_config(key="num_fewshot", value=spec.few_shot)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _build(task: Any, spec: LmEvalSpec, lm: EngineLM) -> None:
    task.build_all_requests(
        limit=get_sample_size(task, spec.limit),
        rank=0,
        world_size=1,
        cache_requests=False,
        rewrite_requests_cache=False,
        system_instruction=None,
        apply_chat_template=spec.chat_template,
        fewshot_as_multiturn=spec.chat_template,
        chat_template=lm.apply_chat_template if spec.chat_template else None,
        tokenizer_name=lm.tokenizer_name if spec.chat_template else "",
    )


@contextlib.contextmanager
def _lm_eval_surroundings() -> Iterator[None]:
    """lm-eval's seeds; no waiting for a Hub that cannot be reached; nothing on stdout. All restored afterwards."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), _offline_if_unreachable():
            yield
    finally:
        logger.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Without a network the Hub's clients would try for minutes; offline they take what is cached at once."""
    # By name: as attributes of their packages, other things may hide these modules.
    hub: Any = importlib.import_module("huggingface_hub.constants")
    data: Any = importlib.import_module("datasets.config")
    before = hub.HF_HUB_OFFLINE, data.HF_HUB_OFFLINE
    if not (any(before) or _reachable(hub.ENDPOINT)):
        log.info("the Hugging Face Hub cannot be reached: only data sets that are on this machine are used")
        hub.HF_HUB_OFFLINE = data.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, data.HF_HUB_OFFLINE = before


def _reachable(endpoint: str) -> bool:
    parts = urlsplit(endpoint)
    if getproxies():
        return True  # only the clients know how to go through it
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        with socket.create_connection((parts.hostname, port), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def _translated(spec: LmEvalSpec, error: Exception) -> BenchmarkError:
    """One message for whatever lm-eval, datasets or a task's own code raised."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    task, at_data = _failed_task(error.__traceback__)
    name = getattr(getattr(task, "config", None), "task", None)
    where = f"{spec.source}: task {name}" if name and name != spec.task else spec.source
    if not at_data:
        return BenchmarkError(f"{where}: lm-eval cannot make its requests: {said}")
    data = " ".join(str(part) for part in (task.DATASET_PATH, task.DATASET_NAME) if part)
    if task.DATASET_PATH in _FILE_FORMATS:
        return BenchmarkError(
            f"{where}: its {data} files could not be loaded ({said}); data_files in the task's YAML are relative to "
            "the current directory"
        )
    return BenchmarkError(
        f"{where}: needs the data set '{data}', which could not be loaded ({said}). Load it once where there is a "
        "network and point HF_HOME to that cache (HF_DATASETS_OFFLINE=1 never asks the network), or write a task YAML "
        "with dataset_path: json and data_files of your own and give its directory with --include-path"
    )


def _failed_task(trace: TracebackType | None) -> tuple[Any, bool]:
    """The task that was being made when an exception was raised, and whether its data were being loaded."""
    task, at_data = None, False
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, Task):
            task, at_data = owner, trace.tb_frame.f_code.co_name == "download"
        trace = trace.tb_next
    return task, at_data
