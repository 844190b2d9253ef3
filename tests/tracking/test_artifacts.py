"""Versions, aliases, and bytes that are what was stored."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dengine.tracking import Artifact, Run, Track, TrackingError


def model(folder: Path, contents: str, name: str = "model") -> Artifact:
    path = folder / "weights.bin"
    path.write_text(contents)
    return Track.Artifact(name, type="model").add_file(path)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Track.run("p", dir=tmp_path / "runs") as run:
        yield run


def test_versions_count_up_and_contents_stored_before_are_not_stored_again(run: Run, tmp_path: Path) -> None:
    versions = [run.log_artifact(model(tmp_path, contents)).version for contents in "abaac"]
    assert versions == ["v0", "v1", "v0", "v0", "v2"]
    assert sorted(path.name for path in (run.dir / "artifacts" / "model").iterdir()) == ["v0", "v1", "v2"]


def test_the_same_bytes_under_another_file_name_are_another_version(run: Run, tmp_path: Path) -> None:
    run.log_artifact(model(tmp_path, "a"))
    renamed = Track.Artifact("model", type="model").add_file(tmp_path / "weights.bin", name="other.bin")
    assert run.log_artifact(renamed).version == "v1"


def test_an_alias_moves_and_a_version_stays(run: Run, tmp_path: Path) -> None:
    run.log_artifact(model(tmp_path, "a"), aliases=["best", "first"])
    run.log_artifact(model(tmp_path, "b"), aliases=["best"])
    read = {
        reference: (run.use_artifact(reference).download() / "weights.bin").read_text()
        for reference in ("model:best", "model:first", "model:v0", "model:v1", "model:latest", "model")
    }
    assert list(read.values()) == ["b", "a", "a", "b", "b", "b"]
    assert run.use_artifact("model:best").version == "v1"


def test_aliases_may_be_given_to_a_stored_version(run: Run, tmp_path: Path) -> None:
    run.log_artifact(model(tmp_path, "a"))
    run.log_artifact(model(tmp_path, "b"))
    run.log_artifact(run.use_artifact("model:v0"), aliases=["chosen"])
    assert run.use_artifact("model:chosen").version == "v0"


def test_another_run_of_the_project_finds_it_and_counts_on(run: Run, tmp_path: Path) -> None:
    run.log_artifact(model(tmp_path, "a"), aliases=["final"])
    run.finish()
    with Track.run("p", dir=tmp_path / "runs") as second:
        assert second.use_artifact("model:final").version == "v0"
        assert second.log_artifact(model(tmp_path, "b")).version == "v1"
    with Track.run("other", dir=tmp_path / "runs") as third, pytest.raises(KeyError, match="no artifact 'model'"):
        third.use_artifact("model:final")


def test_the_record_of_the_run_has_digests(run: Run, tmp_path: Path) -> None:
    run.log_artifact(model(tmp_path, "a"), aliases=["final"])
    noted = json.loads((run.dir / "artifacts.json").read_text())
    assert noted["logged"][0]["files"] == {"weights.bin": hashlib.sha256(b"a").hexdigest()}
    assert noted["logged"][0]["aliases"] == ["final"]
    assert (run.dir / "artifacts" / "model" / "v0" / "weights.bin").read_text() == "a"


def test_a_changed_file_is_named(run: Run, tmp_path: Path) -> None:
    stored = run.log_artifact(model(tmp_path, "a")).download() / "weights.bin"
    stored.write_text("b")
    with pytest.raises(TrackingError, match=r"model/v0/weights\.bin of model:v0 has changed: its SHA-256 is"):
        run.use_artifact("model").download()
    stored.unlink()
    with pytest.raises(TrackingError, match=r"weights\.bin of model:v0 cannot be read"):
        run.use_artifact("model").download(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_contents_that_were_deleted_are_stored_anew(run: Run, tmp_path: Path) -> None:
    (run.log_artifact(model(tmp_path, "a")).download() / "weights.bin").unlink()
    assert run.log_artifact(model(tmp_path, "a")).version == "v1"


def test_a_copy_goes_where_it_is_wanted_and_folders_keep_their_shape(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "x.txt").write_text("x")
    (tmp_path / "data" / "y.txt").write_text("y")
    run.log_artifact(Track.Artifact("set", type="dataset").add_dir(tmp_path / "data", "d"))
    copy = run.use_artifact("set").download(tmp_path / "copy")
    assert copy == tmp_path / "copy"
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*.txt")) == ["d/deep/x.txt", "d/y.txt"]


@pytest.mark.parametrize("aliases", [["v3"], ["a:b"], ["a/b"], [""], [3]])
def test_what_is_no_alias_is_refused_and_nothing_is_stored(aliases: list[str], run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The alias"):
        run.log_artifact(model(tmp_path, "a"), aliases=["good", *aliases])
    assert not (run.dir / "artifacts").exists()


def test_wrong_artifacts_are_refused_with_the_way_out(run: Run, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"aliases='best' must be a list of names: \['best'\]"):
        run.log_artifact(model(tmp_path, "a"), aliases="best")
    with pytest.raises(TypeError, match="takes an Artifact, but got 'model.pt'"):
        run.log_artifact("model.pt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no file"):
        run.log_artifact(Track.Artifact("empty", type="model"))
    with pytest.raises(FileNotFoundError, match="nothing.pt, a file of the artifact 'm', is not there"):
        run.log_artifact(Track.Artifact("m").add_file(tmp_path / "nothing.pt"))
    with pytest.raises(RuntimeError, match="not stored yet"):
        model(tmp_path, "a").download()
    with pytest.raises(ValueError, match="has a file 'weights.bin' already"):
        model(tmp_path, "a").add_file(tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="must be a path inside"):
        Track.Artifact("m").add_file(tmp_path / "x", name="../x")
    with pytest.raises(ValueError, match="letters, digits"):
        Track.Artifact("a/b")


def test_a_name_or_alias_that_is_not_there_lists_those_that_are(run: Run, tmp_path: Path) -> None:
    run.log_artifact(model(tmp_path, "a"), aliases=["best"])
    with pytest.raises(KeyError, match=r"has no 'bst'; it has 'v0', 'best', 'latest' \(closest: 'best'\)"):
        run.use_artifact("model:bst")
    with pytest.raises(KeyError, match=r"no artifact 'modl'; there is 'model' \(closest: 'model'\)"):
        run.use_artifact("modl:best")


def test_a_write_that_fails_leaves_neither_a_version_nor_half_a_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, target: Path) -> None:
        target.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dengine.tracking.artifact_store._stored", full)
    with pytest.raises(OSError, match="No space left"):
        run.log_artifact(model(tmp_path, "a"))
    assert not (run.dir / "artifacts" / "model").exists()
    with pytest.raises(KeyError):
        run.use_artifact("model")
