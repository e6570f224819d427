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

from malora_dist.errors import EXIT_CODE, RESTART_SIGNAL, STOP_SIGNALS, stopped_exit_code
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
        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            codes = {failure.exitcode for failure in result.failures.values()}
            if final_code(codes) is not None:
                self._remaining_restarts = 0
            elif codes == {stopped_exit_code(RESTART_SIGNAL)}:  # another machine's agent was faster, see below
                self._remaining_restarts += 1
            return result

        def _stop_workers(self, worker_group: Any) -> None:
            if worker_group.state == WorkerState.HEALTHY:  # a machine joins
                self._shutdown(RESTART_SIGNAL, self._shutdown_timeout)
            else:
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

    vars(api)["LocalElasticAgent"] = _improved(api.LocalElasticAgent)
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except SignalException as error:
        sys.exit(stopped_exit_code(error.sigval))
    except ChildFailedError as error:
        code = final_code(failure.exitcode for failure in error.failures.values())
        sys.exit(str(error) if code is None else code)  # torchrun's table of what failed, and exit code 1


if __name__ == "__main__":
    main()
