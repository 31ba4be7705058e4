"""start.sh and the models: what it links before ComfyUI starts, tells ComfyUI of, downloads beside it and reads ahead.

One boot is shared. In it the order of things is forced, not hoped for: `utils.py` in full begins only when ComfyUI
listens, and `--prefetch` only when a test lets it.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hub_server import running_hub, sha256
from huggingface_hub import constants, hf_hub_download
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_bench import files_below, safetensors

from local.__main__ import free_port
from tests.process.stack import BOOT_TIMEOUT_S, ROOT, Driver, boot, boot_platform, invert_job, start_worker, wait_until

STANDIN = ROOT / "local" / "comfyui"
COMFYUI_PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
USUAL = {"checkpoints", "clip_vision", "controlnet", "diffusion_models", "embeddings", "loras", "style_models"}
USUAL |= {"text_encoders", "upscale_models", "vae"}
CACHED, DOWNLOADED, SHARED = safetensors(1), safetensors(2), safetensors(3)
MODELS = """
    org/cached:split/cached.safetensors:checkpoints
    org/hub:a.safetensors:checkpoints:downloaded.safetensors
    org/shared:shared.safetensors:checkpoints
    org/none:missing.safetensors:checkpoints
"""


def copy_of_checkout(folder: Path, noted: Path) -> Path:
    """A checkout whose models folder may be written to: the stand-in's or COMFYUI_DIR's code, and no models.

    When its main.py begins, it writes into `noted` which models are there.
    """
    original = Path(os.environ.get("COMFYUI_DIR", STANDIN))
    for name in ("models", "custom_nodes"):
        (folder / name).mkdir(parents=True)
    for entry in original.iterdir():
        if entry.suffix == ".py":  # ComfyUI takes the folder of the real folder_paths.py for its own
            shutil.copy(entry, folder)
        elif not entry.name.startswith((".", "__")) and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    there = f"sorted(str(p) for p in pathlib.Path({str(folder / 'models')!r}).rglob('*') if p.is_file())"
    main = folder / "main.py"
    main.write_text(f"import pathlib\npathlib.Path({str(noted)!r}).write_text('\\n'.join({there}))\n{main.read_text()}")
    return folder


def worker_python(path: Path, *, calls: Path, before_all: str = ":", before_prefetch: str = ":") -> str:
    """A Python for WORKER_PYTHON that notes how utils.py is called, and waits for conditions of the shell first."""
    path.write_text(
        f"""#!/bin/bash
        if [[ $1 == */utils.py ]]; then echo "utils.py ${{*:2}}" >>{shlex.quote(str(calls))}; fi
        case "$*" in
            */utils.py) until {before_all}; do sleep 0.02; done ;;
            */utils.py\\ --prefetch) until {before_prefetch}; do sleep 0.02; done ;;
        esac
        exec {shlex.quote(sys.executable)} "$@"
        """
    )
    path.chmod(0o755)
    return str(path)


def put(path: Path, content: bytes = b"weights") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- one boot with models from everywhere ---


@dataclass
class Booted:
    driver: Driver
    folder: Path
    blob: Path
    """the real file of the model in the host cache"""

    @property
    def models(self) -> Path:
        return self.folder / "ComfyUI" / "models"

    def checkpoints(self) -> list[str]:
        """What ComfyUI offers in its loader."""
        described = self.driver.comfyui("/object_info/CheckpointLoaderSimple")
        names: list[str] = described["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
        return names


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    folder = tmp_path_factory.mktemp("models-boot")
    put(folder / "volume/models/checkpoints/by_hand.safetensors", safetensors(4))
    put(folder / "volume/models/checkpoints/shared.safetensors", SHARED)
    bomb = f"open({str(folder / 'code-of-the-volume-ran')!r}, 'w')\n"
    put(folder / "volume/models/custom_nodes/bomb/__init__.py", bomb.encode())
    (folder / "empty-volume" / "models").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch, running_hub() as hub:
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        hub.add("org/cached", {"split/cached.safetensors": CACHED})
        hub.add("org/hub", {"a.safetensors": DOWNLOADED})
        pointer = hf_hub_download(
            "org/cached", "split/cached.safetensors", cache_dir=folder / "hub", endpoint=hub.url, token=False
        )
        python = worker_python(
            folder / "python",
            calls=folder / "calls",
            before_all='[[ -e "$RAMDISK_DIR/run/listened" ]]',
            before_prefetch=f"[[ -e {shlex.quote(str(folder / 'go'))} ]]",
        )
        more = {
            "COMFYUI_DIR": str(copy_of_checkout(folder / "ComfyUI", folder / "noted")),
            "COMFYUI_PYTHON": COMFYUI_PYTHON,
            "WORKER_PYTHON": python,
            "MODELS": MODELS,
            "HOST_CACHE_DIR": str(folder / "hub"),
            "VOLUME_DIRS": f"{folder}/volume:{folder}/no-volume:{folder}/empty-volume",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "hf-home"),
        }
        with boot(folder / "log", **more) as driver:
            yield Booted(driver, folder, Path(pointer).resolve())


def test_a_cached_model_is_linked_before_comfyui_starts_and_downloads_do_not_delay_it(booted: Booted) -> None:
    """A download that came first would never end: in this boot it waits for ComfyUI."""
    at_start = [Path(line).name for line in (booted.folder / "noted").read_text().splitlines()]
    assert at_start == ["cached.safetensors", "shared.safetensors"]
    assert (booted.models / "checkpoints/cached.safetensors").readlink() == booted.blob
    assert (booted.models / "checkpoints/downloaded.safetensors").read_bytes() == DOWNLOADED


def test_jobs_are_taken_when_the_models_are_settled_and_not_before(booted: Booted) -> None:
    """The boot ends when the worker asks for jobs; it does so while --prefetch has not even begun."""
    log = booted.driver.log()
    assert log.index("ComfyUI listens") < log.index("MODELS ARE MISSING") < log.index("--- Starting Serverless Worker")
    assert sorted((booted.folder / "calls").read_text().splitlines()) == [
        "utils.py ",
        "utils.py --link-only",
        "utils.py --prefetch",
    ]


def test_a_missing_model_is_said_aloud_and_the_worker_goes_on(booted: Booted) -> None:
    log = booted.driver.log()
    assert log.count(" ERROR start.sh SOME MODELS ARE MISSING (above); jobs that need them will be refused.\n") == 1
    reason = r"utils.py: org/none:missing.safetensors: there is no repository at http://127.0.0.1:\d+/org/none, or"
    assert re.search(reason, log.split("SOME MODELS")[0])
    assert booted.driver.run(invert_job())["status"] == "COMPLETED"


def test_comfyui_lists_the_models_of_every_source(booted: Booted) -> None:
    of_all = {"by_hand.safetensors", "cached.safetensors", "downloaded.safetensors", "shared.safetensors"}
    assert set(booted.checkpoints()) >= of_all
    assert "missing.safetensors" not in booted.checkpoints()
    put(booted.folder / "volume/models/checkpoints/later.safetensors", safetensors(5))
    put(booted.folder / "empty-volume/models/checkpoints/own/folder.safetensors", safetensors(6))
    assert {"later.safetensors", "own/folder.safetensors"} <= set(booted.checkpoints())


def test_no_code_comes_from_a_volume(booted: Booted) -> None:
    config = yaml.safe_load((booted.driver.ramdisk / "run/extra_model_paths.yaml").read_text())
    assert [kinds.pop("base_path") for kinds in config.values()] == [
        f"{booted.folder}/volume/models",
        f"{booted.folder}/empty-volume/models",
    ]
    assert all("custom_nodes" not in kinds for kinds in config.values())
    assert not (booted.folder / "code-of-the-volume-ran").exists()


def test_a_job_with_debug_lists_each_model_with_source_size_and_sha256(booted: Booted) -> None:
    output = booted.driver.run(invert_job(debug=True))["output"]
    records = {record["name"]: record for record in output["debug"]["models"]}
    told = {name: (record["source"], record["size_bytes"], record["sha256"]) for name, record in records.items()}
    assert told == {
        "cached.safetensors": ("host cache", len(CACHED), sha256(CACHED)),
        "downloaded.safetensors": ("download", len(DOWNLOADED), sha256(DOWNLOADED)),
        "shared.safetensors": ("network volume", len(SHARED), None),
        "missing.safetensors": (None, None, None),
    }
    assert records["missing.safetensors"]["error"].startswith("there is no repository at ")
    assert records["cached.safetensors"]["path"] == str(booted.models / "checkpoints/cached.safetensors")
    assert booted.driver.run(invert_job())["status"] == "COMPLETED"  # and nothing is kept any more


def test_the_models_that_are_there_are_read_into_memory(booted: Booted) -> None:
    assert "models into memory" not in booted.driver.log()
    (booted.folder / "go").touch()
    wait_until(lambda: "read 3 of 3 models into memory" in booted.driver.log(), "the models are read")
    assert booted.driver.run(invert_job())["status"] == "COMPLETED"


# --- stopped while it loads ---


def test_sigterm_during_a_download_ends_in_time_and_leaves_nothing(tmp_path: Path) -> None:
    """Two downloads onto a network volume, half done, and models that are being read."""
    contents = {"a.safetensors": safetensors(1, 1_000_000), "b.safetensors": safetensors(2, 1_000_000)}
    volume = tmp_path / "volume"
    by_hand = put(volume / "models/vae/by_hand.safetensors", safetensors(3))
    with running_hub() as hub, boot_platform(tmp_path / "platform-log") as platform:
        hub.add("org/name", contents)
        stalled = [hub.blob(content) for content in contents.values()]
        for blob in stalled:
            blob.stalled = threading.Event()
        settings_ = {
            "COMFYUI_DIR": str(copy_of_checkout(tmp_path / "ComfyUI", tmp_path / "noted")),
            "COMFYUI_PYTHON": COMFYUI_PYTHON,
            "WORKER_PYTHON": worker_python(tmp_path / "python", calls=tmp_path / "calls", before_prefetch="false"),
            "MODELS": "org/name:a.safetensors:vae,org/name:b.safetensors:vae,org/name:by_hand.safetensors:vae",
            "VOLUME_DIRS": str(volume),
            "DOWNLOAD_TO": "volume",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf-home"),
        }
        with start_worker(platform, tmp_path / "log", **settings_) as driver:
            for blob in stalled:
                assert blob.stalled is not None
                assert blob.stalled.wait(60), driver.log()
            wait_until(lambda: "--prefetch" in (tmp_path / "calls").read_text(), "prefetch begins")
            wait_until(
                lambda: "ComfyUI answers after" in driver.log(), "only the models are waited for", BOOT_TIMEOUT_S
            )
            assert not (driver.ramdisk / "run/models-settled").exists()
            assert len(files_below(volume)) > 3  # parts of files, and leases
            driver.worker.process.send_signal(signal.SIGTERM)
            assert driver.worker.process.wait(10) == 0, driver.log()  # Docker's patience
            assert "--- Starting Serverless Worker" not in driver.log()  # no job was taken
            assert "Traceback" not in driver.log()
            assert driver.own_pids() == []
            assert not driver.ramdisk.exists()
    assert files_below(volume) == [str(by_hand.relative_to(volume))]
    assert files_below(tmp_path / "ComfyUI" / "models") == ["vae/by_hand.safetensors"]


# --- functions of start.sh ---


@pytest.fixture
def sourced_settings(tmp_path: Path) -> dict[str, str]:
    return settings_below(tmp_path)


def settings_below(folder: Path) -> dict[str, str]:
    checkout = folder / "checkout"
    put(checkout / "main.py")
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "COMFYUI_DIR": str(checkout),
        "COMFYUI_PYTHON": sys.executable,
        "COMFYUI_PORT": str(free_port()),
        "WORKER_PYTHON": worker_python(folder / "python", calls=folder / "calls"),
        "RAMDISK_DIR": str(folder / "ramdisk"),
        "RAMDISK_MIN_MB": "0",
        "HOST_CACHE_DIR": str(folder / "hub"),
        "VOLUME_DIRS": str(folder / "no-volume"),
        "HF_HUB_OFFLINE": "1",
    }


def sourced(settings: dict[str, str], commands: str, cwd: Path = ROOT) -> str:
    """What the commands say on both streams, after start.sh has made its RAM disk."""
    script = f"source {ROOT / 'start.sh'}; setup_environment; claim_ramdisk; prepare_ramdisk; {commands}"
    done = subprocess.run(
        ["bash", "-c", script],
        env=settings,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def model_paths(settings: dict[str, str], cwd: Path = ROOT) -> list[tuple[str, dict[str, str]]]:
    """Each volume that ComfyUI is told of: its path, and the folder of each kind of model.

    Read as ComfyUI does (utils/extra_config.py, 0.18.1), to which a value that is no text is the end of its boot.
    """
    sourced(settings, "write_model_paths", cwd)
    path = Path(settings["RAMDISK_DIR"], "run/extra_model_paths.yaml")
    if not path.exists():
        return []
    volumes = []
    for kinds in yaml.safe_load(path.read_text("utf-8")).values():
        assert all(isinstance(kind, str) and isinstance(folder, str) for kind, folder in kinds.items()), kinds
        assert not kinds.keys() & {"is_default", "custom_nodes"}
        volumes.append((kinds.pop("base_path"), kinds))
    return volumes


def same(names: set[str]) -> dict[str, str]:
    return {name: name for name in names}


def configs_of_comfyui(settings: dict[str, str]) -> list[str]:
    """The files of extra model paths on the command line that ComfyUI is started with."""
    start = "watch_boot() { :; }; tail() { :; }; write_model_paths; start_comfyui; wait $comfyui_pid"
    said = sourced({**settings, "COMFYUI_PYTHON": "echo"}, f"{start}; cat $RAMDISK_DIR/run/comfyui.log")
    assert " main.py " in said
    return re.findall(r"--extra-model-paths-config (\S+)", said)


def test_without_a_volume_comfyui_is_told_of_none(sourced_settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a-volume-without-models").mkdir()
    put(tmp_path / "a-file" / "models")
    sourced_settings["VOLUME_DIRS"] = f"{tmp_path}/none:{tmp_path}/a-volume-without-models:{tmp_path}/a-file"
    assert model_paths(sourced_settings) == []
    assert configs_of_comfyui(sourced_settings) == []


def test_comfyui_gets_the_file_beside_those_of_the_user(sourced_settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "volume" / "models").mkdir(parents=True)
    sourced_settings |= {
        "VOLUME_DIRS": str(tmp_path / "volume"),
        "COMFYUI_ARGS": "--extra-model-paths-config /own.yaml",
    }
    ours = f"{sourced_settings['RAMDISK_DIR']}/run/extra_model_paths.yaml"
    assert configs_of_comfyui(sourced_settings) == ["/own.yaml", ours]


def test_the_usual_folders_and_those_made_by_hand_are_looked_into(
    sourced_settings: dict[str, str], tmp_path: Path
) -> None:
    models = tmp_path / "volume" / "models"
    for name in ("checkpoints", "ipadapter", "clip", "unet", "LLM-2.5_x", "pulid.old"):
        (models / name).mkdir(parents=True)
    for left_out in ("custom_nodes", "configs", "two words", "a:b", "#note", "bücher", '"', ".hidden", "a*"):
        (models / left_out).mkdir()
    put(models / "a-file")
    sourced_settings["VOLUME_DIRS"] = f"{tmp_path}/none:{tmp_path}/volume"
    expected = same(USUAL | {"ipadapter", "clip", "unet", "LLM-2.5_x", "pulid.old"})
    assert model_paths(sourced_settings) == [(str(models), expected)]


def test_no_name_of_a_folder_is_taken_for_anything_but_a_name(sourced_settings: dict[str, str], tmp_path: Path) -> None:
    """Numbers, dates and words that mean something to YAML or to ComfyUI's reader of this file."""
    names = {"2024", "1.5", "0x1F", "1_000", "2024-01-01", "null", "Null", "on", "NO", "yes", "true"}
    names |= {"-", "--", "---", "-a", "y", "n", "_", "e3", "nan"}
    for name in names | {"base_path", "is_default"}:
        (tmp_path / "volume" / "models" / name).mkdir(parents=True, exist_ok=True)
    sourced_settings["VOLUME_DIRS"] = str(tmp_path / "volume")
    [(base_path, kinds)] = model_paths(sourced_settings)
    assert base_path == str(tmp_path / "volume" / "models")
    assert kinds == same(USUAL | names)


PRINTABLE = st.characters(exclude_characters="/:$", exclude_categories=("Cs", "Cc", "Cn", "Co", "Zl", "Zp"))
HARD = [
    "\\",
    '"',
    "'",
    "a\\",
    '\\"',
    " x",
    "x ",
    "#",
    "- a",
    "{}",
    "[a]",
    "%s",
    "%%",
    "*",
    "?",
    "&a",
    "!b",
    "é",
    "`id`",
]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from(HARD) | st.text(PRINTABLE, min_size=1, max_size=12), min_size=1, max_size=4))
def test_the_path_of_a_volume_may_be_anything(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    folder = tmp_path_factory.mktemp("quoting")
    volumes = [folder / name for name in dict.fromkeys(names) if name not in (".", "..") and len(name.encode()) < 99]
    for volume in volumes:
        (volume / "models").mkdir(parents=True, exist_ok=True)
    told = settings_below(folder / ".own") | {"VOLUME_DIRS": ":".join(map(str, volumes))}
    assert model_paths(told) == [(f"{volume}/models", same(USUAL)) for volume in volumes]


def test_parts_of_volume_dirs_that_are_empty_or_relative(sourced_settings: dict[str, str], tmp_path: Path) -> None:
    """As utils.py takes them: an empty one is none, a relative one begins in the folder of the caller."""
    (tmp_path / "cwd" / "volume" / "models").mkdir(parents=True)
    sourced_settings["VOLUME_DIRS"] = "::volume:"
    volumes = model_paths(sourced_settings, tmp_path / "cwd")
    assert [base_path for base_path, _ in volumes] == [f"{tmp_path}/cwd/volume/models"]


def test_a_full_ram_disk_is_a_warning_and_not_the_end(sourced_settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "volume" / "models").mkdir(parents=True)
    sourced_settings["VOLUME_DIRS"] = str(tmp_path / "volume")
    full = "mkdir $RAMDISK_DIR/run/extra_model_paths.yaml"  # root writes whatever the rights say
    said = sourced(sourced_settings, f"{full}; start_models; echo goes on")
    assert "ComfyUI is not told of the models on network volumes: the RAM disk is full." in said
    assert said.endswith("goes on\n")


def test_without_models_nothing_is_run_and_all_is_settled(sourced_settings: dict[str, str], tmp_path: Path) -> None:
    sourced(sourced_settings, "start_models; [[ -e $RAMDISK_DIR/run/models-settled && -z $models_pid ]]")
    assert not (tmp_path / "calls").exists()


def cached(folder: Path, name: str) -> Path:
    """A model in the host cache; the repository is `org/name` without the ending."""
    stem = name.removesuffix(".safetensors")
    return put(folder / f"hub/models--org--{stem}/snapshots/abc/{name}", safetensors(1))


RUN_MODELS = (
    "start_models; models=$models_pid; code=0; wait $models || code=$?; on_models_end $code; wait; echo code $code"
)


def test_models_file_alone_is_enough(sourced_settings: dict[str, str], tmp_path: Path) -> None:
    blob = cached(tmp_path, "a.safetensors")
    listed = put(tmp_path / "list.txt", b"# the decoder\norg/a:a.safetensors:vae\n")
    said = sourced({**sourced_settings, "MODELS_FILE": str(listed)}, RUN_MODELS)
    assert (tmp_path / "checkout/models/vae/a.safetensors").readlink() == blob
    assert "MISSING" not in said
    assert said.endswith("code 0\n")
    assert "read 1 of 1 models into memory" in said
    assert (tmp_path / "ramdisk/run/models-settled").exists()


def test_prefetch_is_turned_off_by_a_fraction_of_zero(sourced_settings: dict[str, str], tmp_path: Path) -> None:
    cached(tmp_path, "a.safetensors")
    sourced_settings |= {"MODELS": "org/a:a.safetensors:vae", "PREFETCH_FRACTION": "0"}
    said = sourced(sourced_settings, RUN_MODELS)
    assert (tmp_path / "calls").read_text().splitlines() == ["utils.py --link-only", "utils.py "]
    assert "into memory" not in said


def test_a_fraction_that_is_none_is_told(sourced_settings: dict[str, str], tmp_path: Path) -> None:
    cached(tmp_path, "a.safetensors")
    sourced_settings |= {"MODELS": "org/a:a.safetensors:vae", "PREFETCH_FRACTION": "half"}
    said = sourced(sourced_settings, RUN_MODELS)
    assert "PREFETCH_FRACTION=half is no number from 0 to 1" in said
    assert said.endswith("code 0\n")


def test_a_bad_entry_is_told_and_the_good_ones_are_linked(sourced_settings: dict[str, str], tmp_path: Path) -> None:
    blob = cached(tmp_path, "a.safetensors")
    sourced_settings["MODELS"] = "org/b:b.safetensors,org/a:a.safetensors:vae"
    said = sourced(sourced_settings, RUN_MODELS)
    assert (tmp_path / "checkout/models/vae/a.safetensors").readlink() == blob
    assert "ERROR start.sh A setting of the models cannot be used (above)." in said
    assert "MODELS entry 1 ('org/b:b.safetensors') has 2 of the parts" in said
    assert said.endswith("code 2\n")
    assert (tmp_path / "ramdisk/run/models-settled").exists()


def test_a_list_that_cannot_be_read_is_told_and_the_worker_goes_on(sourced_settings: dict[str, str]) -> None:
    said = sourced({**sourced_settings, "MODELS_FILE": "/nowhere/models.txt"}, RUN_MODELS)
    assert "MODELS_FILE=/nowhere/models.txt cannot be read" in said
    assert "A setting of the models cannot be used (above); jobs that need" in said
