"""Child processes that run the vendors' compilers: a bad kernel may take one down, and several compile at once."""

import contextlib
import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pallas_kernels.aot import _worker

# What a child compiles, and what it found out.
Task = dict[str, Any]


class Crew:
    """Child processes that compile, and the threads that wait for them."""

    def __init__(self, workers: int, timeout: float):
        self._pool = ThreadPoolExecutor(workers)
        # Other CPUs may be at work on the like, and need theirs.
        share = max(workers, os.cpu_count() or 1)
        self._memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4 // share
        self._timeout = timeout
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._busy: list[_Child] = []
        self._asked: dict[bytes, Future[Task]] = {}
        self._closed = False

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            children = (*self._idle, *self._busy)
            for child in children:
                child.kill()
        self._pool.shutdown(cancel_futures=True)
        for child in children:
            child.close()

    def submit(self, purpose: str, task: Task, work: Callable[[Task], Task]) -> Future[Task]:
        """What `work` will find out of the task: the same for the same purpose, so that equal kernels compile once."""
        key = hashlib.sha256(pickle.dumps((purpose, task))).digest()
        if key not in self._asked:
            self._asked[key] = self._pool.submit(work, task)
        return self._asked[key]

    def ask(self, mode: str, task: Task) -> Task:
        """The reply of a child of that mode; a crash or a time-out is a reply with an error."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the crew has gone home")
            child = next((c for c in self._idle if c.mode == mode), None)
            if child:
                self._idle.remove(child)
            else:
                child = _Child(mode, self._memory)
            self._busy.append(child)
        reply = child.ask(task, self._timeout)
        with self._lock:
            self._busy.remove(child)
            if child.alive:
                self._idle.append(child)
            else:
                child.close()
        return reply


class _Child:
    def __init__(self, mode: str, memory: int):
        self.mode = mode
        self.alive = True
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        # Out of the reach of Ctrl-C: that is for the parent, which then kills its children.
        self._process = subprocess.Popen(
            [sys.executable, "-P", _worker.__file__, mode, str(memory), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let go of a child that has ended, or is about to."""
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):  # closing flushes what nobody reads any more
                file.close()  # pyright: ignore[reportOptionalMemberAccess]

    def ask(self, task: Task, timeout: float) -> Task:
        assert self._process.stdin and self._process.stdout
        heard = os.fstat(self._log.fileno()).st_size
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: (late.set(), self._process.kill()))
        timer.start()
        try:
            pickle.dump(task, self._process.stdin)
            self._process.stdin.flush()
            reply = pickle.load(self._process.stdout)
            self.alive = not reply.pop("last", False)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.alive = False
            reply = {"error": f"the compiler died ({self._cause_of_death()})", "died": True}
        finally:
            timer.cancel()
        if late.is_set():
            reply = {"error": f"the compiler took more than {timeout:.0f} s", "died": True}
        elif "error" in reply:
            log = os.pread(self._log.fileno(), 2**24, heard).decode(errors="replace")
            reply["error"] = one_line(": ".join([reply["error"], *_LAST_WORDS.findall(log)[-1:]]))
        return reply

    def _cause_of_death(self) -> str:
        status = self._process.wait()
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"


# What compilers write to standard error before they give up.
_LAST_WORDS = re.compile(
    r"(?:^F\d{4} [^]]*\] |(?=Check failed|LLVM ERROR|Assertion|Pipeline failed while executing))(.*)",
    re.MULTILINE,
)


def one_line(text: str, limit: int = 300) -> str:
    text = re.sub(r" for %\S+ = .*?}\. ", ". ", text, flags=re.DOTALL)  # XLA quotes a whole instruction
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]}..."
