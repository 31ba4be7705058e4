"""The note about each model, and what a caller whose workflow misses one is told."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.models.manifest import ModelRecord, read_manifest, sentence_about, write_manifest


def record(name: str, *, source: str | None = "host cache", error: str | None = None) -> ModelRecord:
    path = f"/ComfyUI/models/vae/{name}"
    return ModelRecord(name, f"org/repo:{name}", path, source, 5 if source else None, 0.1, None, error)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    records = [record("a.safetensors"), record("b.safetensors", source=None, error="the repository is gated")]
    write_manifest(tmp_path / "models.json", records)
    assert read_manifest(tmp_path / "models.json") == records
    assert [path.name for path in tmp_path.iterdir()] == ["models.json"]


@given(content=st.binary(max_size=60) | st.sampled_from([b"[]", b'{"models": [{}]}', b'{"models": 5}', b"null"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_no_manifest_is_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "models.json").write_bytes(content)
    assert read_manifest(tmp_path / "models.json") == []
    assert read_manifest(tmp_path / "absent.json") == []


@pytest.mark.parametrize(
    ("known", "settled", "said"),
    [
        (record("x.safetensors", source=None, error="set HF_TOKEN."), True, "it is missing: set HF_TOKEN."),
        (record("x.safetensors", source=None), False, "it is still being downloaded."),
        (record("x.safetensors", source=None), True, "it was not downloaded; the container's log says why."),
        (record("X.safetensors"), True, "at /ComfyUI/models/vae/X.safetensors, where this node does not look."),
    ],
)
def test_a_model_that_models_names_is_explained(known: ModelRecord, settled: bool, said: str) -> None:
    others = [record("y.safetensors")]
    for asked in ("x.safetensors", "flux/x.safetensors"):
        sentence = sentence_about(asked, [*others, known], settled=settled)
        assert sentence is not None and said in sentence and ".." not in sentence
    assert sentence_about("z.safetensors", [*others, known], settled=settled) is None


def test_of_several_files_of_one_name_the_missing_one_is_told() -> None:
    records = [record("model.safetensors"), record("model.safetensors", source=None, error="it is gated")]
    assert "it is gated" in str(sentence_about("model.safetensors", records, settled=True))
