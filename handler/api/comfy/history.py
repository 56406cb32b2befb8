"""What became of prompts, of this worker's and of others': ComfyUI's history and its jobs, asked for and removed."""

from collections.abc import Mapping
from typing import Any

from handler.api.comfy.accepting import ID
from handler.api.comfy.archive import tried
from handler.api.comfy.job import LIVE, Record, entry, summary
from handler.api.comfy.service import Comfy

PAGE = 1_000  # jobs that one answer lists, at most
WHAT = "jobs of other workers cannot be told"


async def found(comfy: Comfy, prompt_id: str) -> Record | None:
    """A prompt's record, whoever had it."""
    if job := comfy.find(prompt_id):
        return job.record()
    if not ID.fullmatch(prompt_id):
        return None
    return await tried(comfy.archive.at(lambda _: comfy.archive.record(prompt_id)), None, WHAT)


async def every(comfy: Comfy) -> dict[str, Record]:
    """All records by id, the oldest first; what this worker does is known best to itself."""
    kept: dict[str, Record] = await tried(comfy.archive.at(lambda _: comfy.archive.records()), {}, WHAT)
    own = {job.id: job.record() for job in comfy.jobs()}
    return dict(sorted((kept | own).items(), key=lambda one: one[1]["created"]))


async def history(comfy: Comfy, most: int | None, offset: int) -> dict[str, Any]:
    """Prompts that have ended, oldest first: `most` of them from the place `offset` on, or the last ones if that is -1.

    As ComfyUI has it.
    """
    ended = [(prompt_id, shown) for prompt_id, record in (await every(comfy)).items() if (shown := entry(record))]
    if most is None:
        return dict(ended[max(offset, 0) :])
    start = max(len(ended) - most, 0) if offset < 0 else offset
    return dict(ended[start : start + max(most, 1)])


async def one(comfy: Comfy, prompt_id: str) -> dict[str, Any]:
    """One prompt that has ended; empty if there is none, or it has not."""
    record = await found(comfy, prompt_id)
    shown = entry(record) if record else None
    return {prompt_id: shown} if shown else {}


async def forget(comfy: Comfy, ids: list[str] | None) -> None:
    """Remove prompts that have ended from the history, or all if None."""
    if ids is None:
        ids = [prompt_id for prompt_id, record in (await every(comfy)).items() if record["state"] not in LIVE]
    chosen = [prompt_id for prompt_id in ids if ID.fullmatch(prompt_id) and prompt_id not in comfy.active]
    comfy.forget(*chosen)
    await tried(comfy.archive.at(lambda _: comfy.archive.forget(*chosen)), None, "history could not be cleared")


async def jobs(comfy: Comfy, states: tuple[str, ...], most: int, offset: int, newest: bool) -> dict[str, Any]:
    """A page of /api/jobs: of the `states` that are named, or all."""
    listed = [summary(record) for record in (await every(comfy)).values()]
    listed = [one for one in listed if not states or one["status"] in states]
    if newest:
        listed.reverse()
    page = listed[offset : offset + most]
    more = offset + len(page) < len(listed)
    return {"jobs": page, "pagination": {"offset": offset, "limit": most, "total": len(listed), "has_more": more}}


def queue(comfy: Comfy) -> Mapping[str, Any]:
    """The prompts of this worker that have not ended."""
    jobs = [*comfy.active.values()]
    return {
        "queue_running": [job.item for job in jobs if job.state == "in_progress"],
        "queue_pending": [job.item for job in jobs if job.state == "pending"],
    }


def interrupt(comfy: Comfy, prompt_id: str | None) -> None:
    """Stop what is drawn; or the prompt `id`, be it drawn or waiting."""
    for job in [*comfy.active.values()]:
        if job.id == prompt_id or (prompt_id is None and job.state == "in_progress"):
            comfy.cancel(job)


def take(comfy: Comfy, ids: list[str] | None) -> None:
    """Take prompts that wait from the queue, or all of those if None."""
    for job in [*comfy.active.values()]:
        if job.state == "pending" and (ids is None or job.id in ids):
            comfy.cancel(job)


def cancelled(comfy: Comfy, ids: list[str]) -> bool:
    """Stop these prompts, be they drawn or waiting; whether there was one to stop."""
    chosen = [comfy.active[prompt_id] for prompt_id in ids if prompt_id in comfy.active]
    for job in chosen:
        comfy.cancel(job)
    return bool(chosen)
