"""The jobs of one worker: accepted, drawn in the order of the engine's queue, kept where other workers see them."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from handler.api.dispatch import Api
from handler.api.jobs.job import ID, Found, Job, read
from handler.api.jobs.webhooks import Webhooks
from handler.api.keeping import Keeper
from handler.api.outgoing import Target
from handler.api.reply import Reply, answered, error_reply
from handler.api.showing import OnPartial
from handler.core.deadline import Deadline
from handler.core.errors import Cancelled, FileMissing, NotReady, QueueFull
from handler.core.untrusted import parse
from handler.engine.intake import STOPPING
from handler.engine.queue import crowded

WATCH_S = 5.0  # between two times that how far a job is gets kept, and that it is looked whether it is wanted still
CANCEL_S = 10.0  # for which a cancelled job's end is waited for
TOLD = 64 << 10  # bytes of an answer that a webhook is told; a larger one is to be asked for
ENDS_S = 2.0  # for which who waits for a job is told that its worker ends
OnEnd = Callable[[Job], object]


class Jobs:
    """All of them. For one event loop. `active` are those that wait or are drawn, by id."""

    def __init__(self, api: Api) -> None:
        settings = api.engine.settings
        self.api, self.webhooks = api, Webhooks(settings)
        self.active: dict[str, Job] = {}
        self._keeper, self._kept_s = Keeper(settings, "jobs"), settings.kept_s
        self._tasks = set[asyncio.Task[None]]()

    @property
    def busy(self) -> bool:
        """Whether a job has not ended, or somebody is just being told that one has."""
        return bool(self.active or self.webhooks.trying)

    def hurry(self) -> None:
        """Let all jobs end with what is there."""
        for job in self.active.values():
            job.deadline.hurry()

    async def post(
        self, path: str, payload: Any, deadline: Deadline, base: str, webhook: Target | None, on_end: OnEnd
    ) -> Found:
        """Accept what `payload` asks of a drawing route, to have ended by `deadline`. Raises what refuses it.

        `on_end` gets it when it has. If whoever asks goes away before it is accepted, it is not drawn.
        """
        asked = await self.api.asked(path, payload, deadline, streams=True, base=base)
        self.api.validate(asked.request)
        self._require_room(deadline)
        job = Job(path, asked, deadline, webhook)
        accepted = Found(job.head())  # though it may have ended before who asks hears of it
        self.active[job.id] = job
        self._begin(self._run(job, on_end))
        try:
            await self._keep(job)
        except asyncio.CancelledError:
            self._stop(job)
            raise
        return accepted

    async def found(self, job_id: str) -> Found:
        """A job, whichever worker has it. FileMissing if there is none, or no more."""
        if job := self.active.get(job_id):  # which may have ended, and not be kept yet
            return Found(job.head(), await asyncio.to_thread(job.answer) if job.reply else b"")
        data = await self._keeper.get(job_id) if ID.fullmatch(job_id) else None
        found = await asyncio.to_thread(read, data, self._kept_s) if data is not None else None
        if found is None:
            raise FileMissing("There is no such job, or it is no longer kept.", "job_id")
        return found

    async def cancel(self, job_id: str) -> Found:
        """Stop a job, be it waiting or drawn, here at once, elsewhere soon; what has ended stays as it is."""
        if job := self.active.get(job_id):
            self._stop(job)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.over.wait(), CANCEL_S)
        elif (found := await self.found(job_id)).live:
            await self._keeper.put(_sign(job_id), b"")
            return found
        return await self.found(job_id)

    async def follow(self, job_id: str, hear: OnPartial) -> Reply:
        """A job's answer, once it has ended; `hear` gets its events meanwhile, and at first the one before."""
        if job := self.active.get(job_id):
            job.ears.add(hear)
            if job.latest:
                hear(job.latest)
            try:
                await job.over.wait()
            finally:
                job.ears.discard(hear)
            assert job.reply
            return job.reply
        while (found := await self.found(job_id)).live:
            await asyncio.sleep(WATCH_S)
        if error := found.head["error"]:
            return Reply(500, {"error": error})
        return Reply(200, await asyncio.to_thread(parse, found.answer))

    def _require_room(self, deadline: Deadline) -> None:
        """Those that have not reached the queue yet count too: they will not be refused there."""
        self.api.require_open(deadline)
        waiting = sum(job.state == "queued" for job in self.active.values())
        if waiting >= self.api.engine.settings.queue:
            raise QueueFull(crowded(waiting))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stop(self, job: Job) -> None:
        job.unwanted, task, job.task = True, job.task, None
        if task:
            task.cancel()

    async def _run(self, job: Job, on_end: OnEnd) -> None:
        """Draw a job, and keep and tell how that went. Cancelled by nobody's wish, it ends with its event loop."""
        watching, job.task = asyncio.create_task(self._watch(job)), asyncio.current_task()
        telling, ends = None, False
        try:
            if job.unwanted:
                raise asyncio.CancelledError
            reply = await answered(self._drawn(job))
        except asyncio.CancelledError:
            ends = not job.unwanted
            reply = error_reply(NotReady(STOPPING) if ends else Cancelled("The job was cancelled."))
        job.task = None  # from here on it cannot be stopped
        job.end(reply)
        async with job.writing:  # what it writes of an earlier state is written before the end is
            watching.cancel()
        try:
            await self._keep(job)
            if job.webhook:
                telling = self.webhooks.begin(job.webhook, f"msg_{job.id}", await asyncio.to_thread(_told, job))
        finally:  # whoever waits for its end waits for no bug of ours
            del self.active[job.id]
            job.over.set()
            on_end(job)
        if ends and telling:  # or it would begin on a loop that closes
            await asyncio.wait({telling}, timeout=ENDS_S)
            telling.cancel()
            await asyncio.wait({telling})

    async def _drawn(self, job: Job) -> Reply:
        loop = asyncio.get_running_loop()

        def soon(act: Callable[..., object], *about: Any) -> None:
            """From the engine's thread: unless it has ended meanwhile, for then all is told."""
            loop.call_soon_threadsafe(lambda: act(*about) if job.reply is None else None)

        return await self.api.answer(
            job.asked,
            job.step,
            lambda event: soon(job.hear, event),
            job.deadline,
            on_begin=lambda: soon(job.begin),
            admitted=True,
        )

    async def _watch(self, job: Job) -> None:
        """Now and then, let others see how far a job is, and see whether it was cancelled elsewhere."""
        before = (job.state, job.done)
        while True:
            await asyncio.sleep(WATCH_S)
            if before != (before := (job.state, job.done)):
                await self._keep(job)
            if await self._keeper.has(_sign(job.id)):
                self._stop(job)

    async def _keep(self, job: Job) -> None:
        """For other workers, and for this one when it has ended."""
        async with job.writing:
            ended = job.reply is not None
            file = await asyncio.to_thread(job.file)
            await self._keeper.put(job.id, file, wanted=lambda: ended or job.reply is None)


def _sign(job_id: str) -> str:
    """That a job is cancelled, for the worker that has it."""
    return f"{job_id}.cancelled"


def _told(job: Job) -> bytes:
    """What a webhook is told of a job that has ended. For a thread."""
    answer = job.answer()
    shown = Found(job.head()).shown(job.asked.base or "")
    data = shown | {"result": json.loads(answer) if answer and len(answer) <= TOLD else None}
    said = {"type": f"job.{job.state}", "timestamp": datetime.now(UTC).isoformat(), "data": data}
    return json.dumps(said).encode()
