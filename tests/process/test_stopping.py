"""Ends that come from outside and are no fault of ComfyUI or the platform: Ctrl-C, a killed worker's leftovers."""

import json
import os
import signal
import subprocess
from pathlib import Path

from tests.process.stack import DEADLINE_S, Driver, boot, invert_job, picture_bytes, slow_workflow, wait_until


def test_ctrl_c_in_the_client_cancels_the_job(driver: Driver, tmp_path: Path) -> None:
    workflow = tmp_path / "slow.json"
    workflow.write_text(json.dumps(slow_workflow(60)))
    picture = tmp_path / "a.png"
    picture.write_bytes(picture_bytes())
    command = driver.client_command("--workflow", workflow, "--img", picture, "--out", tmp_path)
    client = subprocess.Popen(command, env=driver.client_environ(), stderr=subprocess.PIPE, text=True)
    wait_until(driver.comfyui_runs, "the client's job runs")
    client.send_signal(signal.SIGINT)
    _, said = client.communicate(timeout=DEADLINE_S)
    assert client.returncode == 130
    assert "cancel" in said.lower()
    wait_until(driver.comfyui_is_idle, "ComfyUI is idle", timeout_s=5)
    assert driver.run(invert_job())["status"] == "COMPLETED"


def test_what_a_killed_worker_left_is_wiped_by_the_next_one(tmp_path: Path) -> None:
    with boot(tmp_path / "log") as killed:
        killed.run(invert_job(debug=True))
        kept = killed.job_files()
        assert kept
        with kept[0].open("rb") as held:
            before = held.read()
            for pid in killed.own_pids():
                os.kill(pid, signal.SIGKILL)
            killed.worker.process.wait(5)
            assert killed.job_files() == kept
            with boot(tmp_path / "second", RAMDISK_DIR=str(killed.ramdisk)) as second:
                assert second.job_files() == []
                assert "Wiping what an earlier worker left" in second.log()
                held.seek(0)
                assert held.read() == bytes(len(before))
