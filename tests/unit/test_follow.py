"""One prompt from its POST to its history, against a real stand-in; only what must go wrong is put on by hand."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.comfyui_client import boot
from worker import follow
from worker.comfyui import ComfyUI
from worker.comfyui_server import ComfyUIServer
from worker.control import JobControl
from worker.errors import (
    ComfyUICrashed,
    ComfyUIUnavailable,
    ExecutionFailed,
    GpuBroken,
    HistoryMissing,
    JobCancelled,
    JobTimeout,
    OutOfGpuMemory,
    PromptRejected,
    WorkerError,
)
from worker.feed import Feed, _parse_message
from worker.follow import Progress, PromptRun, RunOutcome
from worker.process import ComfyUIProcess
from worker.ramdisk import RamDisk
from worker.run import NONCE_INPUT, run_workflow

Workflow = dict[str, dict[str, Any]]


class Recording(ComfyUI):
    """The real client; its sleeps are recorded and short, and tests replace single answers."""

    def __init__(self, port: int, process: ComfyUIProcess) -> None:
        self.slept_s = 0.0
        self.submitted: list[Workflow] = []
        self.memory_was_freed = False
        super().__init__(ComfyUIServer(port, process, clock=self.clock, sleep=self.sleep))

    def clock(self) -> float:
        return time.monotonic() + self.slept_s

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds

    def submit(self, workflow: Workflow, *arguments: Any, **more: Any) -> list[str]:
        self.submitted.append(workflow)
        return super().submit(workflow, *arguments, **more)

    def free_memory(self) -> None:
        self.memory_was_freed = True
        super().free_memory()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """A stand-in with a `run` folder as start.sh keeps it; gives its port and the folder of its files."""
    root = tmp_path_factory.mktemp("comfyui")
    with boot(root) as running:
        (root / "run").mkdir()
        (root / "run/comfyui").write_text(f"{running.process.pid} 1\n")
        (root / "run/listened").write_text("1\n")
        yield int(running.base_url.rpartition(":")[2]), root


@pytest.fixture
def comfyui(server: tuple[int, Path]) -> Iterator[Recording]:
    port, root = server
    client = Recording(port, ComfyUIProcess(root / "run"))
    client.server.wait_ready(10)
    yield client
    assert client.queued_ids() == ([], [])
    client.clear_history()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI is asked sooner when its websocket is quiet."""
    monkeypatch.setattr(follow, "QUIET_S", 0.2)


class Kept(RamDisk):
    """One that is not there: ComfyUI has its own folders here, and what it saves stays."""

    def wipe(self, directories: tuple[str, ...] = ()) -> None:
        pass


def run(
    comfyui: ComfyUI,
    workflow: Workflow,
    control: JobControl | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    api_key: str | None = None,
) -> RunOutcome:
    control = control or JobControl(timeout_s=20)
    return run_workflow(
        comfyui,
        workflow,
        control=control,
        on_progress=on_progress,
        interrupt_grace_s=5,
        ramdisk=Kept(Path("/no/ramdisk")),
        api_key=api_key,
    )


def save_workflow(prefix: str = "saved") -> Workflow:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def sleep_workflow(seconds: float) -> Workflow:
    workflow = save_workflow("slept")
    workflow["3"] = {"class_type": "StandinSleep", "inputs": {"image": ["1", 0], "seconds": seconds, "steps": 500}}
    workflow["2"]["inputs"]["images"] = ["3", 0]
    return workflow


def filenames(outcome: RunOutcome) -> list[str]:
    return [entry["filename"] for entry in outcome.outputs["2"]["images"]]


# --- the ordinary way ---


def test_a_workflow_gives_its_outputs_and_progress_that_only_grows(comfyui: Recording) -> None:
    seen: list[Progress] = []
    outcome = run(comfyui, save_workflow("plain"), on_progress=seen.append)
    assert filenames(outcome) == ["plain_00001_.png"]
    assert [(update["node"], update["node_class"]) for update in seen] == [("1", "EmptyImage"), ("2", "SaveImage")]
    percents = [update["percent"] for update in seen]
    assert percents == sorted(percents)
    assert comfyui.slept_s == 0  # nothing was late, so nothing was waited for


def test_a_repeated_workflow_writes_a_new_file_each_time(comfyui: Recording, server: tuple[int, Path]) -> None:
    _, root = server
    for _ in range(3):
        (name,) = filenames(run(comfyui, save_workflow("repeated")))
        (root / "output" / name).unlink()  # fails if ComfyUI answered from its cache


def test_pictures_sent_by_websocket_only_are_collected_each_time(comfyui: Recording) -> None:
    workflow = save_workflow()
    workflow["2"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
    for _ in range(2):
        ((node_id, picture),) = run(comfyui, workflow).socket_images
        assert node_id == "2"
        assert picture.startswith(b"\x89PNG")


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(
    comfyui: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """websocket-client 1.9.2 would ask it even for 127.0.0.1, and the picture would be lost with the websocket."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    workflow = save_workflow()
    workflow["2"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
    assert len(run(comfyui, workflow).socket_images) == 1


# --- the nonce ---


def with_nonce_in(workflow: Workflow) -> list[str]:
    return [node_id for node_id in workflow if NONCE_INPUT in workflow[node_id]["inputs"]]


def test_only_output_nodes_that_nothing_links_from_get_the_nonce(comfyui: Recording) -> None:
    workflow = save_workflow()
    workflow["3"] = {"class_type": "StandinTee", "inputs": {"images": ["1", 0], "filename_prefix": "tee"}}
    workflow["4"] = {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}}  # no output node
    workflow["5"] = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}  # links from an output node
    run(comfyui, workflow)
    (sent,) = comfyui.submitted
    assert with_nonce_in(sent) == ["2", "5"]
    assert isinstance(sent["2"]["inputs"][NONCE_INPUT], str)
    assert with_nonce_in(workflow) == []


def test_one_job_has_one_nonce_and_the_next_another(comfyui: Recording) -> None:
    workflow = save_workflow()
    workflow["3"] = {"class_type": "SaveImage", "inputs": dict(workflow["2"]["inputs"])}
    for _ in range(2):
        run(comfyui, workflow)
    nonces = [{sent[node_id]["inputs"][NONCE_INPUT] for node_id in ("2", "3")} for sent in comfyui.submitted]
    assert [len(nonce) for nonce in nonces] == [1, 1]
    assert nonces[0] != nonces[1]


def strict_workflow(prefix: str) -> Workflow:
    """Its output node claims to take any input and fails when it gets one."""
    workflow = save_workflow(prefix)
    workflow["2"]["class_type"] = "StandinStrict"
    return workflow


def test_a_node_that_cannot_take_the_nonce_is_run_without_and_remembered(comfyui: Recording) -> None:
    assert len(filenames(run(comfyui, strict_workflow("one")))) == 1
    assert len(filenames(run(comfyui, strict_workflow("two")))) == 1
    assert [with_nonce_in(sent) for sent in comfyui.submitted] == [["2"], [], []]
    assert not comfyui.memory_was_freed  # the models stay where they are


def test_a_repeated_workflow_without_the_nonce_runs_again_with_that_of_its_source(
    comfyui: Recording, server: tuple[int, Path]
) -> None:
    _, root = server
    comfyui.note_nonce_refusal("StandinStrict")
    for _ in range(2):
        (name,) = filenames(run(comfyui, strict_workflow("again")))
        (root / "output" / name).unlink()  # fails if ComfyUI answered from its cache
    assert [with_nonce_in(sent) for sent in comfyui.submitted] == [[], [], ["1"]]
    assert not comfyui.memory_was_freed


def test_where_nothing_takes_the_nonce_the_cache_is_emptied(comfyui: Recording, server: tuple[int, Path]) -> None:
    _, root = server
    for class_type in ("StandinStrict", "EmptyImage"):
        comfyui.note_nonce_refusal(class_type)
    for _ in range(2):
        (name,) = filenames(run(comfyui, strict_workflow("last resort")))
        (root / "output" / name).unlink()
    assert comfyui.memory_was_freed


def test_a_preview_that_is_not_returned_costs_no_second_prompt(comfyui: Recording) -> None:
    workflow = save_workflow("behind a preview")
    workflow["7"] = {"class_type": "StandinTee", "inputs": {"images": ["1", 0], "filename_prefix": "tee"}}
    workflow["2"]["inputs"]["images"] = ["7", 0]
    real_complete = PromptRun.complete

    def as_previews(prompt: PromptRun) -> RunOutcome:
        outcome = real_complete(prompt)
        outcome.outputs["7"]["images"][0]["type"] = "temp"
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptRun, "complete", as_previews)
        for _ in range(2):
            run(comfyui, workflow)
    assert len(comfyui.submitted) == 2


@pytest.mark.parametrize(
    ("kind", "words", "node_id"),
    [
        ("ValueError", f"no {NONCE_INPUT} here", "2"),
        ("TypeError", "no such keyword", "2"),
        ("TypeError", f"got an unexpected keyword argument '{NONCE_INPUT}'", "1"),
    ],
)
def test_a_failure_that_only_looks_like_a_refused_nonce_is_a_failure(
    comfyui: Recording, monkeypatch: pytest.MonkeyPatch, kind: str, words: str, node_id: str
) -> None:
    record = failed_record(exception_type=kind, exception_message=words, node_id=node_id)
    monkeypatch.setattr(comfyui, "history", lambda *_: record)
    workflow = save_workflow()
    workflow["2"]["_meta"] = {"title": NONCE_INPUT}
    with pytest.raises(ExecutionFailed):
        run(comfyui, workflow)
    assert len(comfyui.submitted) == 1
    assert comfyui.takes_nonce("SaveImage")


@pytest.mark.parametrize(
    ("cached", "words", "prompts"),
    [
        (["1"], "No such file or directory: '/dev/shm/comfyui/temp/a.wav'", 2),
        ([], "No such file or directory: '/dev/shm/comfyui/temp/a.wav'", 1),
        (["1"], "No such file or directory: '/models/lut.cube'", 1),
    ],
)
def test_a_file_of_an_earlier_job_that_a_cached_node_names_is_made_again(
    comfyui: Recording, monkeypatch: pytest.MonkeyPatch, cached: list[str], words: str, prompts: int
) -> None:
    record = failed_record(exception_type="FileNotFoundError", exception_message=words)
    record["status"]["messages"].insert(0, ["execution_cached", {"nodes": cached}])
    monkeypatch.setattr(comfyui, "history", lambda *_: record)
    with pytest.raises(ExecutionFailed):
        run(comfyui, save_workflow())
    assert [with_nonce_in(sent) for sent in comfyui.submitted] == [["2"], ["1", "2"]][:prompts]


def test_an_output_node_with_consumers_runs_again_where_its_files_are_of_an_earlier_job(
    comfyui: Recording, server: tuple[int, Path]
) -> None:
    _, root = server
    workflow = save_workflow("last")
    workflow["7"] = {"class_type": "StandinTee", "inputs": {"images": ["1", 0], "filename_prefix": "tee"}}
    workflow["2"]["inputs"]["images"] = ["7", 0]
    for _ in range(2):
        outcome = run(comfyui, workflow)
        for node_id in ("2", "7"):
            (entry,) = outcome.outputs[node_id]["images"]
            (root / "output" / entry["filename"]).unlink()
    assert [with_nonce_in(sent) for sent in comfyui.submitted] == [["2"], ["2"], ["2", "7"]]
    assert not comfyui.memory_was_freed


def test_a_cached_node_whose_file_name_another_node_has_used_again_runs_again(
    comfyui: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"filename": "a_00001_.png", "subfolder": "", "type": "output"}
    status = {"status_str": "success", "completed": True, "messages": [["execution_cached", {"nodes": ["1"]}]]}
    record = {"outputs": {"2": {"images": [entry]}, "1": {"images": [entry]}}, "status": status}
    monkeypatch.setattr(comfyui, "history", lambda *_: record)
    run(comfyui, save_workflow())
    assert [with_nonce_in(sent) for sent in comfyui.submitted][:2] == [["2"], ["1", "2"]]


# --- the history ---


def failed_record(outputs: dict[str, Any] | None = None, **error: Any) -> dict[str, Any]:
    message = {"node_id": "2", "node_type": "SaveImage", "traceback": ["  File x\n"], **error}
    status: dict[str, Any] = {"status_str": "error", "completed": False, "messages": [["execution_error", message]]}
    return {"outputs": outputs or {}, "status": status}


@pytest.mark.parametrize("looks", range(6))
def test_a_late_history_is_waited_for_with_growing_pauses(
    comfyui: Recording, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    real_history, asked = comfyui.history, []

    def late(prompt_id: str, *_: float) -> dict[str, Any] | None:
        asked.append(prompt_id)
        return real_history(prompt_id) if len(asked) > looks else None

    monkeypatch.setattr(comfyui, "history", late)
    assert len(filenames(run(comfyui, save_workflow()))) == 1
    assert comfyui.slept_s == pytest.approx(sum([0.010, 0.050, 0.250, 1.250, 6.250][:looks]), abs=0.05)


def test_a_history_that_never_comes_is_a_failure_of_its_own(
    comfyui: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comfyui, "history", lambda *_: None)
    with pytest.raises(HistoryMissing):
        run(comfyui, save_workflow())
    assert comfyui.slept_s == pytest.approx(7.81, abs=0.05)


def test_a_stall_while_the_history_is_read_is_waited_out(comfyui: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    real_history, asked = comfyui.history, []

    def stalls(prompt_id: str, *_: float) -> dict[str, Any] | None:
        asked.append(prompt_id)
        if len(asked) < 4:
            raise ComfyUIUnavailable("ComfyUI did not answer")
        return real_history(prompt_id)

    monkeypatch.setattr(comfyui, "history", stalls)
    assert len(filenames(run(comfyui, save_workflow()))) == 1


def test_a_failure_is_small_whatever_the_node_said(comfyui: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    flood = "x" * 3_000_000
    record = failed_record(exception_type="ValueError", exception_message=flood, traceback=[flood] * 20)
    monkeypatch.setattr(comfyui, "history", lambda *_: record)
    with pytest.raises(ExecutionFailed) as caught:
        run(comfyui, save_workflow())
    assert len(str(caught.value.as_result())) < 20_000


def test_the_status_is_read_before_the_outputs(comfyui: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    record = failed_record(
        {"9": {"images": [{"filename": "from-a-branch-that-finished.png"}]}},
        exception_type="ValueError",
        exception_message="bad\nsecond line",
    )
    monkeypatch.setattr(comfyui, "history", lambda *_: record)
    with pytest.raises(ExecutionFailed) as caught:
        run(comfyui, save_workflow())
    assert caught.value.message == "Node 2 (SaveImage) failed: ValueError: bad"
    assert caught.value.details["exception_message"] == "bad\nsecond line"
    assert caught.value.details["traceback"] == ["  File x"]


@pytest.mark.parametrize(
    ("exception_type", "message", "expected"),
    [
        ("torch.OutOfMemoryError", "Allocation on device", OutOfGpuMemory),
        ("torch.cuda.OutOfMemoryError", "CUDA out of memory", OutOfGpuMemory),
        ("RuntimeError", "CUDA error: out of memory", OutOfGpuMemory),
        ("RuntimeError", "CUDA error: an illegal memory access was encountered", GpuBroken),
        ("ValueError", "no CUDA errors here", ExecutionFailed),
        ("RuntimeError", "mat1 and mat2 shapes cannot be multiplied", ExecutionFailed),
    ],
)
def test_gpu_failures_have_their_own_kind(
    comfyui: Recording,
    monkeypatch: pytest.MonkeyPatch,
    exception_type: str,
    message: str,
    expected: type[WorkerError],
) -> None:
    record = failed_record(exception_type=exception_type, exception_message=message)
    monkeypatch.setattr(comfyui, "history", lambda *_: record)
    with pytest.raises(expected) as caught:
        run(comfyui, save_workflow())
    assert type(caught.value) is expected
    assert caught.value.replace_worker is (expected is GpuBroken)


def test_a_node_that_raises_is_named(comfyui: Recording) -> None:
    with pytest.raises(ExecutionFailed, match=r"Node 2 \(SaveImage\) failed") as caught:
        run(comfyui, save_workflow("../../outside"))
    assert caught.value.details["node_id"] == "2"


def test_a_refused_workflow_is_a_sentence_for_each_node(comfyui: Recording) -> None:
    workflow = save_workflow()
    workflow["1"]["inputs"] |= {"width": -1, "height": "tall"}
    with pytest.raises(PromptRejected) as caught:
        run(comfyui, workflow)
    assert caught.value.message.count("Node 1 (EmptyImage)") == 2
    errors = caught.value.details["node_errors"]["1"]["errors"]
    assert {error["type"] for error in errors} == {"value_smaller_than_min", "invalid_input_type"}
    assert all(set(error) == {"type", "message", "details"} for error in errors)


@pytest.mark.parametrize("class_type", ["NoSuchNode", "..", "a/b?c", "\ud800"])
def test_a_class_that_does_not_exist_is_refused_whatever_its_name(comfyui: Recording, class_type: str) -> None:
    workflow = save_workflow()
    workflow["2"]["class_type"] = class_type
    with pytest.raises(PromptRejected, match="Node ID '#2'"):
        run(comfyui, workflow)


def test_a_partly_valid_workflow_runs_and_warns(comfyui: Recording) -> None:
    workflow = save_workflow("good")
    workflow["9"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "bad"}}
    outcome = run(comfyui, workflow)
    assert len(filenames(outcome)) == 1
    (warning,) = outcome.warnings
    assert warning.startswith("Node 9 (SaveImage): Required input is missing")


def test_a_failure_has_the_nodes_title_and_no_secret(comfyui: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    key, text = "sk-live-0123456789", "a lighthouse at dusk"
    record = failed_record(
        exception_type="HTTPError",
        exception_message=f"401 for key {key}",
        traceback=["  File x, line 1, in run\n", f"    fetch('{text}', key='{key}')\n"],
    )
    monkeypatch.setattr(comfyui, "history", lambda *_: record)
    workflow = save_workflow(text)
    workflow["2"]["_meta"] = {"title": "My saver"}
    with pytest.raises(ExecutionFailed) as caught:
        run(comfyui, workflow, api_key=key)
    assert caught.value.message == 'Node 2 "My saver" (SaveImage) failed: HTTPError: 401 for key ***'
    assert caught.value.details["node_title"] == "My saver"
    assert caught.value.details["traceback"] == ["  File x, line 1, in run", "    fetch('***', key='***')"]


def test_memory_is_freed_after_a_run_that_had_too_little(comfyui: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    record = failed_record(exception_type="torch.OutOfMemoryError", exception_message="Allocation on device")
    monkeypatch.setattr(comfyui, "history", lambda *_: record)
    with pytest.raises(OutOfGpuMemory):
        run(comfyui, save_workflow())
    assert comfyui.memory_was_freed


def test_a_cycle_that_comes_up_in_the_run_is_a_failure_although_the_status_says_success(
    comfyui: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = failed_record(exception_type="graph.DependencyCycleError", exception_message="Dependency cycle detected")
    record["status"] |= {"status_str": "success", "completed": True}
    monkeypatch.setattr(comfyui, "history", lambda *_: record)
    with pytest.raises(ExecutionFailed, match="Dependency cycle detected"):
        run(comfyui, save_workflow())


class Blocks(Feed):
    """A node stops the branches behind it, with a reason, in the middle of the run."""

    told = False

    def receive(self, timeout_s: float) -> bytes | dict[str, Any] | None:
        message = super().receive(timeout_s)
        data = message.get("data") if isinstance(message, dict) else None
        if not self.told and isinstance(data, dict) and "prompt_id" in data:
            self.told = True
            reason = {"exception_type": "ExecutionBlocked", "exception_message": "Execution Blocked: no face found"}
            node = {"node_id": "5", "node_type": "FaceGate", "prompt_id": data["prompt_id"]}
            return {"type": "execution_error", "data": {**node, **reason}}
        return message


def test_the_reason_of_a_blocked_branch_is_a_warning(comfyui: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "Feed", Blocks)
    outcome = run(comfyui, save_workflow())
    assert outcome.warnings == ["Node 5 (FaceGate): Execution Blocked: no face found."]


# --- ends from outside ---


@pytest.mark.parametrize("way", ["deadline", "cancellation", "somebody else's interrupt"])
def test_a_stopped_run_is_out_of_comfyui_when_it_raises(comfyui: Recording, way: str) -> None:
    workflow = sleep_workflow(15)
    control = JobControl(timeout_s=0.3 if way == "deadline" else 20)
    timer = threading.Timer(0.3, control.cancel)
    if way == "somebody else's interrupt":
        url = f"http://127.0.0.1:{comfyui.server.port}/interrupt"
        timer = threading.Timer(0.3, requests.post, (url,), {"json": {}, "timeout": 5})
    if way != "deadline":
        timer.start()
    comfyui.server.sleep = time.sleep  # real pauses between interrupts
    with pytest.raises(JobTimeout if way == "deadline" else JobCancelled):
        run(comfyui, workflow, control)
    assert comfyui.queued_ids() == ([], [])


def test_a_job_can_only_shorten_its_deadline() -> None:
    now = [100.0]
    control = JobControl(timeout_s=10, clock=lambda: now[0])
    control.shorten(60)
    now[0] = 109.0
    control.check()
    now[0] = 103.0
    control.shorten(4)
    control.check()
    now[0] = 104.0
    with pytest.raises(JobTimeout, match="4 s"):
        control.check()


def test_a_dead_process_is_told_from_a_slow_one(server: tuple[int, Path], tmp_path: Path) -> None:
    port, _ = server
    (tmp_path / "comfyui").write_text(f"{os.getpid()} 1")
    (tmp_path / "listened").write_text("1")
    (tmp_path / "comfyui.log").write_text("loading\nSegmentation fault\n")
    client = Recording(port, ComfyUIProcess(tmp_path))
    client.server.wait_ready(5)
    client.server.raise_if_dead()
    (tmp_path / "comfyui").write_text(f"{os.getpid()} 2")  # start.sh has started another one
    with pytest.raises(ComfyUICrashed) as caught:
        client.server.raise_if_dead()
    assert caught.value.details["log"] == ["loading", "Segmentation fault"]


# --- the websocket ---


class Refused(Feed):
    def open(self) -> None:
        """Nobody listens."""


class Silent(Feed):
    def receive(self, timeout_s: float) -> None:
        super().receive(timeout_s)


class Cut(Feed):
    """Breaks after its third message, once, and connects again."""

    messages = 0

    def receive(self, timeout_s: float) -> bytes | dict[str, Any] | None:
        message = super().receive(timeout_s)
        self.messages += message is not None
        if self.messages == 3:
            self.messages += 1
            self.close()
            return None
        return message


class LosesTheLastMessage(Feed):
    def receive(self, timeout_s: float) -> bytes | dict[str, Any] | None:
        message = super().receive(timeout_s)
        is_last = isinstance(message, dict) and message.get("data", {}).get("node", "") is None
        return None if is_last else message


class Chatter(Feed):
    """Says nothing of the prompt and much of other things, as nodes do that broadcast the machine's load."""

    def receive(self, timeout_s: float) -> dict[str, Any]:
        super().receive(timeout_s)
        return {"type": "some.monitor", "data": {"cpu": 50}}


def test_pictures_that_wait_in_the_websocket_when_the_end_is_found_are_read(
    comfyui: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    ask = comfyui.history

    class Stalled(Feed):
        """What ComfyUI has sent arrives only when its history has told the end."""

        def receive(self, timeout_s: float) -> bytes | dict[str, Any] | None:
            if ended.is_set():
                return super().receive(timeout_s)
            time.sleep(timeout_s)
            return None

    def history(prompt_id: str) -> dict[str, Any] | None:
        record = ask(prompt_id)
        if record is not None:
            ended.set()
        return record

    monkeypatch.setattr(comfyui, "history", history)
    monkeypatch.setattr(follow, "Feed", Stalled)
    monkeypatch.setattr(follow, "QUIET_S", 0.1)
    workflow = save_workflow()
    workflow["2"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
    assert len(run(comfyui, workflow).socket_images) == 1
    assert len(comfyui.submitted) == 1


@pytest.mark.parametrize("trouble", [Refused, Silent, Cut, LosesTheLastMessage, Chatter])
def test_the_follower_finds_the_end_without_the_websocket(
    comfyui: Recording, monkeypatch: pytest.MonkeyPatch, trouble: type[Feed]
) -> None:
    monkeypatch.setattr(follow, "Feed", trouble)
    assert len(filenames(run(comfyui, sleep_workflow(0.6)))) == 1


def test_a_prompt_that_comfyui_no_longer_knows_is_a_crash(comfyui: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "Feed", Silent)
    monkeypatch.setattr(comfyui, "has_queued", lambda *_: False)
    monkeypatch.setattr(comfyui, "history", lambda *_: None)
    with pytest.raises(ComfyUICrashed, match="no longer knows"):
        run(comfyui, save_workflow())


def test_a_restart_in_mid_run_is_seen_although_the_new_one_answers(
    server: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "Feed", Silent)
    port, root = server
    pid = (root / "run/comfyui").read_text().split()[0]
    (tmp_path / "comfyui").write_text(f"{pid} 1")
    (tmp_path / "listened").write_text("1")
    client = Recording(port, ComfyUIProcess(tmp_path))
    client.server.wait_ready(5)
    restart = threading.Timer(0.3, (tmp_path / "comfyui").write_text, (f"{pid} 2",))
    workflow = sleep_workflow(15)
    restart.start()
    with pytest.raises(ComfyUICrashed, match="in the middle of the job"):
        run(client, workflow)
    assert client.stop(client.queued_ids()[0], grace_s=10)


class BreaksOnce(Feed):
    """Loses what was sent in the first run, and says so; the second one is whole."""

    breaks = 1

    def receive(self, timeout_s: float) -> bytes | dict[str, Any] | None:
        message = super().receive(timeout_s)
        if isinstance(message, bytes) and BreaksOnce.breaks:
            BreaksOnce.breaks -= 1
            self._lose("for the test")
            return None
        return message


def test_pictures_lost_with_the_websocket_are_sent_again(comfyui: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "Feed", BreaksOnce)
    BreaksOnce.breaks = 1
    workflow = save_workflow()
    workflow["2"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
    assert len(run(comfyui, workflow).socket_images) == 1
    assert len(comfyui.submitted) == 2
    comfyui.submitted.clear()
    BreaksOnce.breaks = 1
    assert len(filenames(run(comfyui, save_workflow()))) == 1  # nothing was lost here that is not in the history
    assert len(comfyui.submitted) == 1


def test_pictures_lost_again_and_again_are_a_warning(comfyui: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "Feed", Refused)
    workflow = save_workflow()
    workflow["2"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
    (warning,) = run(comfyui, workflow).warnings
    assert "may be missing" in warning
    assert len(comfyui.submitted) == 2


# --- messages, whatever they are ---

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["node", "nodes", "value", "max", "output", "prompt_id"])
messages = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["executing", "execution_cached", "progress", "executed", "status"]) | any_json,
        "data": st.dictionaries(fields, any_json, max_size=4) | any_json,
    },
)


@given(sent=st.lists(messages | st.binary(max_size=20), max_size=6))
@settings(max_examples=300, deadline=None)
def test_no_message_can_break_the_follower(sent: list[dict[str, Any] | bytes]) -> None:
    """Every message goes through what `_follow` does with it; a progress that comes of it can be posted as JSON."""
    seen: list[Progress] = []
    run = PromptRun(
        ComfyUI(ComfyUIServer(1, ComfyUIProcess(Path("/nowhere")))),
        save_workflow(),
        control=JobControl(timeout_s=20),
        on_progress=seen.append,
        interrupt_grace_s=5,
        api_key=None,
    )
    for message in sent:
        if isinstance(message, bytes):
            run._take_binary(message)
            continue
        if isinstance(message.get("data"), dict):
            message["data"]["prompt_id"] = run._outcome.prompt_id
        if run._is_ours(message):
            run._is_last(message)
    json.dumps(seen, allow_nan=False)
    assert all(0 <= progress["percent"] <= 99 for progress in seen)


@given(content=st.binary(max_size=80) | st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1e999", b"NaN"]))
@settings(max_examples=300, deadline=None)
def test_any_text_frame_is_a_message_or_none(content: bytes) -> None:
    assert isinstance(_parse_message(content), dict)
