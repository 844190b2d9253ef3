"""The examples in one process: what they print is what their checkpoints hold; CIFAR-10 in both published formats."""

import importlib
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from dengine.config import Conf

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return load_example("digits")


@pytest.fixture(scope="module")
def data(digits: ModuleType) -> ModuleType:
    return sys.modules["_data"]


@pytest.fixture(scope="module")
def config() -> ModuleType:
    return load_example("_config")


def run_digits(*options: object) -> subprocess.CompletedProcess[str]:
    return run_example("digits", *options)


def run_example(name: str, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, options)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=1000, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run of two epochs printed, and its output folder."""
    folder = tmp_path_factory.mktemp("digits")
    done = run_digits("--epochs", 2, "--output", folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def accuracy_in(printed: str) -> tuple[int, int, float]:
    found = re.search(r"Validation accuracy: (\d+)/(\d+) = (\S+)", printed)
    assert found, printed
    return int(found[1]), int(found[2]), float(found[3])


def path_in(printed: str, name: str) -> Path:
    found = re.search(rf"^{name}: +(.*)$", printed, re.MULTILINE)
    assert found, printed
    return Path(found[1])


# -- digits ------------------------------------------------------------------------------------------------------


def test_the_printed_accuracy_is_that_of_the_saved_weights_on_the_held_out_fifth(
    trained: tuple[str, Path], digits: ModuleType
) -> None:
    printed, _ = trained
    scans = load_digits()
    held_out = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[: 1797 // 5]
    net = digits.residual_net(num_channels=1)
    net.load_state_dict(torch.load(path_in(printed, "Checkpoint"), weights_only=True)["model"])
    with torch.no_grad():
        scores = net.eval()(torch.from_numpy(scans.images).float().unsqueeze(1))
    correct = int((scores.argmax(1) == torch.from_numpy(scans.target))[held_out].sum())
    assert accuracy_in(printed) == (correct, 359, correct / 359)
    assert correct / 359 > 0.9


def test_training_and_held_out_scans_are_all_there_are(data: ModuleType) -> None:
    train_set, val_set = data.load_digits()
    assert (len(train_set), len(val_set)) == (1797 - 359, 359)
    seen = torch.cat([train_set.tensors[0], val_set.tensors[0]]).flatten(1).tolist()
    assert sorted(seen) == sorted(load_digits().images.reshape(1797, 64).astype(int).tolist())


def test_the_record_has_an_epoch_a_line_and_the_best_of_them_is_what_was_saved(trained: tuple[str, Path]) -> None:
    printed, folder = trained
    numbers = path_in(printed, "Numbers")
    assert numbers.parent.parent == folder / "digits"
    assert path_in(printed, "Checkpoint").parent == numbers.parent
    rows = [json.loads(line) for line in numbers.read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 15), (2, 30)]
    assert {"train/loss", "val/loss", "val/acc", "lr", "samples_per_s"} <= rows[0].keys()
    assert max(row["val/acc"] for row in rows) == pytest.approx(accuracy_in(printed)[2], abs=1e-6)
    assert json.loads(numbers.with_name("config.json").read_text())["epochs"] == 2
    assert path_in(printed, "Curves").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_came_to_its_end_is_not_gone_on_with(trained: tuple[str, Path]) -> None:
    _, folder = trained
    again = run_digits("--epochs", 2, "--output", folder)
    assert again.returncode == 0, again.stderr
    assert "Going on" not in again.stdout
    first, second = (each.read_text().splitlines() for each in folder.glob("digits/*/metrics.jsonl"))
    assert [len(first), len(second)] == [2, 2]


def cut_short(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """The script's process, once the first of its epochs is recorded."""
    command = [sys.executable, str(EXAMPLES / "digits.py"), "--output", str(folder), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 600
    while not any(path.stat().st_size for path in folder.glob("digits/*/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_run_that_was_cut_short_goes_on_and_ends_with_the_weights_of_one_that_was_not(
    number: signal.Signals, code: int, trained: tuple[str, Path], tmp_path: Path
) -> None:
    process = cut_short(tmp_path, "--epochs", "2")
    process.send_signal(number)
    assert process.wait(600) == code
    done = run_digits("--epochs", 2, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    (numbers,) = tmp_path.glob("digits/*/metrics.jsonl")  # one run
    rows, uninterrupted = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (numbers, path_in(trained[0], "Numbers"))
    )
    # Killed right behind a row, before the epoch is saved, it does that epoch again.
    assert [row["step"] for row in rows] in ([15, 30], [15, 15, 30])
    for name in ("train/loss", "val/loss", "val/acc", "lr"):
        assert [rows[0][name], rows[-1][name]] == [row[name] for row in uninterrupted], name
    assert accuracy_in(done.stdout) == accuracy_in(trained[0])
    weights, same = (
        torch.load(path_in(printed, "Checkpoint"), weights_only=True)["model"] for printed in (done.stdout, trained[0])
    )
    assert all(torch.equal(weights[name], same[name]) for name in same)


def test_which_run_goes_on(config: ModuleType, tmp_path: Path) -> None:
    """The newest with the same settings, unless it came to its end; whatever others have done since."""

    def record(run: str, lr: float, status: str) -> None:
        folder = tmp_path / "digits" / run
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"output": str(tmp_path), "lr": lr, "data": None}))
        (folder / "status.json").write_text(json.dumps({"status": status}))

    def found(lr: float) -> object:
        return config.unfinished_run("digits", Conf.from_dict({"output": str(tmp_path), "lr": lr, "data": None}))

    assert found(0.1) is None
    record("20260101-000000-aaaaaa", 0.1, "running")  # killed: a run that ends by itself says so
    record("20260102-000000-aaaaaa", 0.2, "failed")
    assert (found(0.1), found(0.2), found(0.3)) == ("20260101-000000-aaaaaa", "20260102-000000-aaaaaa", None)
    record("20260103-000000-aaaaaa", 0.1, "finished")
    assert (found(0.1), found(0.2)) == (None, "20260102-000000-aaaaaa")


def test_evaluate_only_finds_the_accuracy_again_and_writes_nothing(trained: tuple[str, Path], tmp_path: Path) -> None:
    printed, _ = trained
    done = run_digits("--evaluate-only", path_in(printed, "Checkpoint"), "--output", tmp_path / "none")
    assert accuracy_in(done.stdout) == accuracy_in(printed), done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "error: epochs=0 must be a whole number above 0"),
        (["--epochs", "x"], "epochs=x must be a whole number above 0"),
        (["--epochs", "true"], "epochs=True must be a whole number above 0"),
        (["--batch-size", "-96"], "batch_size=-96 must be a whole number above 0"),
        (["--patience", "1.5"], "patience=1.5 must be a whole number above 0"),
        (["--lr", "0"], "lr=0 must be a number above 0"),
        (["--lr", ".nan"], "lr=nan must be a number above 0"),
        (["--seed", "x"], "seed=x must be a whole number of at least 0"),
        (["--output", ""], "output=None must be a text"),
        (["--evaluate-only", "none.pt"], "evaluate_only=none.pt: there is no such file"),
        (["--epoch-s", "1"], "unrecognized arguments: --epoch-s 1"),
    ],
)
def test_a_wrong_option_is_named(
    options: list[str],
    message: str,
    digits: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["digits.py", *options])
    with pytest.raises(SystemExit) as ended:
        digits.read_config()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "folder"), [("mnist", None), ("cifar10", None), ("digits", "."), (1, None)])
def test_data_that_are_not_there_end_the_script_with_one_line(name: Any, folder: str | None, data: ModuleType) -> None:
    with pytest.raises(SystemExit, match=f"error: data={name} with data_dir={folder}: it is digits, or cifar10"):
        data.load_images(name, folder)


# -- the others --------------------------------------------------------------------------------------------------


def test_the_gan_records_the_distance_of_what_its_checkpoint_draws(tmp_path: Path) -> None:
    options = ("epochs=2", "measure_every=1", "num_samples=20000", f"output={tmp_path}")
    done = run_example("gan", *options)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in next(tmp_path.glob("gan/*/metrics.jsonl")).read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 14), (2, 28)]
    assert path_in(done.stdout, "Picture").read_bytes().startswith(b"\x89PNG")

    gan = load_example("gan")
    net = gan.new_generator(num_noise=32)
    net.load_state_dict(torch.load(path_in(done.stdout, "Checkpoint"), weights_only=True)["average"]["model"])
    with torch.no_grad():
        drawn = net.eval()(torch.randn(20000, 32)).flatten(1).double().numpy()
    real = load_digits()
    held_out = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[: 1797 // 5]
    pixels = real.images[held_out].reshape(-1, 64) / 8 - 1
    first, second = (np.cov(each.T, ddof=0) for each in (drawn, pixels))
    common = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
    distance = ((drawn.mean(0) - pixels.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * common
    assert rows[-1]["val/distance"] == pytest.approx(distance, rel=0.05)  # other noise than the script's


def test_the_language_model_goes_on_where_it_was_and_its_perplexity_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    options = ("max_texts=200", "warm_up=2", "save_every=2", "model.num_layers=1", f"output={tmp_path}")
    first = run_example("language_model", "epochs=2", *options)
    assert first.returncode == 0, first.stderr
    second = run_example("language_model", "epochs=4", *options)
    assert second.returncode == 0, second.stderr
    assert "Going on from" in second.stdout
    (numbers,) = tmp_path.glob("language_model/*/metrics.jsonl")  # one run
    rows = [json.loads(line) for line in numbers.read_text().splitlines()]
    assert [row["step"] for row in rows if "val/perplexity" in row] == [5, 10, 15, 20]
    # The first run's wave had come to its end, a twentieth; the second one does not take it up again.
    assert [row["lr"] for row in rows if "lr" in row] == pytest.approx([1e-4, 1e-4])

    module = load_example("language_model")
    net = module.GPT(128, width=128, num_heads=4, num_layers=1, dropout=0.1)
    net.load_state_dict(torch.load(path_in(second.stdout, "Checkpoint"), weights_only=True)["model"])
    held_out = module.docstrings(128, 200)[:20]
    with torch.no_grad():
        loss, count = module.loss_and_count(net.eval(), held_out)
    assert float(second.stdout.split("held out: ")[1].split()[0]) == pytest.approx(
        float((loss / count).exp()), rel=1e-5
    )


def test_the_language_model_trains_on_texts_without_padding(tmp_path: Path) -> None:
    options = ("packed=true", "max_texts=200", "warm_up=2", "save_every=2", "model.num_layers=1", "epochs=2")
    done = run_example("language_model", *options, f"output={tmp_path}")
    assert done.returncode == 0, done.stderr
    (numbers,) = tmp_path.glob("language_model/*/metrics.jsonl")
    rows = [json.loads(line) for line in numbers.read_text().splitlines()]
    module = load_example("language_model")
    num_steps = int((module.docstrings(128, 200)[20:] != module.PADDING).sum()) // 129 // 32
    assert [row["step"] for row in rows if "val/perplexity" in row] == [num_steps, 2 * num_steps]
    perplexities = [row["train/perplexity"] for row in rows if "train/perplexity" in row]
    assert perplexities[1] < perplexities[0]


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("gan", "ephocs=1", "Did you mean 'epochs'?"),
        ("gan", "epochs", "is not of the form key=value"),
        ("gan", "epochs=0", "epochs=0 must be a whole number above 0"),
        ("gan", "ema_decay=1", "ema_decay=1 must be a number from 0 to below 1"),
        ("language_model", "model.with=1", "Did you mean 'model.width'?"),
        ("language_model", "mesh=tp", "mesh=tp must be sizes by name, such as dp_shard=2,tp=2"),
        ("language_model", "mesh=x=2", "a dimension 'x', but the names are data: dp"),
        ("language_model", "--mesh=tp=2,tp=2", "with each name once"),
        ("language_model", "--mesh", "--mesh needs a value"),
        ("language_model", "--ephocs=1", "Did you mean 'epochs'?"),
        ("language_model", "epochs=x", "epochs=x must be a whole number above 0"),
        ("language_model", "max_texts=x", "max_texts=x must be a whole number above 0"),
    ],
)
def test_a_wrong_argument_ends_the_script_with_one_line(
    name: str,
    argument: str,
    message: str,
    config: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", argument])
    (path,) = (path for path in EXAMPLES.glob(f"{name}.*") if path.suffix in (".toml", ".sdn"))
    with pytest.raises(SystemExit) as ended:
        cfg = config.read_arguments(path, None, fractions=["ema_decay", "model.dropout"])
        config.mesh_sizes(cfg.mesh)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_width_that_the_heads_cannot_share_ends_the_script_before_a_model_is_built() -> None:
    done = run_example("language_model", "model.width=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: model.width=3 does not divide into model.num_heads=4\n"


@pytest.mark.parametrize(("name", "entry"), [("gan", "measure_every = 10"), ("language_model", "    num_heads: 4")])
def test_help_shows_what_can_be_given(name: str, entry: str) -> None:
    done = run_example(name, "epochs=1", "--help")
    assert done.returncode == 0, done.stderr
    assert f"python examples/{name}.py" in done.stdout
    assert entry in done.stdout


def test_ctrl_c_ends_a_run_with_one_line(config: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(world: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        config.start(interrupted)
    assert ended.value.code == 130
    assert capsys.readouterr().out == "Interrupted.\n"


def load_example(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module(name)


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2 did, which wrote the published files: every string is one of bytes."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, text: str | bytes) -> None:
        raw = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)  # type: ignore[attr-defined]
        self.memoize(text)  # type: ignore[attr-defined]

    dispatch[bytes] = dispatch[str] = save_bytes


def write_binary(path: Path, pixels: np.ndarray, labels: list[int]) -> None:
    rows = [bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True)]
    path.with_suffix(".bin").write_bytes(b"".join(rows))


def write_python_2(path: Path, pixels: np.ndarray, labels: list[int]) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump({"batch_label": path.name, "labels": labels, "data": pixels})
    # Where numpy's function lay then.
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in path.read_bytes()
    assert b"_codecs" not in path.read_bytes()


def write_python_3(path: Path, pixels: np.ndarray, labels: list[int]) -> None:
    path.write_bytes(pickle.dumps({b"batch_label": b"testing", b"labels": labels, b"data": pixels}, protocol=2))


Write = Callable[[Path, np.ndarray, list[int]], None]
every_format = pytest.mark.parametrize("write", [write_binary, write_python_2, write_python_3])


def write_cifar10(folder: Path, write: Write, num_images: int = 4) -> dict[str, tuple[np.ndarray, list[int]]]:
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    written = {}
    for name in BATCHES:
        pixels = generator.integers(0, 256, (num_images, 3072), dtype=np.uint8)
        labels = generator.integers(0, 10, num_images).tolist()
        write(folder / name, pixels, labels)
        written[name] = (pixels, labels)
    return written


@every_format
def test_cifar10_is_read_in_each_format_as_it_was_written(write: Write, data: ModuleType, tmp_path: Path) -> None:
    written = write_cifar10(tmp_path, write)
    train_set, val_set = data.load_cifar10(tmp_path)
    assert (len(train_set), len(val_set)) == (20, 4)
    pixels, labels = written["data_batch_3"]
    images = train_set.tensors[0]
    assert images.shape == (20, 3, 32, 32)
    assert images.dtype == torch.uint8
    # The second image of the third batch: 1024 bytes of red, then green, then blue, each row by row.
    assert images[9, 2, 5, 7] == pixels[1, 2 * 1024 + 5 * 32 + 7]
    assert train_set.tensors[1][8:12].tolist() == labels
    assert val_set.tensors[0].flatten(1).tolist() == written["test_batch"][0].tolist()
    assert val_set.tensors[1].tolist() == written["test_batch"][1]


@pytest.mark.parametrize(
    ("write", "name"), [(write_binary, "cifar-10-batches-bin"), (write_python_2, "cifar-10-batches-py")]
)
def test_the_main_job_trains_on_cifar10_from_the_folder_where_it_was_unpacked(
    write: Write, name: str, tmp_path: Path
) -> None:
    write_cifar10(tmp_path / name, write)
    output = tmp_path / "run"
    options = ("--epochs", 1, "--batch-size", 10, "--data", "cifar10", "--data-dir", tmp_path, "--output", output)
    done = run_digits(*options)
    assert done.returncode == 0, done.stderr
    assert accuracy_in(done.stdout)[1] == 4
    saved = torch.load(path_in(done.stdout, "Checkpoint"), weights_only=True)["model"]
    assert saved["1.body.0.weight"].shape[1] == 3


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(protocol: int, data: ModuleType, tmp_path: Path) -> None:
    write_cifar10(tmp_path, write_python_2)
    path, folder = tmp_path / "data_batch_2", tmp_path / "made by the pickle"
    content = pickle.dumps({"labels": [1], "data": Malicious(folder)}, protocol=protocol)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_2 is no batch of CIFAR-10: it asks for \w+\.mkdir"):
        data.load_cifar10(tmp_path)
    assert not folder.exists()
    pickle.loads(content)
    assert folder.exists()  # it would have


@every_format
@pytest.mark.parametrize("name", ["data_batch_4", "test_batch"])
@pytest.mark.parametrize("damage", [b"", b"\x00\x80 not a batch", None])
def test_a_batch_that_is_damaged_or_missing_is_named(
    write: Write, name: str, damage: bytes | None, data: ModuleType, tmp_path: Path
) -> None:
    write_cifar10(tmp_path, write)
    path = next(tmp_path.glob(f"{name}*"))
    if damage is not None:
        path.write_bytes(damage)
    elif name == "data_batch_4":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])  # cut off
    with pytest.raises(ValueError, match=rf"{name}(\.bin)? is (missing|no batch of CIFAR-10): "):
        data.load_cifar10(tmp_path)


@every_format
def test_a_label_that_is_none_of_the_ten_is_an_error(write: Write, data: ModuleType, tmp_path: Path) -> None:
    write_cifar10(tmp_path, write)
    write(tmp_path / "data_batch_5", np.zeros((2, 3072), np.uint8), [0, 10])
    with pytest.raises(ValueError, match="data_batch_5.* labels go from 0 to 10"):
        data.load_cifar10(tmp_path)


def test_pixels_of_a_wrong_shape_are_an_error(data: ModuleType, tmp_path: Path) -> None:
    write_cifar10(tmp_path, write_python_2)
    write_python_2(tmp_path / "data_batch_5", np.zeros((2, 100), np.uint8), [0, 1])
    with pytest.raises(ValueError, match=r"data_batch_5.* pixels of shape \(2, 100\) and type uint8"):
        data.load_cifar10(tmp_path)


def test_a_folder_without_cifar10_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    done = run_digits("--data", "cifar10", "--data-dir", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path} holds no CIFAR-10")
    assert "Traceback" not in done.stderr
