"""Processes that run a function of a module together, as under torchrun, again and again."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from forked import context


class Ranks:
    """`world` processes of one thread each. `run(fn, *args)` calls `fn(*args)` in all, and returns what each returns;
    `fn` is a function of a module that they can import."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, fn: Callable[..., Any], *args: Any, seconds: float = 240.0) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((fn, args))
        found = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(seconds):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.world} said nothing for {seconds} s")
            good, value = pipe.recv()
            found.append((good, value))
        for rank, (good, value) in enumerate(found):
            if not good:
                self.close()  # what the others wait for does not come
                raise AssertionError(f"rank {rank} of {self.world}:\n{value}")
        return [value for _, value in found]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = context()
        for rank in range(self.world):
            ours, theirs = started.Pipe()
            said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "MASTER_PORT": port}
            process = started.Process(target=_serve, args=(theirs, said), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)


def _serve(pipe: Connection, said: dict[str, int]) -> None:
    os.environ |= {name: str(value) for name, value in said.items()} | {"MASTER_ADDR": "127.0.0.1"}
    import torch

    torch.set_num_threads(1)
    while True:
        fn, args = pipe.recv()
        try:
            pipe.send((True, fn(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
