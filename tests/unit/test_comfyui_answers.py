"""What the client makes of ComfyUI's answers: recorded ones, broken ones, none at all. Real HTTP on loopback."""

import itertools
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from tests.contract.comfyui_client import capture
from worker import comfyui_server as module
from worker.comfyui import ComfyUI
from worker.comfyui_server import ComfyUIServer
from worker.errors import ComfyUICrashed, ComfyUIStuck, ComfyUIUnavailable, JobCancelled, PromptRejected
from worker.process import ComfyUIProcess

RECORDED = {
    "0.18.1": {name: case["response"] for name, case in capture("invalid_prompts").items() if "response" in case},
    "0.3.64": json.loads((Path(__file__).parent / "data/prompt_answers_0.3.64.json").read_text()),
}
WORKFLOW = {"1": {"class_type": "SaveImage", "inputs": {}}}
IDLE: dict[str, list[Any]] = {"queue_running": [], "queue_pending": []}
BREAK_OFF = (0, None)  # close the connection instead of an answer
Answer = tuple[int, Any]
Asked = list[tuple[str, Any]]


def queue(running: list[str], pending: list[str]) -> dict[str, list[list[Any]]]:
    """GET /queue: each item is ``[number, prompt_id, workflow, extra_data, outputs]``."""
    return {
        "queue_running": [[0, prompt_id, {}, {}, []] for prompt_id in running],
        "queue_pending": [[0, prompt_id, {}, {}, []] for prompt_id in pending],
    }


class Double(ThreadingHTTPServer):
    """Gives prepared answers, by "METHOD path", and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Asked = []
        self.answers: dict[str, Answer | Callable[[], Answer]] = {"GET /system_stats": (200, {})}
        self.answer_to_the_rest: Answer = (404, "404: Not Found")

    def bodies(self, question: str) -> list[Any]:
        return [body for asked, body in self.asked if asked == question]


class _Handler(BaseHTTPRequestHandler):
    server: Double
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two cost 40 ms (Nagle's algorithm and the delayed ACK)

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        question = f"{self.command} {self.path}"
        self.server.asked.append((question, json.loads(self.rfile.read(length)) if length else None))
        prepared = self.server.answers.get(question, self.server.answer_to_the_rest)
        status, body = prepared() if callable(prepared) else prepared
        if not status:
            self.close_connection = True
            return
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def double() -> Iterator[Double]:
    with Double() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def put_start(run_dir: Path, pid: int, generation: int) -> None:
    """What start.sh writes about one start of ComfyUI whose port is open."""
    (run_dir / "comfyui").write_text(f"{pid} {generation}\n")
    (run_dir / "listened").write_text(f"{generation}\n")


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Stands for ComfyUI's process. Not the test's own: the code under test may kill it."""
    with subprocess.Popen(["sleep", "60"]) as started:
        yield started
        started.kill()


@pytest.fixture
def run_dir(tmp_path: Path, process: subprocess.Popen[bytes]) -> Path:
    """As start.sh keeps it."""
    put_start(tmp_path, process.pid, 1)
    (tmp_path / "comfyui.log").write_text("Segmentation fault\n")
    return tmp_path


def ticking_server(port: int, run_dir: Path) -> ComfyUIServer:
    """Its clock goes on by a second with each look, and its sleeps are none."""
    seconds = itertools.count()
    return ComfyUIServer(port, ComfyUIProcess(run_dir), clock=lambda: float(next(seconds)), sleep=lambda _: None)


@pytest.fixture
def comfyui(double: Double, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> ComfyUI:
    monkeypatch.setattr(module, "ANSWER_POLL_S", 0.01)
    client = ComfyUI(ticking_server(double.server_port, run_dir))
    client.server.wait_ready(5)
    double.asked.clear()
    return client


def submit(comfyui: ComfyUI, api_key: str | None = None) -> list[str]:
    return comfyui.submit(WORKFLOW, "prompt-1", "client-1", api_key, grace_s=5)


def refusal(comfyui: ComfyUI, double: Double, answer: Answer) -> PromptRejected:
    double.answers["POST /prompt"] = answer
    with pytest.raises(PromptRejected) as caught:
        submit(comfyui)
    return caught.value


# --- refusals ---


@pytest.mark.parametrize(
    ("version", "name", "said"),
    [
        ("0.18.1", "missing_required_input", "Node 2 (ImageScale): Required input is missing: width."),
        ("0.18.1", "bad_enum", "Node 2 (ImageScale): upscale_method is 'magic', which ComfyUI does not have."),
        ("0.18.1", "missing_image_file", "Node 1 (LoadImage): Custom validation failed for node: image - Invalid"),
        ("0.18.1", "missing_model_file", "is 'nope.safetensors', which ComfyUI does not have."),
        ("0.18.1", "too_big", "Node 2 (ImageScale): Value 1000000 bigger than max of 16384: width."),
        ("0.18.1", "type_mismatch", "received_type(MASK) mismatch input_type(IMAGE)."),
        ("0.18.1", "link_length3", "Node 3 (ImageInvert): Bad linked input, must be a length-2 list"),
        ("0.18.1", "unknown_class_type", "The custom node may not be installed: Node ID '#3'."),
        ("0.18.1", "unknown_class_type_titled", "'Nice name' not found. The custom node may not be installed: Node ID"),
        ("0.18.1", "unknown_class_type_titled", "class NoSuchNode"),
        ("0.18.1", "no_class_type", "Node 'ID #3' has no class_type"),
        ("0.18.1", "cycle", "do its links form a cycle?"),
        ("0.18.1", "no_outputs", "Prompt has no outputs."),
        ("0.18.1", "prompt_list", "with status 500; is it in API format?"),
        ("0.18.1", "ui_format_workflow", "with status 500; is it in API format?"),
        ("0.3.64", "unknown_class_type", "Cannot execute because node NoSuchNode does not exist: Node ID '#3'."),
        ("0.3.64", "no_class_type", "a node is missing the class_type property: Node ID '#3'."),
        ("0.3.64", "prompt_list", "Prompt has no outputs."),
        ("0.3.64", "ui_format_workflow", "Node ID '#nodes'"),
    ],
)  # fmt: skip
def test_a_recorded_refusal_says_what_to_change(
    comfyui: ComfyUI, double: Double, version: str, name: str, said: str
) -> None:
    recorded = RECORDED[version][name]
    error = refusal(comfyui, double, (recorded["status"], recorded["body"]))
    assert error.message.startswith("ComfyUI refused the workflow")
    assert said in error.message
    assert ".:" not in error.message
    assert ".." not in error.message


@pytest.mark.parametrize("name", [name for name, case in RECORDED["0.18.1"].items() if case["status"] >= 400])
def test_every_recorded_refusal_is_short_and_without_the_choices(comfyui: ComfyUI, double: Double, name: str) -> None:
    recorded = RECORDED["0.18.1"][name]
    error = refusal(comfyui, double, (recorded["status"], recorded["body"]))
    assert len(error.message) < 1000
    assert "extra_info" not in json.dumps(error.details)
    expected = {"status", "log"} if recorded["status"] >= 500 else {"type", "node_errors"}
    assert set(error.details) == expected


def test_a_refusal_lists_each_fault_of_each_node_and_cuts_long_ones(comfyui: ComfyUI, double: Double) -> None:
    models = [f"model-{number}.safetensors" for number in range(1000)]
    faults = [
        {"type": "value_not_in_list", "message": "Value not in list", "details": str(models), "extra_info": models},
        {"type": "required_input_missing", "message": "Required input is missing", "details": "seed"},
    ]
    node_errors = {"57:8": {"class_type": "KSampler", "errors": faults, "dependent_outputs": ["9"]}}
    body = {"error": {"type": "prompt_outputs_failed_validation", "details": ""}, "node_errors": node_errors}
    error = refusal(comfyui, double, (400, body))
    assert error.message.count("Node 57:8 (KSampler): ") == 2
    assert len(error.message) < 700
    assert error.message.endswith("Required input is missing: seed.")
    assert [fault["type"] for fault in error.details["node_errors"]["57:8"]["errors"]] == [
        "value_not_in_list",
        "required_input_missing",
    ]


@pytest.mark.parametrize("answer", [(413, "Maximum request body size exceeded"), (502, "<html>"), (200, "not JSON")])
def test_an_answer_in_no_form_of_comfyuis_is_a_refusal_with_its_status(
    comfyui: ComfyUI, double: Double, answer: Answer
) -> None:
    assert refusal(comfyui, double, answer).details["status"] == answer[0]


def not_listed(value: Any) -> dict[str, Any]:
    extra = {"input_name": "ckpt_name", "input_config": None, "received_value": value}
    return {"type": "value_not_in_list", "message": "Value not in list", "details": "", "extra_info": extra}


def refused_with(faults: list[dict[str, Any]]) -> Answer:
    node_errors = {"4": {"class_type": "CheckpointLoaderSimple", "errors": faults, "dependent_outputs": ["9"]}}
    return 400, {"error": {"type": "prompt_outputs_failed_validation", "details": ""}, "node_errors": node_errors}


@pytest.mark.parametrize(
    ("value", "declared", "said"),
    [
        ("sdxl_base.safetensors", [["sd_xl_base_1.0.safetensors", "flux.sft"], {}], "; the nearest it has: 'sd_xl_b"),
        ("qwen.gguf", [["unet/Qwen.gguf"], {}], "; the nearest it has: 'unet/Qwen.gguf'."),
        ("old/qwen.gguf", ["COMBO", {"options": ["qwen.gguf"]}], "; the nearest it has: 'qwen.gguf'."),
        ("magic", [["area", "lanczos"], {}], "; it has: 'area', 'lanczos'."),
        ("zzz", [[f"model-{n}" for n in range(90)]], "'model-4' and 85 more."),
        ("a", [[], {}], "; it has nothing to choose from there."),
        ("a", ["STRING", {}], "ckpt_name is 'a', which ComfyUI does not have."),
        ("a", None, "ckpt_name is 'a', which ComfyUI does not have."),
        (5, [[1, 2], {}], "ckpt_name is '5', which ComfyUI does not have; it has: '1', '2'."),
    ],
)
@pytest.mark.parametrize("group", ["required", "optional"])
def test_a_value_that_comfyui_does_not_list_is_told_with_the_nearest_that_it_has(
    comfyui: ComfyUI, double: Double, value: Any, declared: Any, said: str, group: str
) -> None:
    """The refusal has null for more than 20 choices, so the class is asked for them."""
    info = {"input": {group: {} if declared is None else {"ckpt_name": declared}}, "output_node": False}
    double.answers["GET /object_info/CheckpointLoaderSimple"] = (200, {"CheckpointLoaderSimple": info})
    assert said in refusal(comfyui, double, refused_with([not_listed(value)])).message


def test_a_refusal_is_told_although_the_choices_cannot_be_had(comfyui: ComfyUI, double: Double) -> None:
    double.answers["GET /object_info/CheckpointLoaderSimple"] = BREAK_OFF
    assert "is 'a', which ComfyUI does not have." in refusal(comfyui, double, refused_with([not_listed("a")])).message


def test_what_is_known_of_a_missing_model_is_told(double: Double, run_dir: Path) -> None:
    notes = {"flux.sft": "MODELS names flux.sft, but it is missing: no space."}
    client = ComfyUI(ComfyUIServer(double.server_port, ComfyUIProcess(run_dir)), notes.get)
    client.server.wait_ready(5)
    error = refusal(client, double, refused_with([not_listed("flux.sft")]))
    assert error.message.endswith("does not have. MODELS names flux.sft, but it is missing: no space.")


def test_a_refusal_of_a_huge_workflow_is_small(comfyui: ComfyUI, double: Double) -> None:
    fault = {"type": "required_input_missing", "message": "Required input is missing", "details": "x" * 1_000}
    nodes = {str(n): {"class_type": "Node", "errors": [fault] * 50, "dependent_outputs": []} for n in range(1_000)}
    body = {"error": {"type": "prompt_outputs_failed_validation", "details": ""}, "node_errors": nodes}
    error = refusal(comfyui, double, (400, body))
    assert "49980 more faults are not listed." in error.message
    assert len(json.dumps(error.as_result())) < 500_000


@pytest.mark.parametrize("version", RECORDED)
def test_nodes_refused_beside_others_that_run_are_warnings(comfyui: ComfyUI, double: Double, version: str) -> None:
    recorded = RECORDED[version]["two_outputs_one_bad"]
    double.answers["POST /prompt"] = (recorded["status"], recorded["body"])
    (warning,) = submit(comfyui)
    assert warning.startswith("Node 6 (LoadImage): Custom validation failed for node: image - Invalid image file")


# --- the POST ---


def test_the_api_key_is_sent_where_api_nodes_look_for_it_and_only_when_there_is_one(
    comfyui: ComfyUI, double: Double
) -> None:
    double.answers["POST /prompt"] = (200, {"prompt_id": "prompt-1", "number": 1, "node_errors": {}})
    assert submit(comfyui) == []
    assert submit(comfyui, api_key="key") == []
    plain = {"prompt": WORKFLOW, "prompt_id": "prompt-1", "client_id": "client-1"}
    assert double.bodies("POST /prompt") == [plain, {**plain, "extra_data": {"api_key_comfy_org": "key"}}]


@pytest.mark.parametrize(
    ("in_queue", "in_history"),
    [(queue(["prompt-1"], []), {}), (queue([], ["prompt-1"]), {}), (IDLE, {"prompt-1": {"outputs": {}}})],
    ids=["it runs", "it waits", "it has run"],
)
def test_a_broken_post_of_a_prompt_that_arrived_is_not_repeated(
    comfyui: ComfyUI, double: Double, in_queue: dict[str, Any], in_history: dict[str, Any]
) -> None:
    double.answers |= {
        "POST /prompt": BREAK_OFF,
        "GET /queue": (200, in_queue),
        "GET /history/prompt-1": (200, in_history),
    }
    assert submit(comfyui) == []
    assert len(double.bodies("POST /prompt")) == 1


def test_a_broken_post_of_a_prompt_that_did_not_arrive_is_a_failure(comfyui: ComfyUI, double: Double) -> None:
    double.answers |= {
        "POST /prompt": BREAK_OFF,
        "GET /queue": (200, queue(["another"], [])),
        "GET /history/prompt-1": (200, {}),
    }
    with pytest.raises(ComfyUIUnavailable, match="POST /prompt"):
        submit(comfyui)
    assert len(double.bodies("POST /prompt")) == 1


@pytest.mark.parametrize("answers_in_time", [True, False])
def test_a_job_that_ends_while_its_post_is_not_answered_leaves_no_prompt_behind(
    comfyui: ComfyUI, double: Double, process: subprocess.Popen[bytes], answers_in_time: bool
) -> None:
    """ComfyUI would queue the prompt whenever it gets to it: the answer is waited for, else the process is ended."""
    released = Event()

    def slow() -> Answer:
        released.wait(10)
        return 200, {"prompt_id": "prompt-1", "number": 1, "node_errors": {}}

    def cancelled() -> None:
        if answers_in_time:
            released.set()
        raise JobCancelled("cancelled")

    double.answers["POST /prompt"] = slow
    with comfyui.server.serving(cancelled), pytest.raises(JobCancelled):
        comfyui.submit(WORKFLOW, "prompt-1", "client-1", None, grace_s=5 if answers_in_time else 0.1)
    released.set()
    if answers_in_time:
        assert process.poll() is None
    else:
        assert process.wait(5) == -signal.SIGKILL


def test_a_comfyui_that_never_answers_the_post_is_ended(
    comfyui: ComfyUI, double: Double, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    released = Event()
    busy_s = itertools.count()
    monkeypatch.setattr(comfyui.server.process, "cpu_s", lambda _: float(next(busy_s)))
    double.answers["POST /prompt"] = lambda: (200, str(released.wait(10)))
    with pytest.raises(ComfyUICrashed, match="did not answer POST /prompt within 60 s and was ended"):
        submit(comfyui)
    released.set()
    assert process.wait(5) == -signal.SIGKILL


# --- dead, slow, wrong ---


def test_a_death_is_told_with_its_exit_code(comfyui: ComfyUI, run_dir: Path, process: subprocess.Popen[bytes]) -> None:
    (run_dir / "ended").write_text("1 139\n")
    put_start(run_dir, process.pid, 2)
    with pytest.raises(ComfyUICrashed, match="exit code 139, SIGSEGV") as caught:
        comfyui.server.raise_if_dead()
    assert (caught.value.details["exit_code"], caught.value.details["out_of_memory"]) == (139, False)


def test_a_connection_that_a_dying_comfyui_breaks_off_is_a_death(
    comfyui: ComfyUI, double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as alive for some milliseconds after its connections are closed."""
    monkeypatch.setattr(comfyui.server, "clock", lambda: 0.0)
    alive = iter([True, True, True])
    monkeypatch.setattr(comfyui.server.process, "is_alive", lambda _: next(alive, False))
    double.answers["GET /queue"] = BREAK_OFF
    with pytest.raises(ComfyUICrashed):
        comfyui.queued_ids()


@pytest.fixture
def stuck(double: Double) -> Iterator[None]:
    """/queue is not answered."""
    released = Event()
    double.answers["GET /queue"] = lambda: (200, str(released.wait(20)))
    yield
    released.set()


@pytest.mark.usefixtures("stuck")
def test_a_comfyui_that_neither_answers_nor_computes_is_ended(
    comfyui: ComfyUI, process: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(ComfyUICrashed, match="neither answered nor computed for 30 s") as caught:
        comfyui.queued_ids()
    assert caught.value.details["log"] == ["Segmentation fault"]
    assert process.wait(5) == -signal.SIGKILL


@pytest.mark.usefixtures("stuck")
def test_a_comfyui_that_is_only_slow_is_waited_for_and_lives(
    comfyui: ComfyUI, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy_s = itertools.count()
    monkeypatch.setattr(comfyui.server.process, "cpu_s", lambda _: next(busy_s) / 10)
    with pytest.raises(ComfyUIUnavailable, match="GET /queue"):
        comfyui.queued_ids()
    assert process.poll() is None


@pytest.mark.usefixtures("stuck")
def test_one_that_cannot_be_ended_replaces_the_worker(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui.server.process, "kill", lambda _: False)
    with pytest.raises(ComfyUIStuck) as caught:
        comfyui.queued_ids()
    assert caught.value.replace_worker


@pytest.mark.usefixtures("stuck")
def test_the_end_of_a_job_ends_the_waiting_and_after_the_job_nothing_does(comfyui: ComfyUI) -> None:
    def cancelled() -> None:
        raise JobCancelled("cancelled")

    with comfyui.server.serving(cancelled):
        with pytest.raises(JobCancelled):
            comfyui.queued_ids()
        with comfyui.server.serving(None), pytest.raises(ComfyUIUnavailable):
            comfyui.queued_ids(timeout_s=3)


def test_no_answer_of_a_process_that_has_ended_is_a_crash_with_its_last_words(
    comfyui: ComfyUI, double: Double, run_dir: Path, process: subprocess.Popen[bytes]
) -> None:
    double.answers["GET /queue"] = BREAK_OFF
    with pytest.raises(ComfyUIUnavailable):
        comfyui.queued_ids()
    put_start(run_dir, process.pid, 2)
    with pytest.raises(ComfyUICrashed) as caught:
        comfyui.queued_ids()
    assert caught.value.details["log"] == ["Segmentation fault"]


@pytest.mark.parametrize("answer", [(500, "500 Internal Server Error"), (200, "<html>"), (200, [])])
def test_an_answer_that_is_no_object_is_comfyuis_fault(comfyui: ComfyUI, double: Double, answer: Answer) -> None:
    double.answers |= {"GET /queue": answer, "POST /free": (500, "")}
    with pytest.raises(ComfyUIUnavailable, match="GET /queue"):
        comfyui.queued_ids()
    with pytest.raises(ComfyUIUnavailable, match="POST /free"):
        comfyui.free_memory()


# --- ready ---


def test_readiness_is_waited_for(
    comfyui: ComfyUI, double: Double, run_dir: Path, process: subprocess.Popen[bytes]
) -> None:
    (run_dir / "comfyui").unlink()
    looks = itertools.count(1)
    double.answers["GET /system_stats"] = lambda: (503, "") if next(looks) < 3 else (200, {})

    def start_sh_starts_it(_: float) -> None:
        put_start(run_dir, process.pid, 7)

    comfyui.server.sleep = start_sh_starts_it
    assert comfyui.server.wait_ready(60).generation == 7
    assert len(double.bodies("GET /system_stats")) == 3


def test_a_comfyui_that_never_answers_is_given_up_with_its_last_words(comfyui: ComfyUI, double: Double) -> None:
    double.answers["GET /system_stats"] = (503, "")
    with pytest.raises(ComfyUIUnavailable, match="within 20 s") as caught:
        comfyui.server.wait_ready(20)
    assert caught.value.details["log"] == ["Segmentation fault"]
    assert 3 < len(double.asked) < 30  # the clock goes on by a second with each look at it


def busy(comfyui: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    used_s = itertools.count()
    monkeypatch.setattr(comfyui.server.process, "cpu_s", lambda _: float(next(used_s)))


def is_ended_within(comfyui: ComfyUI, process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    with pytest.raises(ComfyUIUnavailable):
        comfyui.server.wait_ready(timeout_s)
    try:
        return process.wait(0.2) == -signal.SIGKILL
    except subprocess.TimeoutExpired:
        return False


def test_a_comfyui_with_nothing_to_do_that_does_not_answer_is_ended(
    comfyui: ComfyUI, double: Double, process: subprocess.Popen[bytes]
) -> None:
    double.answers["GET /system_stats"] = (503, "")
    assert is_ended_within(comfyui, process, 3 * module.HUNG_S)


@pytest.mark.parametrize(("timeout_s", "is_ended"), [(2 * module.HUNG_S, False), (4 * module.BUSY_S, True)])
def test_one_that_computes_gets_more_time(
    comfyui: ComfyUI,
    double: Double,
    process: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    timeout_s: float,
    is_ended: bool,
) -> None:
    busy(comfyui, monkeypatch)
    double.answers["GET /system_stats"] = (503, "")
    assert is_ended_within(comfyui, process, timeout_s) is is_ended


@pytest.mark.parametrize(("timeout_s", "is_ended"), [(50, False), (4 * module.MIN_RESTART_S, True)])
def test_a_restart_gets_several_times_what_the_first_start_took(
    comfyui: ComfyUI, double: Double, run_dir: Path, process: subprocess.Popen[bytes], timeout_s: float, is_ended: bool
) -> None:
    double.answers["GET /system_stats"] = (503, "")
    put_start(run_dir, process.pid, 2)
    assert is_ended_within(comfyui, process, timeout_s) is is_ended


def test_the_first_start_is_never_ended(double: Double, run_dir: Path, process: subprocess.Popen[bytes]) -> None:
    double.answers["GET /system_stats"] = (503, "")
    booting = ComfyUI(ticking_server(double.server_port, run_dir))
    assert not is_ended_within(booting, process, 1000)


def test_waiting_for_readiness_can_be_called_off(comfyui: ComfyUI, double: Double) -> None:
    def cancelled() -> None:
        raise KeyboardInterrupt

    with comfyui.server.serving(cancelled), pytest.raises(KeyboardInterrupt):
        comfyui.server.wait_ready(20)
    assert double.asked == []


# --- stopping ---


def test_a_prompt_is_deleted_first_and_then_interrupted_until_it_is_gone(comfyui: ComfyUI, double: Double) -> None:
    """An interrupt that arrives just after the queue handed the prompt out is lost (0.18.1): one is not enough."""
    looks = itertools.count(1)
    double.answers |= {
        "POST /queue": (200, ""),
        "POST /interrupt": (200, ""),
        "GET /queue": lambda: (200, queue(["mine", "another"], []) if next(looks) < 4 else queue(["another"], [])),
    }
    assert comfyui.stop(["mine"], grace_s=100)
    assert double.asked[0] == ("POST /queue", {"delete": ["mine"]})
    assert double.bodies("POST /interrupt") == [{"prompt_id": "mine"}] * 3


def test_a_prompt_that_does_not_go_is_given_up_after_the_grace(comfyui: ComfyUI, double: Double) -> None:
    double.answers |= {
        "POST /queue": (200, ""),
        "POST /interrupt": (200, ""),
        "GET /queue": (200, queue(["mine"], [])),
    }
    assert not comfyui.stop(["mine"], grace_s=20)
    assert 1 <= len(double.bodies("POST /interrupt")) <= 6


def test_an_empty_queue_is_left_alone(comfyui: ComfyUI, double: Double) -> None:
    double.answers["GET /queue"] = (200, IDLE)
    comfyui.clear_queue(grace_s=5)
    assert double.asked == [("GET /queue", None)]


def test_a_comfyui_that_holds_on_to_an_earlier_prompt_is_killed(
    comfyui: ComfyUI, double: Double, process: subprocess.Popen[bytes]
) -> None:
    double.answers |= {
        "POST /queue": (200, ""),
        "POST /interrupt": (200, ""),
        "GET /queue": (200, queue(["earlier"], ["later"])),
    }
    assert comfyui.clear_queue(grace_s=5) is False
    assert process.wait(5) == -signal.SIGKILL
    assert {"delete": ["earlier", "later"]} in double.bodies("POST /queue")


# --- node classes ---


def test_a_class_is_looked_up_once_for_each_start_of_comfyui(
    comfyui: ComfyUI, double: Double, run_dir: Path, process: subprocess.Popen[bytes]
) -> None:
    double.answers["GET /object_info/SaveImage"] = (200, {"SaveImage": {"output_node": True}})
    double.answers["GET /object_info/LoadImage"] = (200, {"LoadImage": {"output_node": False}})
    for _ in range(3):
        assert comfyui.is_output_class("SaveImage")
        assert not comfyui.is_output_class("LoadImage")
    assert len(double.asked) == 2
    put_start(run_dir, process.pid, 2)  # another start may have other nodes
    comfyui.server.wait_ready(5)
    double.answers["GET /object_info/SaveImage"] = (200, {})
    assert not comfyui.is_output_class("SaveImage")


def test_an_error_is_no_answer_about_a_class(comfyui: ComfyUI, double: Double) -> None:
    double.answers["GET /object_info/SaveImage"] = (500, "500 Internal Server Error")
    with pytest.raises(ComfyUIUnavailable, match="GET /object_info with status 500"):
        comfyui.file_inputs("SaveImage")
    double.answers["GET /object_info/SaveImage"] = (200, {"SaveImage": {"output_node": True}})
    assert comfyui.is_output_class("SaveImage")


@pytest.mark.parametrize("name", ["NoSuchNode", "a/b?c#d", "..", ".", " ", "\ud800", "ä" * 5000, "\0\r\n"])
@pytest.mark.parametrize("answer", [(200, {}), (200, []), (200, "<html>"), (404, "404: Not Found")])
def test_a_name_that_cannot_be_looked_up_is_no_output_class(
    comfyui: ComfyUI, double: Double, name: str, answer: Answer
) -> None:
    """It is the caller's word: POST /prompt will refuse it with a better sentence than any of ours."""
    double.answer_to_the_rest = answer
    assert not comfyui.is_output_class(name)
    ((question, _),) = double.asked
    assert question.startswith("GET /object_info/")
    assert "?" not in question
