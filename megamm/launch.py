"""``python -m megamm.launch [torchrun options] -m megamm.train ...``: torchrun, made fit for a cluster.

- A rank that dies is replaced (``--max-restarts``) without hanging: the new ranks meet in a store of their own.
- SIGTERM and SIGUSR1 reach the ranks, which save; this command then ends with exit code 75, to be started again.
  Torchrun alone ends with 1 whatever its ranks said.
- Collectives that hang leave a trace of what each rank was at (NCCL's flight recorder).

Settings that are in the environment already, and options that are given, stay as they are.
"""

import os
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from megamm.training.signals import EXIT_CODE, STOP_SIGNALS

ENVIRONMENT = {
    # Torchrun's agent otherwise lends its own store to the ranks; after a restart gloo finds the dead ranks' addresses
    # in it and waits for them (https://github.com/pytorch/pytorch/issues/135712). Read by the agent, not the ranks.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # Seconds for the ranks to save before they are killed; torch 2.11 may not know it and waits 30.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
    # The flight recorder, read by `torchfrtrace`; TORCH_NCCL_TRACE_BUFFER_SIZE is its former name and warns.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}
STOPPED_CODE = "MEGAMM_STOPPED_CODE"
"""Names another exit code than 75 for a job that has saved, for Kubernetes operators that restart on others."""
# Torchrun's own list has no SIGUSR1; without it that signal would kill the agent and leave the ranks.
OPTIONS = {"--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}


def main(arguments: list[str]) -> int:
    """Run torchrun with ``arguments``; returns the exit code."""
    from torch.distributed.run import main as torchrun

    for name, value in ENVIRONMENT.items():
        # Before torchrun is run, which reads them in this process.
        os.environ.setdefault(name, value)
    options = [f"{name}={value}" for name, value in OPTIONS.items()]
    try:
        # Ours first, so that the user's own win.
        torchrun([*options, *arguments])
    except ChildFailedError as error:
        _, first = error.get_first_failure()  # the others were ended because of it
        # A signal's number is negative here: 1, as for any other failure.
        return first.exitcode if first.exitcode in (EXIT_CODE, 2) else 1
    except SignalException as error:
        # The ranks had the signal from torchrun, and time to save. 128 + number is what a shell would say.
        return EXIT_CODE if error.sigval in STOP_SIGNALS else 128 + error.sigval
    except RendezvousError as error:
        print(f"error: the nodes do not meet: {error}", file=sys.stderr)
        return EXIT_CODE
    return 0


def command() -> None:
    """Run it, and end with the exit code that the job's scheduler expects."""
    code = main(sys.argv[1:])
    sys.exit(int(os.environ.get(STOPPED_CODE, EXIT_CODE)) if code == EXIT_CODE else code)


if __name__ == "__main__":
    command()
