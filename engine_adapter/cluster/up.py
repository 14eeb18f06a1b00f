"""The wiring of `pd-cluster up`: look at the machine, start, warm up, show, watch, stop in order."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine_adapter.cluster import machine
from engine_adapter.cluster.child import Child, Guard
from engine_adapter.cluster.config import ClusterConfig, MadeModel
from engine_adapter.cluster.errors import ClusterError, StartFailed
from engine_adapter.cluster.plan import Plan, Site, num_free_ports, plan
from engine_adapter.cluster.screen import Events, Screen
from engine_adapter.cluster.supervisor import Supervisor
from engine_adapter.cluster.warmup import warm_up

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A file's configuration on this machine."""

    config: ClusterConfig
    plan: Plan
    model_dir: Path
    run_dir: Path
    socket_dir: Path
    log_dir: Path


def deployment(config: ClusterConfig, state_dir: Path, log_dir: Path | None = None) -> Deployment:
    """Choose what the file leaves open. Touches nothing."""
    run_dir = state_dir / "run" / config.cluster.name
    socket_dir = machine.socket_directory(run_dir)
    model_dir = machine.model_directory(config, state_dir)
    ports = machine.choose_ports(config.cluster.host, num_free_ports(config), config)
    site = Site(str(model_dir), str(socket_dir), machine.num_cores(), ports)
    return Deployment(config, plan(config, site), model_dir, run_dir, socket_dir, log_dir or run_dir)


def check(here: Deployment) -> None:
    """Raises ClusterError with everything that keeps it from starting here."""
    found = machine.problems(here.config, here.plan, here.model_dir, machine.environment())
    if found:
        raise ClusterError(*found)


async def up(here: Deployment, screen: Screen, then: Callable[[], Awaitable[bool]] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, or until `then`, called once all is ready, returns False.

    A second signal kills what is still draining. Raises ClusterError; whatever happens, nothing is left running.
    """
    with machine.locked(here.run_dir):
        check(here)
        machine.make_private(here.socket_dir)
        here.log_dir.mkdir(parents=True, exist_ok=True)
        with Guard(here.socket_dir) as guard:
            supervisor = Supervisor(
                here.plan,
                run_dir=here.log_dir,
                guard=guard,
                env=machine.environment(),
                report=screen.change,
                start_timeout_s=here.config.cluster.start_timeout_s,
                stop_timeout_s=here.config.cluster.stop_timeout_s,
            )
            await until_stopped(supervisor, screen, _serve(here, supervisor, guard, screen, then))


async def until_stopped(supervisor: Supervisor, screen: Events, serve: Coroutine[None, None, None]) -> None:
    """Let it serve until it ends or a signal comes, and stop everything then. Raises what it raised."""
    stop = _stop_on_signals(supervisor, screen)
    serving = asyncio.create_task(serve)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (serving, stopping):
            task.cancel()
        (outcome, _) = await asyncio.gather(serving, stopping, return_exceptions=True)
        await supervisor.stop()
    if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
        raise outcome


async def _serve(
    here: Deployment, supervisor: Supervisor, guard: Guard, screen: Screen, then: Callable[[], Awaitable[bool]] | None
) -> None:
    if here.config.model.make and not (here.model_dir / "config.json").is_file():
        engine = here.config.commands.engine
        await make_model(engine, here.model_dir, here.config.model.make, here.run_dir, guard, screen)
    screen.event(f"{here.plan.name}: {len(here.plan.processes)} processes, logs in {here.log_dir}")
    await supervisor.start()
    screen.event("all healthy; warming up")
    await warm_up(here.plan)
    screen.instances(supervisor.watched.values())
    if then is not None and not await then():
        return
    screen.event(f"serves {here.plan.served_name} on http://{here.plan.proxy.address}; Ctrl-C stops it")
    await supervisor.watch()


def _stop_on_signals(supervisor: Supervisor, screen: Events) -> asyncio.Event:
    stop = asyncio.Event()

    def heard(name: str) -> None:
        if stop.is_set():
            screen.event(f"{name} again: killing what is left")
            supervisor.kill()
        else:
            screen.event(f"{name}: stopping (once more kills)")
            stop.set()

    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, heard, number.name)
    return stop


async def make_model(
    engine: Sequence[str], model_dir: Path, made: MadeModel, log_dir: Path, guard: Guard, screen: Events
) -> None:
    """Write it beside its place and move it there whole."""
    screen.event(f"making a {made.size} {made.family} model with random weights in {model_dir}")
    model_dir.parent.mkdir(parents=True, exist_ok=True)
    part = model_dir.with_name(f".{model_dir.name}.{os.getpid()}")
    argv = [
        *(*engine, "make-model", str(part)),
        *("--family", made.family, "--size", made.size, "--seed", str(made.seed)),
    ]
    child = Child(argv, machine.environment(), log_dir / "make-model.log", guard)
    try:
        status = await child.wait()
        if status != 0:
            raise StartFailed("the model could not be made:", *child.log.last_lines(5))
        shutil.rmtree(model_dir, ignore_errors=True)
        part.rename(model_dir)
    finally:
        child.kill()
        await child.wait()
        shutil.rmtree(part, ignore_errors=True)
