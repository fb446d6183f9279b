"""What runs in a worker process of this machine: `python -m lorary.train.process_worker DESCRIPTOR`.

It works on shards, one at a time, and stays: what the work caches, such as the base, serves the next shard. It ends
with the process that started it, however that ends, since another build may work on the library then.
"""

import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection

from lorary.train.attempts import attempt


def serve(connection: Connection) -> None:
    """Answer each piece of work with its `WorkerFailure`, or None, until nobody asks any more.

    Args:
        connection: on which work, shard and device come, pickled.
    """
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        connection.send(attempt(_work, message))


def _work(message: bytes) -> None:
    work, shard, device = pickle.loads(message)  # from the process that started this one, and nobody else
    if device.startswith("cuda"):
        import torch

        # What is asked for without a number, by torch itself too, would take memory of the first device.
        torch.cuda.set_device(device)
    work(shard.on(device))


def _end_with_parent() -> None:
    """The parent holds the other end of stdin, which the system closes when it is gone."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    # A process that was started in the background may have been told to ignore it, and so would this one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        serve(Connection(int(sys.argv[1])))
    except KeyboardInterrupt:  # the work has kept what it could
        sys.exit(130)
