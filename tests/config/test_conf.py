"""Configurations from every source: what they give, and what an error says."""

import copy
import doctest
import importlib
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dengine import ConfigError
from dengine.config import Conf, Config, MissingKeyError

FILES = {
    "c.yaml": "train:\n  lr: 1e-3\n  betas: [0.9, 0.99]\n  on: yes\nname: run-${train.lr}\n",
    "c.yml": "train: {lr: 1e-3, betas: [0.9, 0.99], on: yes}\nname: run-${train.lr}\n",
    "c.toml": 'name = "run-${train.lr}"\n[train]\nlr = 1e-3\nbetas = [0.9, 0.99]\non = "yes"\n',
    "c.json": '{"train": {"lr": 1e-3, "betas": [0.9, 0.99],\n "on": "yes"}, "name": "run-${train.lr}"}',
    "c.sdn": "train:\n    lr: 1e-3\n    betas = [0.9, 0.99]\n    on: yes\nname: run-${train.lr}\n",
}
DATA = {"train": {"lr": 0.001, "betas": [0.9, 0.99], "on": "yes"}, "name": "run-0.001"}


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("is_frozen", [False, True])
def test_every_format_gives_the_same(tmp_path: Path, name: str, is_frozen: bool) -> None:
    cfg = Conf.load(written(tmp_path, name, "\ufeff" + FILES[name]))
    if is_frozen:
        assert Conf.freeze(cfg) is cfg
    for _ in range(2):
        assert cfg.train.lr == cfg["train"]["lr"] == 0.001
        assert isinstance(cfg.train.lr, float)
        assert cfg.train.betas == [0.9, 0.99] == list(cfg.train.betas)
        assert cfg.name == "run-0.001"
    assert Conf.to_dict(cfg) == DATA == cfg
    assert type(Conf.to_dict(cfg)["train"]["betas"]) is list
    assert torch.optim.Adam([torch.zeros(1)], lr=cfg.train.lr, betas=cfg.train.betas)


def test_the_seeds_snippet_reads_its_keys(tmp_path: Path) -> None:
    path = written(tmp_path, "train.sdn", "lr: 0.001\ncheckpoint_dir: checkpoints/run 1\npatience: 5\nepochs: 50\n")
    cfg = Conf.load_sdn(str(path))
    assert (cfg.lr, cfg.checkpoint_dir, cfg.patience, cfg.epochs) == (0.001, "checkpoints/run 1", 5, 50)
    assert Conf.load_sdn(path.rename(tmp_path / "train.conf")).epochs == 50


@pytest.mark.parametrize("name", FILES)
def test_a_missing_key_names_itself_the_file_and_the_closest(tmp_path: Path, name: str) -> None:
    cfg = Conf.load(written(tmp_path, name, FILES[name]))
    expected = rf"There is no 'train\.beta' in .*{name}.* Did you mean 'train\.betas'\? 'train' has lr, betas, on\."
    with pytest.raises(AttributeError, match=expected):
        _ = cfg.train.beta
    with pytest.raises(KeyError, match=expected):
        cfg["train"]["beta"]
    with pytest.raises(
        MissingKeyError, match=r"There is no 'trian' in .*Did you mean 'train'\? There are (train, name|name, train)\."
    ):
        _ = cfg.trian
    assert not hasattr(cfg, "nam")
    assert cfg.get("nam", 3) == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a: 1\nb: [1\n", "a.yaml, line 3"),
        ("a.yaml", "a:\n  1: x\n  true: y\n", "a.yaml, line 3: the key 'true' in 'a' must be text or a whole number"),
        ("a.yaml", "a:\n  b: 1\n  b: 2\n", "a.yaml, line 3: 'a.b' is there twice: first in line 2"),
        ("a.yaml", "a: *x\n", "a.yaml, line 1"),
        ("a.yaml", "a: &x\n  - *x\n", "nested too deep, or contains itself"),
        ("a.yaml", "a: !!python/object:os.x 1\n", "python/object:os.x' at 'a' is not allowed"),
        ("a.yaml", "- 1\n", "is a mapping of keys to values, but this is a list"),
        ("a.yaml", "just text", "this is a single value ('just text')"),
        ("a.yaml", "a:\n  true: 1\n", "line 2: the key 'true' in 'a' must be text or a whole number"),
        ("a.yaml", "a: {<<: 3}\n", "<< takes a mapping"),
        ("a.yaml", "a: \0", "this is no YAML"),
        ("a.yaml", "a: ${b", "line 1: 'a' cannot be used"),
        ("a.json", '{"a": 1,\n "b": }', "a.json, line 2, column 7: this is no JSON"),
        ("a.json", '{"a": {"b": "}\\"",\n "c": [1, {"d": 2,\n "d": 3}]}}', "3: 'a.c[1].d' is there twice"),
        ("a.json", "[" * 100_000, "nested too deep"),
        ("a.toml", "a = 1\na = 2", "this is no TOML"),
        ("a.toml", "a = @\n", "this is no TOML: Invalid value (at line 1, column 5)"),
        ("a.sdn", "a: 1\na: 2", "line 2, column 1: 'a' is there twice"),
        ("a.ini", "", "there is no reader for .ini; there are .yaml, .yml, .toml, .json, .sdn"),
        ("a", "", "no reader for a file without a suffix"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_a_plain_error(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Conf.load(written(tmp_path, name, text))


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.yaml"):
        Conf.load(tmp_path / "no.yaml")
    (tmp_path / "b.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match=r"b\.yaml: this is no UTF-8 text"):
        Conf.load(tmp_path / "b.yaml")
    for suffix in ("yaml", "toml", "json", "sdn"):
        assert Conf.to_dict(Conf.load(written(tmp_path, f"empty.{suffix}", ""))) == {}


def test_yaml_words_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = (
        "base: &b {lr: 1, wd: 2}\nown: {<<: *b, lr: 3}\nboth: {<<: [{lr: 5}, *b]}\nnorway: no\nzip: 007\n"
        "day: 2026-01-02\nhex: 0x10\nnames: {0: cat}\ntext: '1'\ntagged: !!str 1\nfloat: !!float 1\nempty:\ntilde: ~\n"
    )
    data = Conf.to_dict(Conf.load(written(tmp_path, "a.yaml", text)))
    assert data["own"] == {"lr": 3, "wd": 2}
    assert data["both"] == {"lr": 5, "wd": 2}
    assert (data["norway"], data["zip"], data["day"], data["hex"]) == ("no", "007", "2026-01-02", 16)
    assert data["names"] == {0: "cat"}
    assert (data["text"], data["tagged"], data["float"]) == ("1", "1", 1.0)
    assert data["empty"] is data["tilde"] is None
    assert Conf.load(written(tmp_path, "a.toml", "day = 2026-01-02")).day == "2026-01-02"


@pytest.mark.parametrize(
    ("arguments", "data"),
    [
        ([], {}),
        (["train.lr=1e-3", "train.lr=2"], {"train": {"lr": 2}}),
        (["a.b.c=true", "a.b.d=null", "a.e="], {"a": {"b": {"c": True, "d": None}, "e": None}}),
        (["a=[1, x]", "b={c: 1}", 'd="[1]"', "e=k=v"], {"a": [1, "x"], "b": {"c": 1}, "d": "[1]", "e": "k=v"}),
        (["url=http://h:1/x"], {"url": "http://h:1/x"}),
        (["a=x#y", 'b="#x #y"', "c='a #b'", "d=[x#y]"], {"a": "x#y", "b": "#x #y", "c": "a #b", "d": ["x#y"]}),
    ],
)  # fmt: skip
def test_arguments_of_a_command_line(arguments: list[str], data: dict[str, Any]) -> None:
    assert Conf.to_dict(Conf.from_cli_dotlist(arguments)) == data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lr"], "the argument 'train.lr' is not of the form key=value"),
        (["a..b=1"], "is not of the form key=value"),
        (["=1"], "is not of the form key=value"),
        (["a=[1"], "the argument 'a=[1', line 1"),
        (["a=*.jpg"], "takes quotes"),
        (["color=#x"], "begins a comment. Text with such characters takes quotes: color="),
        (["a=it's 1 #isn't"], "begins a comment"),
        (["a=1", "a.b=2"], "'a' is the value 1 in the argument 'a=1', but a mapping in the argument 'a.b=2'"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Conf.from_cli_dotlist(arguments)


def test_an_argument_with_a_key_that_is_not_known_is_named_with_the_closest(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text("train:\n  epochs: 3\n  extra: null\n  dir: ???\nname: x\n")
    known = Conf.load(path)
    fine = ["train.epochs=4", "train.extra.more=1", "train.dir=here", "train={epochs: 5}"]
    assert Conf.merge(known, Conf.from_cli_dotlist(fine, known=known)).train.epochs == 5
    for argument, message in {
        "train.ephocs=4": f"There is no 'train.ephocs' in {path}, line 1. Did you mean 'train.epochs'?",
        "nam=y": f"There is no 'nam' in {path}. Did you mean 'name'?",
        "train={epochs: 4, ephocs: 1}": f"There is no 'train.ephocs' in {path}, line 1. Did you mean 'train.epochs'?",
    }.items():
        with pytest.raises(MissingKeyError, match=re.escape(f"The argument {argument!r}: {message}")):
            Conf.from_cli_dotlist(["name=y", argument], known=known)


def test_merging_is_deep_replaces_lists_and_changes_no_argument() -> None:
    base = Conf.freeze(Conf.from_dict({"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}, "n": None}))
    merged = Conf.merge(base, {"a": {"c": (3,)}, "d": None, "n": {"x": 1}}, Conf.from_cli_dotlist(["a.b=2"]))
    assert merged == {"a": {"b": 2, "c": [3]}, "d": None, "n": {"x": 1}}
    merged.a.b = 5
    assert (merged.a.b, base.a.b) == (5, 1)


def test_an_interpolation_sees_what_was_merged_later() -> None:
    base = Conf.from_dict({"dim": 1, "layers": [{"size": "${dim}"}], "copy": "${layers}"})
    cfg = Conf.merge(base, {"dim": 7})
    assert cfg.layers[0].size == cfg.copy[0].size == 7
    cfg.dim = 8
    assert cfg.layers[0].size == 8
    assert Conf.merge(cfg.layers[0], {"x": 1}) == {"size": 8, "x": 1}


@pytest.mark.parametrize(("first", "second"), [({"k": 1}, 3), (3, {"k": 1}), ({"k": 1}, [1]), ({"k": 1}, "text")])
def test_a_mapping_and_a_value_do_not_merge(tmp_path: Path, first: Any, second: Any) -> None:
    base = Conf.load(written(tmp_path, "a.yaml", f"x:\n  y:\n    z: {first}\n"))
    with pytest.raises(ConfigError, match=r"'x\.y\.z' is .* in .*a\.yaml, line 3, but .* in a dict"):
        Conf.merge(base, {"x": {"y": {"z": second}}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": {"b": "${nope}"}}, "a dict: 'a.b' cannot be used: Interpolation key 'nope' not found"),
        ({"a": {"b": "${a.c}", "c": "${a.b}"}}, "Recursive interpolation"),
        ({"a": {"b": "???"}}, "'a.b' cannot be used: Missing mandatory value"),
        ({"a": {"b": "${oc.env:DENGINE_NOT_SET}"}}, "'DENGINE_NOT_SET' not found"),
    ],
)
def test_a_value_that_cannot_be_resolved_names_its_key(data: dict[str, Any], message: str) -> None:
    cfg = Conf.from_dict({**data, "good": 1})
    assert cfg.good == 1
    for use in (lambda: cfg.a.b, lambda: Conf.to_dict(cfg), lambda: Conf.freeze(cfg)):
        with pytest.raises(ConfigError, match=re.escape(message)):
            use()
    cfg.a.b = 3  # not frozen by the attempt
    assert cfg.a.b == 3


def test_a_frozen_configuration_refuses_every_change() -> None:
    cfg = Conf.from_dict({"a": {"b": [1]}, "c": "${a.b}"})
    part = cfg.a
    Conf.freeze(cfg)
    for change in (lambda: setattr(cfg, "a", 1), lambda: setattr(part, "b", 1), lambda: cfg.a.__setitem__("new", 1)):
        with pytest.raises(ConfigError, match="cannot be set: this configuration is frozen"):
            change()
    with pytest.raises(TypeError):
        cfg.a.b[0] = 5
    assert Conf.to_dict(cfg) == {"a": {"b": [1]}, "c": [1]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1), "'a.b' is a torch.Tensor"),
        ({"c": {1, 2}}, "'a.b.c' is a builtins.set"),
        ({1.5: 2}, "the key 1.5 in 'a.b' must be text"),
        ("${x", "'a.b' cannot be used"),
    ],
)
def test_what_cannot_be_held_is_refused_and_nothing_changes(value: Any, message: str) -> None:
    cfg = Conf.from_dict({"a": {"b": 1}})
    with pytest.raises(ConfigError, match=re.escape(message)):
        cfg.a.b = value
    assert cfg == {"a": {"b": 1}}
    with pytest.raises(ConfigError, match=re.escape(message)):
        Conf.from_dict({"a": {"b": value}})


def test_a_configuration_can_be_changed_copied_pickled_and_unpacked() -> None:
    source = {"a": {"b": 1}}
    cfg = Conf.from_dict(source)
    cfg.a.b, cfg["a"]["new"], cfg.list = 2, {"x": 1}, [1, {"y": 2}]
    assert source == {"a": {"b": 1}}
    for other in (copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert other == cfg == {"a": {"b": 2, "new": {"x": 1}}, "list": [1, {"y": 2}]}
        other.a.b = 3
        assert cfg.a.b == 2
    assert dict(**cfg.a)["b"] == 2
    assert "a" in cfg
    assert {"a", "list"} <= set(dir(cfg))
    assert repr(cfg) == "Config({'a': {'b': 2, 'new': {'x': 1}}, 'list': [1, {'y': 2}]})"


@pytest.mark.parametrize(
    "call",
    [
        lambda: Conf.from_dict([1]),  # type: ignore[arg-type]
        lambda: Conf.from_cli_dotlist("a=1"),
        lambda: Conf.merge(),
        lambda: Conf.merge(3),  # type: ignore[arg-type]
        lambda: Conf.to_dict({}),  # type: ignore[arg-type]
        lambda: Conf.freeze({}),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_kind_of_argument_is_a_type_error(call: Any) -> None:
    with pytest.raises(TypeError, match="takes"):
        call()


def test_without_omegaconf_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    with pytest.raises(ImportError, match=re.escape('pip install "dengine[config]"')):
        Conf.from_dict({})


def test_a_dict_that_contains_itself_is_refused() -> None:
    data: dict[str, Any] = {}
    data["self"] = data
    with pytest.raises(ConfigError, match="contains itself"):
        Conf.from_dict(data)


def test_the_config_is_a_mapping_that_cannot_be_deleted_from() -> None:
    cfg = Conf.from_dict({"a": 1})
    assert isinstance(cfg, Config)
    with pytest.raises(ConfigError, match="'a' cannot be deleted"):
        del cfg.a
    with pytest.raises(ConfigError, match="'a' cannot be deleted"):
        del cfg["a"]
    with pytest.raises(ConfigError, match="cannot be set as an attribute"):
        cfg._a = 1


def test_the_example_of_the_docstring_runs() -> None:
    result = doctest.testmod(importlib.import_module("dengine.config.conf"))
    assert result.attempted > 3
    assert result.failed == 0
