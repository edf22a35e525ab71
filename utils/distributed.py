"""Processes: one way to start them, and the few collectives that training uses.

A run is one process without a group, or one process per GPU started here, or whatever torchrun
started. Without CUDA the group is gloo.
"""

import contextlib
import gc
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils.errors import UserError, exit_with, explained, unexpected

try:
    import resource
except ImportError:  # Windows
    resource = None


def select_devices(device: str | None) -> None:
    """Let this process see these GPUs, such as "0,1", unless CUDA_VISIBLE_DEVICES is set already."""
    if device is not None:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", device)


def launch(worker: Callable, config, *arguments) -> None:
    """Run worker(config, *arguments) in every process of this run; its UserError ends it with code 2.

    config: has multiprocessing_distributed, dist_url, dist_backend, rank and world_size. Raises
    UserError where the processes cannot be started so, or one was ended from outside.
    """
    gpus = usable_gpus()
    if not gpus and os.environ.get("RANK", "0") == "0":
        print(_why_no_gpu(), file=sys.stderr)
    launched = "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    starts_processes = config.multiprocessing_distributed and gpus * config.world_size > 1
    if config.dist_url and (launched or not starts_processes) and os.environ.get("RANK", "0") == "0":
        reason = "torchrun has its own" if launched else "there is one process only"
        print(f"warning: --dist_url has no effect: {reason}", file=sys.stderr)
    if launched:
        _run(None, worker, config, None, *arguments)
    elif starts_processes:
        url = config.dist_url or f"tcp://127.0.0.1:{free_port()}"
        if config.rank >= config.world_size:
            last = config.world_size - 1
            raise UserError(
                f"rank is {config.rank}: of world_size {last + 1} nodes the last has rank {last}"
            )
        if config.world_size > 1 and not config.dist_url:
            raise UserError("several nodes need --dist_url tcp://HOST:PORT of the first, or torchrun")
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # who ends whom
        context = mp.spawn(_run, (worker, config, url, *arguments), nprocs=gpus, join=False)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while not context.join():
                pass
        except mp.ProcessExitedException as error:
            if error.exit_code < 0:  # killed by a signal, it could not say so itself
                raise UserError(
                    f"a process of this run was ended from outside ({error.signal_name}): the same "
                    "command with --resume auto goes on after the last finished epoch"
                ) from None
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            for process in context.processes:
                process.terminate()
            sys.exit(2)
    else:
        _run(0, worker, config, None, *arguments)


def usable_gpus() -> int:
    """How many GPUs this process sees.

    Raises UserError where it sees some that torch cannot use, mostly because the driver is too old for
    it: who does not know would train on the CPU, in as many processes as there are GPUs.
    """
    gpus = torch.cuda.device_count()  # asks the driver's library NVML, as nvidia-smi does
    if not gpus or torch.cuda.is_available():  # asks CUDA
        return gpus
    try:
        torch.cuda.init()
        reason = "CUDA finds none of them"
    except Exception as error:  # torch's own words, which name the driver's version
        reason = " ".join(str(error).split())
    raise UserError(
        f"the NVIDIA driver shows {gpus} GPUs, but torch {torch.__version__} cannot use them "
        f"({reason}): update the driver, install a torch that is made for it, or choose the CPU with "
        "CUDA_VISIBLE_DEVICES=''"
    )


def _run(local_rank, worker, config, url, *arguments):
    """One process: join the group if there is one, work, leave.

    local_rank None: torchrun started this process. url None with a number: it is the only one.

    Every exception ends here as one line: those that a user can do something about say what. The
    traceback of any other, which is a fault of the program, goes to a file that the line names.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is ended, as with Ctrl-C
    try:
        if url:
            gpus = usable_gpus()
            _join(config, local_rank, url, config.rank * gpus + local_rank, config.world_size * gpus)
        elif local_rank is None:
            _join(config, int(os.environ.get("LOCAL_RANK", 0)))
        elif torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        worker(config, *arguments)
    except (Exception, KeyboardInterrupt) as error:
        lost = isinstance(error, dist.DistNetworkError)
        lost = lost or re.search("(closed|reset) by peer", str(error))
        if lost and (url or local_rank is None) and not isinstance(error, UserError):
            sys.exit(2)  # another process ended, and has said why
        exit_with(explained(error) or unexpected(), rank() if dist.is_initialized() else None)
    finally:
        if dist.is_initialized():
            _leave(sys.exc_info()[1])


def _leave(error):
    """Leave the group of processes, the first one last: it may hold the store that the others look at.

    After an error under NCCL the process ends at once: leaving would wait for collectives that the
    other processes, which know nothing of the error, never finish.
    """
    if error is not None and dist.get_backend() == "nccl":
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) else 1)
    # gloo's threads live as long as anything refers to the group, such as a DDP model in a reference
    # cycle. A thread that is still there when Python ends aborts the process, so the cycles go first.
    gc.collect()
    first, processes = rank() == 0, world_size()
    dist.destroy_process_group()
    if error is None:
        with contextlib.suppress(dist.DistNetworkError):  # where the first one was killed meanwhile
            _store.add("left", 1)
            patience = time.monotonic() + 30  # for a process that was killed on its last steps
            while first and _store.add("left", 0) < processes and time.monotonic() < patience:
                time.sleep(0.01)


_store = None  # through which the processes found each other; None for a single one
_barriers = 0  # how many barriers this process has been at


def _join(config, local_rank, url="env://", process=-1, processes=-1):
    global _store
    # PyTorch imports this module by itself later on. Default arguments in it refer to the group that
    # exists at that moment, and would keep it alive; imported now, they refer to none.
    import torch.distributed.nn

    cuda = torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU of its own: "
                f"{torch.cuda.device_count()} can be seen (-d, CUDA_VISIBLE_DEVICES)"
            )
        torch.cuda.set_device(local_rank)
    backend = config.dist_backend if cuda else "gloo"
    device = torch.device("cuda", local_rank) if cuda and backend == "nccl" else None
    try:
        _store, process, processes = next(dist.rendezvous(url, process, processes))
        dist.init_process_group(
            backend, store=_store, rank=process, world_size=processes, device_id=device
        )
    except dist.DistBackendError:
        raise  # they have found each other, but NCCL cannot connect them: `explained` keeps its words
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the processes cannot find each other at {url}: {reason}") from None


def _why_no_gpu():
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and torch.version.cuda:
        return f"warning: no GPU with CUDA_VISIBLE_DEVICES={visible}: running on the CPU"
    return "warning: CUDA is not available: running on the CPU"


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def loader_processes(count: int) -> dict[str, Any]:
    """Arguments of a DataLoader that works in `count` processes of its own; 0: in this one.

    A process with threads, such as those of PyTorch, should not be forked: their locks would be copied
    as they are, and Python 3.12 and later warn of it. So the processes are forked from a server that
    has only imported the libraries; without such servers (Windows) each starts from nothing.
    """
    if not count:
        return {"num_workers": 0}
    method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    context = mp.get_context(method)
    if method == "forkserver":
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else NumPy starts threads in the server
        context.set_forkserver_preload(["torch", "torchvision.transforms.v2", "scipy.ndimage"])
    return {
        "num_workers": count,
        "multiprocessing_context": context,
        "worker_init_fn": _end_with_parent,
    }


def _end_with_parent(_):
    """Have this process of a loader end when the one that it works for does, even if that was killed.

    PyTorch looks whether the process that started it still lives, but that is the server.
    """

    def wait():
        mp.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def device() -> torch.device:
    """The device of this process."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def peak_memory() -> float:
    """Peak memory in MiB: allocated on the GPU, else resident in this process (without workers)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    highest = re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else "")
    if highest:
        return int(highest[1]) / 2**10
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes are here.

    However long one of them takes, for a download or an index: NCCL's own barrier would give up after
    ten minutes. They count themselves in the store, and sleep in between, so that a signal ends them.
    """
    global _barriers
    if not dist.is_initialized():
        return
    _barriers += 1
    arrived, complete = f"barrier {_barriers}", f"barrier {_barriers} complete"
    if _store.add(arrived, 1) == world_size():
        _store.set(complete, "")
    while not _store.check([complete]):
        time.sleep(0.01)


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, summed in place over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_max(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, in place its maximum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Give all processes the first one's values, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather(item) -> list:
    """The items of all processes, in the order of their ranks, in every process."""
    if not dist.is_initialized():
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def first_process_first(work: Callable):
    """work(), in the first process before the others: what it caches, they find.

    Returns what work() returns in this process. The others wait as long as the first one takes.
    """
    if rank() == 0:
        result = work()
    barrier()
    if rank() != 0:
        result = work()
    return result
