"""Where runs are done: processes of this machine, or a Ray cluster. Both yield what begins and what is done.

An engine takes jobs (a benchmark's, a tuning's: whatever says what its line begins with) and a function
``work(job) -> line`` and yields ``(job, None)`` when one begins and
``(job, line)`` when it is done, each job exactly once. A worker that dies costs its run a second try, and after
that the line says so; the other runs go on. Locally it takes the runs beside it along: each of them gets its
second try alone, so that only the one that dies again is blamed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from prefenv.device import cores
from prefenv.errors import ConfigError

Line = dict[str, Any]


class Job(Protocol):
    """A run to do. It must have a hash, and survive pickling."""

    def head(self) -> Line:
        """What its line begins with, also where the run never came back."""
        ...


J = TypeVar("J", bound=Job)


def _watch(parent: int) -> None:
    """End this process when its parent is gone: a killed benchmark leaves nobody behind."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def local(
    work: Callable[[J], Line], jobs: Iterable[J], workers: int | None = None
) -> Iterator[tuple[J, Line | None]]:
    """Processes of this machine.

    Args:
        work: A function that can be pickled.
        jobs: What to do, in this order.
        workers: Processes; None = one per core.
    """
    waiting = deque(jobs)
    while waiting:
        for job in (yield from _pool(work, waiting, workers or cores())):
            for lost in (yield from _pool(work, deque([job]), 1, again=True)):
                yield lost, _died(lost, "its process died (killed, or out of memory)")


def _pool(
    work: Callable[[J], Line], waiting: deque[J], count: int, again: bool = False
) -> Generator[tuple[J, Line | None], None, list[J]]:
    """Do what waits, in processes of their own, until one of them dies.

    Args:
        work: As above.
        waiting: What is begun is taken out.
        count: Processes.
        again: They began before, which is not told twice.

    Returns:
        What was under way when the process died: all of it is lost, and nobody can say whose the process was.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, _watch, (os.getpid(),))
    running: dict[Future[Line], J] = {}
    try:
        while waiting or running:
            with contextlib.suppress(BrokenProcessPool):  # one died just now: what waits stays
                while waiting and len(running) < count:
                    future = pool.submit(work, waiting[0])
                    running[future] = job = waiting.popleft()
                    if not again:
                        yield job, None
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            whole = [f for f in done if not isinstance(f.exception(), BrokenProcessPool)]
            for future in whole:
                yield running.pop(future), future.result()
            if len(whole) < len(done):
                break
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return list(running.values())


def on_ray(
    work: Callable[[J], Line], jobs: Iterable[J], workers: int | None = None
) -> Iterator[tuple[J, Line | None]]:
    """A Ray cluster: the one that runs here (``ray start --head``), or a new one of this machine alone.

    Args:
        work: A function that can be pickled.
        jobs: What to do, in this order.
        workers: Runs at a time; None = one for each CPU of the cluster, nodes that join or leave included.

    Raises:
        ConfigError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves this machine unasked
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError:
        raise ConfigError("--engine ray needs Ray: pip install 'prefenv[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        _connect(ray)

    @ray.remote(num_cpus=1, max_retries=2)  # a run whose node died is repeated on another
    def remote(job: J) -> Line:
        return work(job)

    waiting, running = deque(jobs), {}
    try:
        while waiting or running:
            room = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
            while waiting and len(running) < room:
                job = waiting.popleft()
                running[remote.remote(job)] = job
                yield job, None
            done, _ = ray.wait(list(running), num_returns=1, timeout=5.0)
            for reference in done:
                job = running.pop(reference)
                try:
                    line = ray.get(reference)
                except RayError as error:
                    line = _died(job, str(error).splitlines()[0])
                yield job, line
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any) -> None:
    """Join the cluster of this machine if there is one, else start one that ends with us."""
    settings = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
    try:
        ray.init(address="auto", log_to_driver=False, configure_logging=False)
    except ConnectionError:
        ray.init(**settings)


def _died(job: Job, how: str) -> Line:
    return {**job.head(), "error": f"the run did not come back: {how}"}


ENGINES = {"local": local, "ray": on_ray}
