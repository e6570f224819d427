"""torchrun as a training run wants it: ``python -m malora_dist.launch [torchrun's options] -m malora_dist.train ...``

What differs from torchrun: what cannot go better the next time is not restarted, which is a mistake of the user (exit
code 2) and a run that a signal has stopped (128 plus its number). The ranks' exit code becomes that of the launch,
without tracebacks of torchrun's own. SIGUSR1, Slurm's warning, reaches the ranks. Ranks that hang are killed sooner.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

from malora_dist.errors import EXIT_CODE
from malora_dist.exit_codes import RESTART_SIGNAL, STOP_SIGNALS, stopped_exit_code
from malora_dist.parallel.process_life import AGENT_VARIABLE

#: The time that ranks have to end a step and save, before they are killed.
SHUTDOWN_SECONDS = 120
#: That of the others when a rank has failed: without it they cannot end their step.
FAILED_SHUTDOWN_SECONDS = 5


def final_code(codes: Iterable[int]) -> int | None:
    """The exit code of a launch that shall not be restarted, from those of the ranks that failed; None: it shall.

    torchrun ends the other ranks of one that fails: those count for nothing that it killed (negative) or stopped.
    """
    ended = {code for code in codes if code >= 0}
    if EXIT_CODE in ended:
        return EXIT_CODE
    stopped = {stopped_exit_code(number) for number in STOP_SIGNALS}
    return max(ended) if ended and ended <= stopped else None


def signals_to_handle() -> str:
    """torchrun's and SIGUSR1, less SIGHUP where ``nohup`` has switched it off."""
    names = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1"]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        names.append("SIGHUP")
    return ",".join(names)


def _improved(agent: Any) -> Any:
    """torchrun's agent, which gives up where there is a :func:`final_code`, and does not wait in vain."""
    from torch.distributed.elastic.agent.server.api import WorkerState

    class Agent(agent):
        #: Exit codes of the ranks that were shut down last.
        codes: frozenset[int | None] = frozenset()

        def _start_workers(self, worker_group: Any) -> Any:
            started = super()._start_workers(worker_group)
            close = self._pcontext.close

            def close_soon(death_sig: Any = None, timeout: int = FAILED_SHUTDOWN_SECONDS) -> None:
                close(death_sig, timeout)

            self._pcontext.close = close_soon  # by which the context itself ends the others of a rank that failed
            return started

        def _shutdown(self, *args: Any, **kwargs: Any) -> None:
            super()._shutdown(*args, **kwargs)
            ranks = getattr(self._pcontext, "subprocess_handlers", {}).values()
            type(self).codes = frozenset(rank.proc.poll() for rank in ranks)

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            codes = {failure.exitcode for failure in result.failures.values()}
            if final_code(codes) is not None:
                self._remaining_restarts = 0
            elif {code for code in codes if code >= 0} == {stopped_exit_code(RESTART_SIGNAL)}:
                # Another machine's agent was faster, see below.
                self._remaining_restarts += 1
            return result

        def _stop_workers(self, worker_group: Any) -> None:
            settings = getattr(worker_group.spec.rdzv_handler, "settings", None)  # a static rendezvous has none
            may_change = settings is not None and settings.min_nodes < settings.max_nodes
            if worker_group.state == WorkerState.HEALTHY and may_change:
                self._shutdown(RESTART_SIGNAL, self._shutdown_timeout)  # a machine joins
            else:  # a rank has failed, perhaps of another machine, which waits for this one
                self._shutdown(timeout=FAILED_SHUTDOWN_SECONDS)

    return Agent


def main() -> None:
    """Start and watch this machine's ranks; ends with their exit code where that says something, else with 1."""
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", signals_to_handle())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    os.environ[AGENT_VARIABLE] = str(os.getpid())
    from torch.distributed import run  # takes seconds
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    agent = vars(api)["LocalElasticAgent"] = _improved(api.LocalElasticAgent)
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except SignalException as error:
        failed = EXIT_CODE in agent.codes  # what was to be saved could not be
        sys.exit(EXIT_CODE if failed else stopped_exit_code(error.sigval))
    except ChildFailedError as error:
        code = final_code(failure.exitcode for failure in error.failures.values())
        sys.exit(str(error) if code is None else code)  # torchrun's table of what failed, and exit code 1


if __name__ == "__main__":
    main()
