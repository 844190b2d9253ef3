"""What a project's files say never leads out of the project: not on write, not on read, not by a link."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dengine.tracking import Artifact, Run, Track, TrackingError

ESCAPES = ("../../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "..", "", ".", "..\\..\\evil.txt", "C:\\evil", "a\0b")


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with Track.run("p", dir=tmp_path / "runs") as run:
        (tmp_path / "weights.txt").write_text("0.5")
        run.log_artifact(Artifact("model").add_file(tmp_path / "weights.txt", name="sub/weights.txt"))
        yield run


def index_of(run: Run) -> Path:
    return run.dir.parent / "artifacts" / "model.json"


def change(run: Run, edit: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads(index_of(run).read_text())
    edit(index)
    index_of(run).write_text(json.dumps(index))


# -- names that are given ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESCAPES)
def test_a_file_name_that_leads_out_of_the_artifact_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    with pytest.raises(ValueError, match="inside the artifact"):
        Artifact("model").add_file(tmp_path / "a", name=name)


@pytest.mark.parametrize("name", [*ESCAPES, ".hidden", "a b", "a" * 300])
def test_an_artifact_has_a_plain_name_also_where_it_was_changed_later(name: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name"):
        Artifact(name)
    artifact = Artifact("model").add_file(tmp_path / "weights.txt")
    artifact.name = name
    with pytest.raises(ValueError, match="name"):
        run.log_artifact(artifact)


@pytest.mark.parametrize("name", [*ESCAPES, ".hidden", "a/b", "a\nb"])
def test_projects_and_runs_have_names_of_one_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="project="):
        Track.run(name, dir=tmp_path)
    with pytest.raises(ValueError, match="resume="):
        Track.run("p", dir=tmp_path, resume=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alias", [*ESCAPES, "v0"])
def test_aliases_and_references_are_plain_words(alias: str, run: Run) -> None:
    with pytest.raises(ValueError, match="alias"):
        run.log_artifact(run.use_artifact("model"), aliases=[alias])
    with pytest.raises(KeyError):
        run.use_artifact(f"{alias}:latest")


def test_one_file_has_one_name_and_no_file_is_a_folder_too(run: Run, tmp_path: Path) -> None:
    artifact = Artifact("model").add_file(tmp_path / "weights.txt", name="a//b")
    with pytest.raises(ValueError, match="already"):
        artifact.add_file(tmp_path / "weights.txt", name="./a/b")
    artifact.add_file(tmp_path / "weights.txt", name="a/b/c")
    with pytest.raises(ValueError, match="'a/b'"):
        run.log_artifact(artifact)


# -- what an index says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_whose_files_lead_out_is_refused_and_nothing_is_written(name: str, run: Run, tmp_path: Path) -> None:
    def edit(index: dict[str, Any]) -> None:
        files = index["versions"]["v0"]["files"]
        files[name] = files.pop("sub/weights.txt")

    change(run, edit)
    with pytest.raises(TrackingError, match=r"model\.json"):
        run.use_artifact("model").download(tmp_path / "copy" / "below")
    with pytest.raises(TrackingError, match=r"model\.json"):
        run.log_artifact(Artifact("model").add_file(tmp_path / "weights.txt"))
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("path", ESCAPES)
def test_an_index_whose_path_leads_out_is_refused(path: str, run: Run) -> None:
    change(run, lambda index: index["versions"]["v0"].update(path=path))
    with pytest.raises(TrackingError, match=r"model\.json"):
        run.use_artifact("model:v0")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"versions": []}',
        '{"versions": {}, "aliases": 1}',
        '{"versions": {"v0": 1}, "aliases": {}}',
        '{"versions": {"../v0": {}}, "aliases": {}}',
        '{"versions": {"v0": {"digest": "", "type": "", "path": "a"}}, "aliases": {}}',
        '{"versions": {"v0": {"digest": "", "type": "", "path": "a", "files": {"a": 1}}}, "aliases": {}}',
        '{"versions": {}, "aliases": {"latest": ["v0"]}}',
        "[" * 100_000,
        '{"a": ' * 100_000,
        "9" * 5000,
        "\xff\x00",
    ],
)
def test_a_damaged_index_is_named(text: str, run: Run) -> None:
    index_of(run).write_text(text)
    with pytest.raises(TrackingError, match=r"model\.json"):
        run.use_artifact("model")


def test_an_index_that_is_a_pipe_is_not_waited_for(run: Run) -> None:
    index_of(run).unlink()
    os.mkfifo(index_of(run))
    with pytest.raises(TrackingError, match="regular file"):
        run.use_artifact("model")


# -- links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linked", ["sub/weights.txt", "sub", "."])
def test_a_link_in_a_stored_artifact_does_not_lead_out_of_the_project(linked: str, run: Run, tmp_path: Path) -> None:
    stored = run.use_artifact("model").download()
    outside = tmp_path / "outside"
    outside.mkdir()
    (stored / linked).rename(outside / "kept")  # the same bytes, so that the digest holds
    (stored / linked).symlink_to(outside / "kept")
    with pytest.raises(TrackingError, match="leads out of"):
        run.use_artifact("model").download()


@pytest.mark.parametrize("linked", ["sub/weights.txt", "sub"])
def test_a_download_does_not_write_through_a_link(linked: str, run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    target = tmp_path / "copy"
    (target / linked).parent.mkdir(parents=True)
    (target / linked).symlink_to(outside / linked)
    with pytest.raises(TrackingError, match="leads out of"):
        run.use_artifact("model").download(target)
    assert [path.name for path in outside.rglob("*")] == ["sub"]


def test_a_pipe_in_a_stored_artifact_is_named_and_not_waited_for(run: Run) -> None:
    file = run.use_artifact("model").download() / "sub" / "weights.txt"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(TrackingError, match="regular file"):
        run.use_artifact("model").download()


def test_links_in_an_added_folder_are_followed_out_of_it_only_on_request(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a").write_text("a")
    (folder / "b").symlink_to("a")  # stays inside
    assert Artifact("data").add_dir(folder).files == ["a", "b"]
    (folder / "c").symlink_to(tmp_path / "weights.txt")
    artifact = Artifact("data")
    with pytest.raises(ValueError, match="follow_links=True"):
        artifact.add_dir(folder)
    assert artifact.files == []
    (folder / "d").symlink_to(tmp_path / "more", target_is_directory=True)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "e").write_text("e")
    files = run.log_artifact(artifact.add_dir(folder, follow_links=True)).download()
    assert [(files / name).read_text() for name in artifact.files] == ["a", "a", "0.5", "e"]


def test_a_folder_that_links_to_itself_ends_in_an_error(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data", target_is_directory=True)
    for follow_links in (False, True):
        with pytest.raises(ValueError, match="again"):
            Artifact("data").add_dir(tmp_path / "data", follow_links=follow_links)


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock"])
def test_a_resumed_run_writes_through_no_link(name: str, run: Run, tmp_path: Path) -> None:
    run.finish()
    precious = tmp_path / "precious"
    precious.write_text("half a line")
    (run.dir / name).unlink()
    (run.dir / name).symlink_to(precious)
    with pytest.raises(TrackingError):
        Track.run("p", dir=tmp_path / "runs", resume=run.id)
    assert precious.read_text() == "half a line"


@pytest.mark.parametrize("linked", ["artifacts", "artifacts/.lock"])
def test_no_artifact_is_logged_through_a_link(linked: str, run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (run.dir.parent / linked).rename(outside)
    (run.dir.parent / linked).symlink_to(outside)
    with pytest.raises((TrackingError, OSError)):
        run.log_artifact(Artifact("model").add_file(tmp_path / "weights.txt"))


# -- the file that says which run it is ----------------------------------------------------------------------------


def test_a_resumed_run_stays_in_its_folder_whatever_its_file_says(run: Run, tmp_path: Path) -> None:
    run.finish()
    identity = json.loads((run.dir / "run.json").read_text())
    (run.dir / "run.json").write_text(json.dumps({**identity, "id": "../../evil", "project": "/tmp/evil"}))
    with Track.run("p", dir=tmp_path / "runs", resume=run.id) as resumed:
        assert (resumed.id, resumed.dir) == (run.id, run.dir)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("wrong", [{"name": 3}, {"tags": 3}])
def test_a_damaged_identity_is_named(wrong: dict[str, Any], run: Run, tmp_path: Path) -> None:
    run.finish()
    (run.dir / "run.json").write_text(json.dumps({"id": run.id, "project": "p"} | wrong))
    with pytest.raises(TrackingError, match=r"run\.json"):
        Track.run("p", dir=tmp_path / "runs", resume=run.id)


def test_rows_that_are_odd_do_not_keep_a_run_from_being_resumed(run: Run, tmp_path: Path) -> None:
    run.log({"a": 1})
    run.finish()
    with open(run.dir / "metrics.jsonl", "a") as rows:
        rows.write('{"step": "Infinity", "a": 2}\n' + "[" * 100_000 + "\n")
    with Track.run("p", dir=tmp_path / "runs", resume=run.id) as resumed:
        assert resumed.summary["a"] == 2
