"""The image, built once; a platform that containers reach; the figures at the end."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.image.engine import ROOT, SLEEPS, Engine, ReachablePlatform, Sources, forwarding, require_engine
from tests.process.stack import boot_platform

FIGURES: list[str] = []
STANDIN_REQUIREMENTS = "aiohttp\nPillow==13.0.0\n"


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    require_engine()
    folder = tmp_path_factory.mktemp("engine")
    engine = Engine(folder)
    engine.make_base(folder)
    return engine


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    made = Sources(folder / "context", folder / "repositories")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (made.context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, made.context / name)
    # What lies about in a person's checkout, and must not get into the image.
    (made.context / ".env").write_text("RUNPOD_API_KEY=decoy")
    (made.context / "worker" / "__pycache__").mkdir()
    (made.context / "worker" / "__pycache__" / "decoy.pyc").write_text("decoy")
    (made.context / "image" / "torch-none.txt").write_text("# no torch\n")

    shutil.copytree(
        ROOT / "local" / "comfyui",
        made.repositories / "ComfyUI",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    made.commit("ComfyUI", {"requirements.txt": STANDIN_REQUIREMENTS, "input/example.png": "", "models/vae/keep": ""})
    node = made.commit(
        "TestNodes.git",
        {"requirements.txt": "colorama==0.4.6\n", "__init__.py": "import colorama\n\nNODE_CLASS_MAPPINGS = {}\n"},
    )
    (made.context / "custom_nodes.txt").write_text(f"# for the test\n{node}\n")
    return made


@pytest.fixture(scope="session")
def image(engine: Engine, sources: Sources) -> Iterator[str]:
    """The target `base`, with the stand-in as its ComfyUI and one custom node."""
    tag = "localhost/comfy-endpoint-test"
    built = engine.build(sources.context, tag, "--target=base", *sources.build_options())
    assert built.returncode == 0, f"{built.stdout[-3000:]}\n{built.stderr[-6000:]}"
    with engine.container(tag, SLEEPS):  # while a container is there, there is a bridge, and with it a gateway
        yield tag
    engine.prune()


@pytest.fixture
def platform(engine: Engine, image: str, tmp_path: Path) -> Iterator[ReachablePlatform]:
    gateway = engine.gateway()
    with boot_platform(tmp_path / "platform-log") as platform:
        port = int(platform.url.rpartition(":")[2])
        with forwarding(gateway, port) as forwarded:
            yield ReachablePlatform(platform, f"http://{gateway}:{forwarded}")


@pytest.fixture
def figure() -> Callable[[str], None]:
    return FIGURES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in FIGURES:
        terminalreporter.write_line(line)
