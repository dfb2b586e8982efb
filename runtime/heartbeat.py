"""Every process says through the store, again and again, that it lives and what it is at; so that an error names who died.

Three threads have a part in it:
    main        what it is at (:func:`watched`); where a collective fails there, it waits for the others' last words
    beats       all traffic with the store, which may never answer: that of a stopped process does not
    last        ends the process where the main thread does not, as in a wait of NCCL's

With T = ``timeout_s``: a beat each T / 30, at most 1 s; who gives none for T / 8, at most 7.5 s, is silent. Gloo's waits
end after T / 2 (``runtime/process_group.py``); the others are then listened to for T / 6, at most 10 s, and the process
that hosts the store stays as long for them: 5/6 T in all. Where the main thread is in one phase for T / 4, others are
looked after, and where it stays in it for 0.3 T more after a fault is known, the process ends: T / 4 + T / 8 + 0.3 T. The one
that hosts the store stays T / 8 longer, since the others can hear of the fault no later: 0.8 T.
"""

import atexit
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from deepfuse.ir.private import default_store
from deepfuse.runtime.blame import Beat, RankError, blame, ranks, where
from deepfuse.runtime.idle import Idle
from deepfuse.runtime.told_once import everywhere

BAD = ("lost", "failed")
"""Last words after which the others' collectives with a process fail."""

OF_COLLECTIVES = ("gloo/", "NCCL", "Application timeout caused pair closure")
"""In the text of a collective's error. The last is all that Gloo says to those in flight while another one waits too long."""


class Doing:
    """What a thread is at: phase ``""`` is outside of any."""

    __slots__ = ("began", "long", "native", "phase", "step", "thread")

    def __init__(self, phase: str, step: int | None, long: bool = False):
        self.phase, self.step, self.long = phase, step, long
        self.began, self.thread, self.native = time.monotonic(), threading.get_ident(), threading.get_native_id()


class Heartbeat:
    """The beats of this process, and its knowledge of the others'."""

    made = 0

    def __init__(self, timeout_s: float, client: dist.Store):
        """Beat, and wait for the first beat of all others.

        Args:
            timeout_s: as of :func:`start`.
            client: of the store, for this alone: one is locked as long as somebody waits.

        Raises:
            RuntimeError: it did not come in ``timeout_s``.
        """
        self.timeout_s = timeout_s
        self.interval = min(timeout_s / 30, 1.0)
        self.silence, self.settle = min(timeout_s / 8, 7.5), min(timeout_s / 6, 10.0)
        self.rank = dist.get_rank()
        self.others = [r for r in range(dist.get_world_size()) if r != self.rank]
        # the store lives as long as this reference, also where the group is destroyed before others are done
        self._met_over, self._client = default_store(), client
        Heartbeat.made += 1
        self._store = dist.PrefixStore(f"deepfuse/beats{Heartbeat.made}", client)
        self._doing, self._idle = Doing("", None), Idle()
        self._end: Mapping[str, Any] = {}
        self._count = 0
        self._heard: dict[int, tuple[Beat, float]] = {}
        self._looked = 0.0
        self._flagged, self._stopping, self._store_lost = False, False, False
        self._asked: float | None = None
        self._wake, self._changed = threading.Event(), threading.Condition()
        self._meet()
        self._beats = threading.Thread(target=self._beat, name="deepfuse beats", daemon=True)
        self._last = threading.Thread(target=self._watch, name="deepfuse last", daemon=True)
        self._beats.start()
        self._last.start()

    def _meet(self) -> None:
        self._store.set(str(self.rank), self._own({}).write())
        names = [str(r) for r in self.others]
        try:
            self._store.wait(names, timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            try:
                missing = [r for r in self.others if not self._store.check([str(r)])]
            except RuntimeError:
                missing = [0]
            raise RuntimeError(
                f"heartbeat: want all {len(self.others) + 1} processes within {self.timeout_s:g} s, got no beat of "
                f"{ranks(missing)}"
            ) from error

    def watched(self, phase: str, step: int | None = None, *, long: bool = False) -> "Watched":
        return Watched(self, phase, step, long)

    def _own(self, end: Mapping[str, Any]) -> Beat:
        doing = self._doing
        self._count += 1
        return Beat(
            count=self._count,
            step=doing.step,
            phase=doing.phase,
            seconds=time.monotonic() - doing.began,
            long=doing.long,
            idle=self._idle.seconds(doing.native) if doing.long else 0.0,
            place=place(doing.thread),
            **end,
        )

    def _beat(self) -> None:
        told: Mapping[str, Any] | None = None
        # nothing after the last word: who hosts the store goes when it has been heard
        while not (self._stopping and told is self._end):
            self._wake.clear()
            self._asked = time.monotonic()
            end = self._end
            try:
                self._exchange(end)
            except RuntimeError:
                with self._changed:
                    self._store_lost = True
                    self._changed.notify_all()
                return
            told, self._asked = end, None
            if not self._stopping:
                self._wake.wait(self.interval)

    def _exchange(self, end: Mapping[str, Any]) -> None:
        self._store.set(str(self.rank), self._own(end).write())
        bad = end.get("end") in BAD
        if bad:
            self._store.set("fault", "")
        elif self._flagged:  # its error was caught, and it goes on
            self._store.delete_key("fault")
        self._flagged = bad
        # a question with an answer: what is only sent is not known to have arrived
        flag = self._store.check(["fault"])
        # all beats are many: they are read when there is a reason, also to hear that one who failed goes on
        failed = any(beat.end in BAD for beat, _ in self._heard.values())
        if not (flag or end or failed or self._lasts(self._doing)):
            return
        texts = self._store.multi_get([str(r) for r in self.others])
        with self._changed:
            now = self._looked = time.monotonic()
            for r, text in zip(self.others, texts, strict=True):
                beat = Beat.read(text)
                if r not in self._heard or self._heard[r][0].count != beat.count:
                    self._heard[r] = beat, now
            self._changed.notify_all()

    def _known(self) -> tuple[tuple[int, ...], str]:
        """:func:`blame`, of what is known now."""
        beats = {r: self._heard[r][0] if r in self._heard else None for r in self.others}
        silent = [r for r in self.others if self._silent(r)]
        return blame(beats, silent, self.rank, store_lost=self._no_answer(), agent=agents_store())

    def _silent(self, r: int) -> bool:
        # by when they were last looked at: as long as the store does not answer, nobody's silence means anything
        return r in self._heard and self._looked - self._heard[r][1] > self.silence

    def _no_answer(self) -> bool:
        asked = self._asked
        return self._store_lost or (asked is not None and time.monotonic() - asked > self.silence)

    def fault(self) -> bool:
        """Whether something has happened to another process."""
        # a copy, as the other thread adds to it
        ended = any(beat.end in BAD for beat, _ in list(self._heard.values()))
        return ended or self._no_answer() or any(map(self._silent, self.others))

    def _listen(self, done: Callable[[Beat], bool]) -> None:
        """Wait until all others that are not silent have said a last word, or nobody can hear it."""
        first: dict[int, int] = {}

        def told(r: int) -> bool:
            return self._no_answer() or (r in self._heard and (done(self._heard[r][0]) or self._silent(r)))

        def known(r: int) -> bool:
            if r not in self._heard:
                return told(r)
            count = self._heard[r][0].count
            return count > first.setdefault(r, count) or told(r)

        def all_known() -> bool:
            return all(list(map(known, self.others)))  # each is asked, to note what it is at first

        with self._changed:
            self._changed.wait_for(lambda: all_known() and all(map(told, self.others)), self.settle)
            # on a busy machine this process may have looked too seldom to tell who lives from who is silent
            self._changed.wait_for(all_known, self.settle)

    def failed(self, error: BaseException, *, by_itself: bool) -> None:
        """An error that no other process made: they are told. It may be caught, and the next phase takes it back."""
        self._say(end="failed" if by_itself else "left", reason=first_line(error))

    def lost(self, error: BaseException, doing: Doing) -> RankError:
        """What a collective's error comes from: listens to the others, which know as much in the same time."""
        self._say(end="lost", reason=first_line(error))
        self._listen(lambda beat: beat.end != "")
        blamed, why = self._known()
        self._say(end="lost", reason=first_line(error), blamed=blamed)
        if self.rank == 0:  # others may still be listening, and this process has the store
            self._listen(lambda beat: beat.blamed is not None or beat.end in ("failed", "left"))
        text = f"{where(doing.step, doing.phase)}: want all processes, got: {why}"
        if blamed and blamed != (self.rank,):
            text += f"; see what {ranks(blamed)} printed"
        return RankError(text, ranks=blamed, step=doing.step, phase=doing.phase)

    def _lasts(self, doing: Doing) -> bool:
        return doing.phase != "" and time.monotonic() - doing.began > self.timeout_s / 4

    def _say(self, **end: Any) -> None:
        self._end = end
        self._wake.set()

    def _watch(self) -> None:
        stuck: Doing | None = None
        since = 0.0
        while not self._stopping:
            time.sleep(self.interval)
            doing, now = self._doing, time.monotonic()
            if not doing.phase or self._end:
                continue
            if not self.fault():
                stuck = None
            elif doing is not stuck:
                stuck, since = doing, now
            elif now - since > 0.3 * self.timeout_s:
                self._exit(doing)

    def _exit(self, doing: Doing) -> NoReturn:
        _, why = self._known()
        text = (
            f"deepfuse: rank {self.rank} ends in {where(doing.step, doing.phase)}, at {place(doing.thread)}: want all "
            f"processes, got: {why}\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        if self.rank == 0:
            # others read in its store why
            time.sleep(self.timeout_s / 8)
        os._exit(1)

    def stop(self, *, patiently: bool = True) -> None:
        """Beat no more; ``patiently``, the process that hosts the store waits until the others do not need it."""
        host = patiently and self.rank == 0
        self._stopping = not host
        if not self._end:
            error = getattr(sys, "last_value", None)
            self._say(end="failed", reason=first_line(error)) if error is not None else self._say(end="left")
            if host:
                self._listen(lambda beat: beat.end != "")
        self._stopping = True
        self._wake.set()
        self._beats.join(0.0 if self._no_answer() and not self._store_lost else self.settle)
        if self._beats.is_alive() and self._end["end"] in BAD:
            # it may come back from the store while the interpreter ends, which would abort
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(1)


class Watched:
    """A part of a step; see :func:`watched`."""

    __slots__ = ("before", "heartbeat", "now")

    def __init__(self, heartbeat: Heartbeat, phase: str, step: int | None, long: bool):
        self.heartbeat, self.before = heartbeat, heartbeat._doing
        self.now = Doing(phase, self.before.step if step is None else step, long or self.before.long)

    def __enter__(self) -> None:
        self.heartbeat._doing, self.heartbeat._end = self.now, {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or isinstance(error, RankError) or everywhere(error):
                return
            if of_a_collective(error):
                raise self.heartbeat.lost(error, self.now) from error
            by_itself = isinstance(error, Exception)
            if not (self.now.long and by_itself):  # told at a meeting
                self.heartbeat.failed(error, by_itself=by_itself)
        finally:
            self.before.step = self.now.step
            self.heartbeat._doing = self.before


_running: Heartbeat | None = None
_unwatched = contextlib.nullcontext()


def start(timeout_s: float) -> None:
    """Beat from now on, until the program ends; where this process is alone, nothing. All processes come here at once.

    Args:
        timeout_s: seconds after which a process that waits for another in vain has ended.

    Raises:
        RuntimeError: others did not come.
    """
    global _running
    if alone():
        return
    if _running is None:
        atexit.register(_stop)
        client = default_store().clone()
    else:
        _running.stop(patiently=False)
        same = _running._met_over is default_store()
        client = _running._client if same else default_store().clone()
    _running = Heartbeat(timeout_s, client)


def alone() -> bool:
    """Whether there is no other process to hear of: those of the fake backend are none."""
    return not dist.is_initialized() or dist.get_world_size() == 1 or "fake" in dist.get_backend_config()


def running() -> bool:
    """Whether this process beats."""
    return _running is not None


def fault() -> bool:
    """Whether another process is known to be lost; others are looked after once a phase lasts."""
    return _running is not None and _running.fault()


def last_step() -> int | None:
    """The step that this process is in, or was in last."""
    return None if _running is None else _running._doing.step


def last_of(rank: int) -> Beat | None:
    """The last beat of another process, where its beats are looked at: once a phase lasts."""
    heard = None if _running is None else _running._heard.get(rank)
    return None if heard is None else heard[0]


def _stop() -> None:
    if _running is not None:
        _running.stop()


def watched(phase: str, step: int | None = None, *, long: bool = False) -> contextlib.AbstractContextManager[None]:
    """Inside, an error of a collective becomes a :class:`RankError` that names the rank to blame, and the step.

    Args:
        phase: of the step: ``dispatch``, ``backward``, ...
        step: number of it; that of the ``watched`` around this one where ``None``.
        long: whether others wait for it as long as it takes, and are told of its errors at a meeting (:mod:`.verdict`).

    Without a heartbeat of several processes (:func:`start`) it does nothing.
    """
    return _unwatched if _running is None else _running.watched(phase, step, long=long)


def of_a_collective(error: BaseException) -> bool:
    """Whether it comes from the connection to other processes: Gloo's errors are known by their text alone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OF_COLLECTIVES)


def place(thread: int) -> str:
    """The innermost line of code a thread is at that is neither torch's nor of this file."""
    here = sys._current_frames().get(thread)
    skipped = (os.path.dirname(torch.__file__) + os.sep, __file__, threading.__file__)
    while here is not None and here.f_code.co_filename.startswith(skipped):
        here = here.f_back
    return "" if here is None else f"{here.f_code.co_filename}:{here.f_lineno} in {here.f_code.co_name}"


def first_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().partition("\n")[0]


def agents_store() -> bool:
    """Whether torchrun's agent hosts the store, which then outlives any rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
