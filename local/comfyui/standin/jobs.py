"""GET /api/jobs and /api/jobs/{id}: queue and history as one list (server.py, comfy_execution/jobs.py of 0.18.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .prompt_queue import Item

Job = dict[str, Any]

STATUSES = ("pending", "in_progress", "completed", "failed", "cancelled")
_WITH_PREVIEW = {"images", "video", "audio", "3d", "text"}
_TEXT_PREVIEW_CHARS = 1024
_SORT_KEYS = {"created_at", "execution_duration"}


class BadQueryError(ValueError):
    """A parameter that the listing refuses, in ComfyUI's words."""


def listing(query: Mapping[str, str], running: list[Item], pending: list[Item], history: dict[str, Any]) -> Job:
    """The answer to GET /api/jobs. Raises BadQueryError."""
    wanted = _statuses(query.get("status"))
    sort_by = query.get("sort_by", "created_at").lower()
    order = query.get("sort_order", "desc").lower()
    if sort_by not in _SORT_KEYS:
        raise BadQueryError("sort_by must be 'created_at' or 'execution_duration'")
    if order not in ("asc", "desc"):
        raise BadQueryError("sort_order must be 'asc' or 'desc'")
    limit = _integer(query, "limit")
    if limit is not None and limit <= 0:
        raise BadQueryError("limit must be a positive integer")
    offset = max(0, _integer(query, "offset") or 0)
    jobs = [_queued(item, "in_progress") for item in running] + [_queued(item, "pending") for item in pending]
    jobs += [_finished(prompt_id, entry) for prompt_id, entry in history.items()]
    jobs = [job for job in jobs if job["status"] in wanted]
    if "workflow_id" in query:
        jobs = [job for job in jobs if job.get("workflow_id") == query["workflow_id"]]
    jobs.sort(key=_duration_ms if sort_by == "execution_duration" else _created, reverse=order == "desc")
    page = jobs[offset:][:limit]
    paging = {"offset": offset, "limit": limit, "total": len(jobs), "has_more": offset + len(page) < len(jobs)}
    return {"jobs": page, "pagination": paging}


def one(prompt_id: str, running: list[Item], pending: list[Item], history: dict[str, Any]) -> Job | None:
    """The answer to GET /api/jobs/{id}: with outputs, status and workflow once it is finished."""
    if prompt_id in history:
        entry = history[prompt_id]
        details = {"outputs": entry["outputs"], "execution_status": entry["status"]}
        workflow = {"prompt": entry["prompt"][2], "extra_data": entry["prompt"][3]}
        return {**_finished(prompt_id, entry), **details, "workflow": workflow}
    for items, status in ((running, "in_progress"), (pending, "pending")):
        for item in items:
            if item[1] == prompt_id:
                return _queued(item, status)
    return None


def _statuses(given: str | None) -> tuple[str, ...] | list[str]:
    names = [name.strip().lower() for name in (given or "").split(",") if name.strip()]
    unknown = [name for name in names if name not in STATUSES]
    if unknown:
        raise BadQueryError(f"Invalid status value(s): {', '.join(unknown)}. Valid values: {', '.join(STATUSES)}")
    return names if given else STATUSES


def _integer(query: Mapping[str, str], name: str) -> int | None:
    try:
        return int(query[name]) if name in query else None
    except ValueError as failure:
        raise BadQueryError(f"{name} must be an integer") from failure


def _created(job: Job) -> float:
    return float(job.get("create_time", 0))


def _duration_ms(job: Job) -> float:
    return float(job.get("execution_end_time", 0) - job.get("execution_start_time", 0))


def _queued(item: Item, status: str) -> Job:
    return {**_identity(item[1], item[0], item[3], status), "outputs_count": 0}


def _identity(prompt_id: str, number: float, extra_data: dict[str, Any], status: str) -> Job:
    workflow_id = extra_data.get("extra_pnginfo", {}).get("workflow", {}).get("id")
    job = {"id": prompt_id, "status": status, "priority": number, "create_time": extra_data.get("create_time")}
    return _without_none({**job, "workflow_id": workflow_id})


def _finished(prompt_id: str, entry: dict[str, Any]) -> Job:
    status = entry["status"]
    ended: Job = {}
    outcome = "completed" if status["status_str"] == "success" else "failed"
    for event, data in status["messages"]:
        if event == "execution_start":
            ended["execution_start_time"] = data["timestamp"]
        if event in ("execution_success", "execution_error", "execution_interrupted"):
            ended["execution_end_time"] = data["timestamp"]
        if event == "execution_error":
            ended["execution_error"] = data
        if event == "execution_interrupted":
            outcome = "cancelled"
    number, _, _, extra_data, _ = entry["prompt"]
    found = list(_outputs(entry["outputs"]))
    previews = [preview for _, preview in found if preview]
    saved = [preview for preview in previews if preview.get("type") == "output"]
    summary = {"outputs_count": len(found), "preview_output": next(iter(saved or previews), None)}
    return {**_identity(prompt_id, number, extra_data, outcome), **ended, **_without_none(summary)}


def _outputs(outputs: dict[str, Any]) -> Iterator[tuple[Any, Job | None]]:
    """(item, what a preview of it would say) of all files and texts."""
    for node_id, by_kind in outputs.items():
        for kind, items in by_kind.items():
            if kind == "animated" or not isinstance(items, list):
                continue
            place = {"nodeId": node_id, "mediaType": kind}
            for item in items:
                if isinstance(item, dict):
                    yield item, {**item, **place} if kind in _WITH_PREVIEW else None
                elif kind == "text":
                    content = str(item)
                    shortened = {"truncated": True} if len(content) > _TEXT_PREVIEW_CHARS else {}
                    yield item, {"content": content[:_TEXT_PREVIEW_CHARS], **shortened, **place}


def _without_none(values: Job) -> Job:
    return {name: value for name, value in values.items() if value is not None}
