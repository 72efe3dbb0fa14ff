"""Breaks a rank where a test says so in MVLM_TEST_FAULT: `KIND RANK STEP FLAG`.

Python imports this module at its start when the folder is on PYTHONPATH, so the program under test
knows nothing of it. FLAG is a file: the rank that breaks makes it, and most faults do not happen
once it is there. Ranks are forked from a process that has imported everything, so what breaks them
is put in place after the fork.
"""

import os
import sys
import time

_FAULT = os.environ.get("MVLM_TEST_FAULT", "")


def _break_rank():
    if "megatron_vlm.training.loop" not in sys.modules:
        return
    from megatron_vlm.resilience import heartbeat

    kind, rank, step, flag = _FAULT.split()
    enter = heartbeat.enter

    def enter_and_break(phase, number=None):
        enter(phase, number)
        if _due(phase, number):
            open(flag, "a").close()
            _KINDS[kind]()

    at = {"step": 0}

    def _due(phase, number):
        at["step"] = at["step"] if number is None else number
        reached = at["step"] >= int(step) if kind == "slow" else at["step"] == int(step)
        here = os.environ.get("RANK") == rank and reached and phase == _PHASES[kind]
        return here and (kind in _EVERY_TIME or not os.path.exists(flag))

    if kind in _SPOILED:
        _spoil(_SPOILED[kind], int(rank), int(step))
        return
    heartbeat.enter = enter_and_break


def _spoil(factor, rank, step):
    """Multiply a rank's losses in one step, and so its gradients; -1: every rank's."""
    from megatron_vlm.training.loop import Run

    prepare = Run.__init__

    def prepare_and_spoil(run, *args):
        prepare(run, *args)
        real = run.objective.losses

        def losses(output, batch):
            found = real(output, batch)
            here = rank in (-1, run.topology.rank) and run.progress.iteration + 1 == step
            return {name: value * factor for name, value in found.items()} if here else found

        run.objective.losses = losses

    Run.__init__ = prepare_and_spoil


def _hang_in_a_collective():
    import torch.distributed as dist

    # One that the other ranks are not in.
    dist.barrier()


def _hang_in_the_loader():
    time.sleep(1e6)


def _die_while_saving():
    import threading

    # A moment later: files are there by then, the checkpoint is not.
    threading.Timer(0.05, lambda: os.kill(os.getpid(), 9)).start()


def _slow():
    time.sleep(1.0)


def _fail():
    raise RuntimeError("a fault of the code itself")


_KINDS = {
    "collective": _hang_in_a_collective,
    "loader": _hang_in_the_loader,
    "save": _die_while_saving,
    "raise": _fail,
    "slow": _slow,
}
_PHASES = {
    "collective": "reduce",
    "loader": "data",
    "save": "save",
    "raise": "optimizer",
    "slow": "optimizer",
}

_SPOILED = {"nan": float("nan"), "spike": 8.0}
_EVERY_TIME = {"slow", "raise"}

if _FAULT:
    os.register_at_fork(after_in_child=_break_rank)
