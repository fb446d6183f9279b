"""The executor that a word of the command line stands for."""

import re

from lorary.errors import UsageError
from lorary.numbers import check_count
from lorary.train.executor import Executor, LocalExecutor
from lorary.train.process_pool import ProcessExecutor, worker_devices


def make_executor(reference: str, *, workers: int | None = None, device: str = "auto", debug: bool = False) -> Executor:
    """The executor that a word stands for.

    Args:
        reference: 'local'; 'ray' (the cluster in RAY_ADDRESS, or one started on this machine for the run alone);
            'ray://auto' (the cluster this machine belongs to); 'ray://HOST' or 'ray://HOST:PORT' (Ray Client).
        workers: processes that train. Where None, 'local' trains in this one, and Ray has one per GPU of the cluster,
            or per machine where it has none.
        device: for processes of this machine, see `worker_devices`.
        debug: show tracebacks and Ray's own log too.

    Raises:
        UsageError: if there is no such executor, or fewer than one worker.
        MissingExtraError: if Ray is asked for and not installed.
    """
    if workers is not None:
        check_count("--workers", workers)
    if reference == "local":
        if workers is None:
            return LocalExecutor()
        return ProcessExecutor(worker_devices(device, workers), debug=debug)
    if not re.fullmatch(r"ray|ray://[^/\s]+/?", reference):
        raise UsageError("--executor must be local, ray, ray://auto or ray://HOST[:PORT]", found=reference)
    # Ray's part is imported for those who ask for it, since the package is an extra.
    from lorary.train.ray_pool import RayExecutor

    address = {"ray": None, "ray://auto": "auto"}.get(reference.rstrip("/"), reference.rstrip("/"))
    return RayExecutor(address, workers, debug=debug)
