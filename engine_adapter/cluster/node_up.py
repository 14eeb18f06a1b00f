"""The wiring of `pd-cluster up` for a deployment over several nodes: one node's share, or a rehearsal of all."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine_adapter.cluster import machine, share_files
from engine_adapter.cluster.child import Guard
from engine_adapter.cluster.errors import ClusterError
from engine_adapter.cluster.live_screen import screen_for
from engine_adapter.cluster.run_state import STATE_FILE, StateFile
from engine_adapter.cluster.screen import Events
from engine_adapter.cluster.share import Share
from engine_adapter.cluster.supervisor import Supervisor, Watched
from engine_adapter.cluster.up import until_stopped
from engine_adapter.cluster.warmup import FIRST_TIMEOUT_S, preheat

NUM_NAMED = 4


@dataclass(frozen=True, slots=True)
class Run:
    """A share, and how it is run here."""

    share: Share
    source: Path
    """The deployment's file."""
    node: str
    """Its address, or `rehearsal`."""
    run_dir: Path
    log_dir: Path
    ports: Sequence[tuple[str, str, int]]
    """All that will be listened on: whose, address, port."""
    env: Mapping[str, str]
    """Of what makes files; the processes have their own."""
    start_timeout_s: float
    stop_timeout_s: float
    num_prompts: int
    prompt_timeout_s: float = FIRST_TIMEOUT_S
    once: bool = False
    """End after the first prompts."""
    notes: Sequence[str] = ()
    prepare: Callable[[Guard, Events], Awaitable[None]] | None = field(default=None)
    """What has to be there before the first process starts."""


def problems(run: Run) -> list[str]:
    """Everything that keeps it from starting here, one line each."""
    words = dict.fromkeys((process.argv[0], process.env.get("PATH")) for process in run.share.processes)
    found = [
        f"{word}: no such command on PATH; install it on this node, or activate its environment"
        for word, path in words
        if not shutil.which(word, path=path)
    ]
    for owner, host, port in run.ports:
        problem = machine.port_problem(host, port)
        if problem:
            found.append(f"port {port} on {host} for {owner} {problem}; stop what listens there, or give another")
    return found + _refused_by_proxy(run) + share_files.differing(run.share.files)


def _refused_by_proxy(run: Run) -> list[str]:
    """What pd-proxy has against its flags: it starts last, when the engines have been loading for long."""
    found = []
    for process in run.share.of_kind("proxy"):
        program = shutil.which(process.argv[0], path=process.env.get("PATH"))
        if program is not None:
            command = [program, *process.argv[1:], "--check-config"]
            done = subprocess.run(command, env=dict(process.env), capture_output=True, text=True, check=False)
            if done.returncode:
                reason = done.stderr.strip().rpartition("\n")[2]
                found.append(f"{process.name}: {reason}; correct [proxy].args in {run.source}")
    return found


async def up(run: Run) -> None:
    """Serve until SIGINT or SIGTERM. Raises ClusterError; whatever happens, nothing is left running."""
    with machine.locked(run.run_dir):
        found = problems(run)
        if found:
            raise ClusterError(*found)
        live = run.run_dir / "live"
        machine.make_private(live)
        run.log_dir.mkdir(parents=True, exist_ok=True)
        screen = screen_for(f"{run.share.name}, {run.node}")
        try:
            with Guard(live.absolute()) as guard:
                await _supervised(run, live, guard, screen)
        finally:
            screen.close()


async def _supervised(run: Run, live: Path, guard: Guard, screen: Events) -> None:
    state = StateFile(live / STATE_FILE, name=run.share.name, node=run.node, log_dir=str(run.log_dir.absolute()))

    def report(watched: Watched, text: str, last_lines: list[str]) -> None:
        screen.change(watched, text, last_lines)
        state.write(supervisor)

    supervisor = Supervisor(
        run.share,
        run_dir=run.log_dir,
        guard=guard,
        env={},
        report=report,
        start_timeout_s=run.start_timeout_s,
        stop_timeout_s=run.stop_timeout_s,
        elsewhere=run.share.elsewhere,
    )
    screen.watch(supervisor)
    await until_stopped(supervisor, screen, _serve(run, supervisor, state, guard, screen))


async def _serve(run: Run, supervisor: Supervisor, state: StateFile, guard: Guard, screen: Events) -> None:
    share = run.share
    screen.event(f"{share.name}, {run.node}: {len(share.processes)} processes, logs in {run.log_dir}")
    for note in run.notes:
        screen.event(note)
    state.write(supervisor)
    if run.prepare is not None:
        await run.prepare(guard, screen)
    for path in await share_files.write(share.files, run.source, run.env, run.log_dir, guard):
        screen.event(f"{path} written")
    if share.elsewhere:
        names = list(share.elsewhere)
        more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
        screen.event(f"waits for {', '.join(names[:NUM_NAMED])}{more} on other nodes")
    await supervisor.start()
    if run.num_prompts:
        screen.event(f"all healthy; {run.num_prompts} warm-up prompts to each")
        for problem in await preheat(share, run.num_prompts, run.prompt_timeout_s):
            screen.event(problem)
            if run.once:
                raise ClusterError(problem)
    where = f" {share.served_name} on http://{share.proxy_address}" if share.proxy_address else ""
    screen.event(f"serves{where}; Ctrl-C or `pd-cluster down` stops it")
    state.write(supervisor)
    if not run.once:
        await supervisor.watch()
