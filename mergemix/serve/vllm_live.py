"""The mixture of a running vLLM server, behind the endpoint that shows and changes it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mergemix.checkpoints.family import Family
from mergemix.checkpoints.strict_json import parse_object, shown
from mergemix.errors import CheckpointError, ConfigError, EngineError
from mergemix.merge.mixtures_file import parse_mixture
from mergemix.merge.plan import plan_merge
from mergemix.mixture import Mixture

log = logging.getLogger(__name__)

WORKER_EXTENSION = "mergemix.serve.vllm_worker.MergeWorker"
MAX_DRAIN_S = 300.0  # how long a change waits for the requests in flight, unless it says otherwise
ABORT_S = 10.0
MAX_PROBLEMS = 3
BODY_KEYS = ("weights", "groups", "normalize", "max_drain_seconds")


class Refused(Exception):
    """A request that is answered with an error and changes nothing."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class Change:
    """What a PUT asks for."""

    mixture: Mixture
    max_drain_s: float


class LiveMixture:
    """The mixture that a vLLM server's workers hold, reached through its engine client.

    The workers alone know it: nothing that is read here is remembered. failure: why no request may be answered any
    more; None while all is well. lock: to be held for a change.
    """

    def __init__(self, client: Any, config: Any, family: Family) -> None:
        self._client = client
        self._config = config
        self.family = family
        self.failure: str | None = None
        self.lock = asyncio.Lock()

    @classmethod
    async def open(cls, client: Any, config: Any) -> LiveMixture:
        """Raises MergeMixError when this server's weights cannot be swapped while it serves, or not rightly."""
        from mergemix.serve.vllm_loader import parse_config

        check_server(client, config)
        extra, model = config.load_config.model_loader_extra_config, config.model_config.model
        start = await asyncio.to_thread(parse_config, extra, model)
        live = cls(client, config, start.family)
        problems = [problem for rank in await live._call("mergemix_describe") for problem in rank["problems"]]
        if problems:
            raise EngineError(
                f"live swaps are not right with this model: {'; '.join(problems[:MAX_PROBLEMS])}"
            )
        await live._prove(start.mixture)
        return live

    def as_dict(self) -> dict[str, Any]:
        """What is served, besides the mixture itself."""
        names = self._config.model_config.served_model_name
        return {
            "models": [names] if isinstance(names, str) else list(names),
            "experts": list(self.family.names),
            "base": self.family.base is not None,
        }

    def parse(self, body: bytes) -> Change:
        """The change that a PUT's body describes. Raises Refused for anything else."""
        where = "the request's body"
        try:
            content = parse_object(body, where)
            if unknown := sorted(set(content) - set(BODY_KEYS)):
                raise ConfigError(
                    f"{where}: unknown key {shown(unknown[0])}; it takes {', '.join(BODY_KEYS)}"
                )
            normalize, drain = content.get("normalize", True), content.get("max_drain_seconds", MAX_DRAIN_S)
            if not isinstance(normalize, bool):
                raise ConfigError(f"{where}: 'normalize' must be true or false, but is {shown(normalize)}")
            if isinstance(drain, bool) or not isinstance(drain, int | float) or not 0 <= drain < 1e9:
                raise ConfigError(
                    f"{where}: 'max_drain_seconds' must be a number >= 0, but is {shown(drain)}"
                )
            mixture = parse_mixture(content, self.family.names, where, normalize=normalize)
            plan_merge(self.family, [mixture])  # whatever a merge to disk would refuse
        except (ConfigError, CheckpointError) as error:
            raise Refused(400, str(error)) from None
        return Change(mixture, float(drain))

    async def current(self) -> Mixture:
        """What the workers hold. Fails the server when they do not hold the same."""
        keys = set(await self._call("mergemix_mixture"))
        if len(keys) != 1 or "" in keys:  # "": a swap did not give what it should, whoever asked for it
            self._fail(f"the workers hold mixed weights: {sorted(keys)}")
            raise Refused(503, str(self.failure))
        return Mixture.from_key(keys.pop())

    async def change(self, change: Change, begin: float) -> dict[str, Any]:
        """Swap on all workers, and answer what was done. Raises Refused, which says whether anything was changed.

        To be called when no request is being answered. begin: perf_counter() when the waiting for that began.
        """
        previous = await self.current()
        await self._pause(change.max_drain_s)
        drained = time.perf_counter()
        try:
            reports = await self._swap(change.mixture, "sample")
            await self._client.resume_generation()
        except BaseException as error:
            self._fail(f"the change to {change.mixture} failed halfway: {error or type(error).__name__}")
            await self._abort()
            if not isinstance(error, Exception):  # cancelled: the server is shutting down
                raise
            raise Refused(503, str(self.failure)) from error
        return {
            **change.mixture.describe(),
            "previous": previous.describe(),
            "drain_seconds": drained - begin,
            "seconds": time.perf_counter() - begin,
            "swap_seconds": max(report["seconds"] for report in reports),
            "bytes_written": sum(report["bytes_written"] for report in reports),
        }

    async def _prove(self, initial: Mixture) -> None:
        """Swap to another mixture and back, everything that is written compared with the reference."""
        names = self.family.names
        others = [Mixture.one_hot(names, name) for name in names]
        others += [Mixture.base_only(names)] if self.family.base is not None else []
        for mixture in [*[other for other in others if other != initial][:1], initial]:
            await self._swap(mixture, "all")

    async def _swap(self, mixture: Mixture, check: str) -> list[dict[str, Any]]:
        """One report per worker. Nothing may be running. Whatever it raises, the weights are then mixed."""
        reports = await self._call("mergemix_swap", mixture.key(), check)
        problems = [problem for report in reports for problem in report["problems"]]
        if problems:
            raise EngineError("; ".join(problems[:MAX_PROBLEMS]))
        if await self._client.reset_prefix_cache() is not True:
            raise EngineError("vLLM would not reset its prefix cache, which holds the old weights' results")
        if (live := await self.current()) != mixture:
            raise EngineError(f"the workers hold {live} instead")
        return reports

    async def _call(self, method: str, *arguments: object) -> list[Any]:
        """What each worker's MergeWorker method returns."""
        try:
            return await self._client.collective_rpc(method, args=arguments)
        except Exception as error:  # vLLM's own classes, and bare ones
            raise Refused(503, f"vLLM's workers say: {error}") from error

    async def _pause(self, patience_s: float) -> None:
        """Keep vLLM from starting requests, and wait for those that it has started. Raises Refused; it then goes on."""
        if await self._client.is_paused():
            raise Refused(
                409, "generation is paused by somebody else, and nothing was changed: resume it first"
            )
        try:
            async with asyncio.timeout(patience_s):
                await self._client.pause_generation(mode="wait", clear_cache=True)
        except BaseException as error:
            await self._client.resume_generation()
            if isinstance(error, TimeoutError):
                raise still_busy(patience_s, "requests are") from None
            if not isinstance(
                error, Exception
            ):  # cancelled: whoever asked is gone, or the server is shutting down
                raise
            raise Refused(503, f"vLLM would not pause, and nothing was changed: {error}") from error

    def _fail(self, reason: str) -> None:
        self.failure = f"this server answers nothing any more, restart it: {reason}"
        log.error("%s", self.failure)

    async def _abort(self) -> None:
        """End the requests that wait inside vLLM, which stays paused: they would wait for ever."""
        with suppress(Exception):
            async with asyncio.timeout(ABORT_S):
                await self._client.pause_generation(mode="abort", clear_cache=False)


def check_server(client: Any, config: Any) -> None:
    """Raises ConfigError for a server whose weights the endpoint could not change safely; it says what to do."""
    parallel = config.parallel_config
    if str(config.load_config.load_format) != "mergemix":
        raise ConfigError(
            f"the endpoint needs --load-format mergemix, but it is {config.load_config.load_format}"
        )
    if not parallel.worker_extension_cls:
        raise ConfigError(f"the endpoint needs --worker-extension-cls {WORKER_EXTENSION}, but there is none")
    for option, count in (
        ("--api-server-count", getattr(parallel, "_api_process_count", 1)),
        ("--data-parallel-size", parallel.data_parallel_size),
    ):
        if count != 1:
            raise ConfigError(
                f"the endpoint needs {option} 1, but it is {count}: start several servers behind one address, and "
                "change the mixture of each"
            )
    pause = getattr(client, "pause_generation", None)
    if pause is None or "mode" not in inspect.signature(pause).parameters:
        raise ConfigError("this vLLM cannot pause between requests; the endpoint needs a newer one")


def still_busy(patience_s: float, who: str) -> Refused:
    return Refused(
        503,
        f"{who} still being answered after {patience_s:g} s, and nothing was changed: ask again, or give "
        "'max_drain_seconds' more",
        retry_after="10",
    )
