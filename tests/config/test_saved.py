r"""config.yaml: what is written comes back, `${...}` in plain text included; what is not read at all."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers import composed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationKeyError

from dppo_cli.config.saved import LATER, MAX_BYTES, MAX_DEPTH, read_config, sign, to_yaml
from dppo_cli.errors import ConfigError, RunError

TEXT = st.lists(st.sampled_from(["\\", "$", "{", "}", "${", "\\${", "x", ":", ".", "'", '"', "\n", " "])).map("".join)
"""What YAML and OmegaConf give a meaning to."""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """The value of a variable of the environment."""
    monkeypatch.setenv("DPPO_MARK", "blue7")
    return "blue7"


def written(**values: object) -> DictConfig:
    """What is read back of a config."""
    return OmegaConf.create(to_yaml(OmegaConf.create(values)))


def raw(node: DictConfig) -> object:
    return OmegaConf.to_container(node, resolve=False)


# Writing


def test_a_run_from_before_there_were_several_processes_had_one(tmp_path: Path) -> None:
    old = tmp_path / "config.yaml"
    old.write_text(sign("hardware:\n  device: cpu\nseed: 1\n"))
    node, trusted = read_config(old)
    assert trusted and node == {"hardware": {"device": "cpu", "processes": 1}, "seed": 1}
    old.write_text(sign("hardware:\n  processes: 3\n"))
    assert read_config(old)[0].hardware.processes == 3
    old.write_text(sign("model: x\n"))
    assert "hardware" not in read_config(old)[0]


def test_a_run_from_before_there_were_regions_filters_and_environments_had_none(tmp_path: Path) -> None:
    old = tmp_path / "config.yaml"
    old.write_text(sign("objective: {_target_: a.B}\nverdict: upper\n"))
    node, trusted = read_config(old)
    assert trusted and node.verdict == "upper"
    new = composed("train")
    assert (node.region, node.filter, node.environment) == (new.region, new.filter, new.environment)
    assert raw(OmegaConf.create({key: value for key, value in LATER.items() if "." not in key})) == {
        key: raw(new)[key]  # type: ignore[index]
        for key in ("verdict", "region", "filter", "environment")
    }


def test_values_are_written_resolved() -> None:
    back = written(a=1, b="${a}", c={"d": "${b}0", "e": ["${a}", {"f": "${c.d}"}]}, g="${c}", h=None, i=1e-3)
    c = {"d": "10", "e": [1, {"f": "10"}]}
    assert raw(back) == {"a": 1, "b": 1, "c": c, "g": c, "h": None, "i": 0.001}


def test_what_comes_from_the_environment_stays_a_question(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directly, through another key, in lists and sections, converted, and as a default that was not used."""
    values = {
        "a": "${oc.env:DPPO_MARK}",
        "b": "<${a}>",
        "c": {"d": ["${oc.env:DPPO_MARK}", {"e": "${b}"}]},
        "f": "${c}",
        "g": "${oc.decode:${oc.env:DPPO_COUNT,'3'}}",
        "h": "${oc.env:DPPO_${i}}",
        "i": "MARK",
    }
    text = to_yaml(OmegaConf.create(values))
    assert mark not in text
    assert raw(OmegaConf.create(text)) == values
    monkeypatch.setenv("DPPO_MARK", "red8")
    back = OmegaConf.create(text)
    assert (back.a, back.b, back.c.d[0], back.f.d[1].e, back.g, back.h) == (
        "red8",
        "<red8>",
        "red8",
        "<red8>",
        3,
        "red8",
    )


def test_the_environment_is_asked_as_before_afterwards(mark: str) -> None:
    to_yaml(OmegaConf.create({"a": "${oc.env:DPPO_MARK}"}))
    assert OmegaConf.create({"a": "${oc.env:DPPO_MARK}"}).a == mark
    with pytest.raises(Exception, match="DPPO_NOTHING"):
        to_yaml(OmegaConf.create({"a": "${oc.env:DPPO_NOTHING}"}))
    assert OmegaConf.create({"a": "${oc.env:DPPO_NOTHING,x}"}).a == "x"


@pytest.mark.parametrize("name", ["HF_TOKEN", "'HF_TOKEN'", '"HF_TOKEN"', " HF_TOKEN", "HF_TOKEN,x"])
def test_a_secret_is_not_even_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=r"\$\{oc\.env:HF_TOKEN\} would put a secret into files"):
        to_yaml(OmegaConf.create({"a": {"b": [f"x ${{oc.env:{name}}}"]}}))


@pytest.mark.parametrize("text", [r"\${x}", r"a \${oc.env:HOME} b", r"\\\${x}", r"\${", r"x\\\${a} \${b}"])
def test_text_that_looks_like_an_interpolation(text: str) -> None:
    node = OmegaConf.create({"a": text})
    assert "${" in node.a
    assert written(a=text).a == node.a


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True, database=None)
@given(before=TEXT, middle=TEXT.filter(lambda t: "${" not in t), after=TEXT)
def test_text_of_any_kind_comes_back(before: str, middle: str, after: str) -> None:
    """Also where an interpolation is put together from its parts: `$` from one key and `{` from the next."""
    values = {"middle": middle, "all": f"{before}${{middle}}{after}", "of": {"list": ["${all}"]}, "whole": "${of}"}
    try:
        expected = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except (GrammarParseError, InterpolationKeyError):  # What no user could write.
        return
    text = to_yaml(OmegaConf.create(values))
    assert OmegaConf.to_container(OmegaConf.create(text), resolve=True) == expected
    assert to_yaml(OmegaConf.create(text)) == text


# Reading

Read = Callable[[str | bytes], DictConfig]


@pytest.fixture
def read(keys: Path, tmp_path: Path) -> Read:
    """Reads a text from a file, as somebody else's config."""

    def reading(text: str | bytes) -> DictConfig:
        (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_config(tmp_path / "config.yaml")[0]

    return reading


DEEP = "".join(f"{' ' * level}a:\n" for level in range(MAX_DEPTH))
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_what_is_read(read: Read, tmp_path: Path) -> None:
    assert raw(read("a: 1\nb: [x, {c: null}]\n")) == {"a": 1, "b": ["x", {"c": None}]}
    file = tmp_path / "config.yaml"
    assert [read_config(file)[1], read_config(file, trust=True)[1]] == [False, True]
    file.write_text(sign("a: 1\n"))
    assert read_config(file) == ({"a": 1}, True)
    assert raw(read(f"a: 1\n#{'x' * (MAX_BYTES - 6)}"))
    assert read(DEEP)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"a: 1\n#{'x' * (MAX_BYTES - 5)}", "has 262145 bytes; no config is as long"),
        ("a: " + "x" * 300_000, "has 300003 bytes; no config is as long"),
        (BOMB, r"has an alias \(\*a\); dppo writes none"),
        (f"{DEEP}{' ' * MAX_DEPTH}b: {{c: 1}}", "is nested more than 32 levels deep"),
        ("[" * 100_000, "is nested more than 32 levels deep"),
        (b"a: \xff\xfe", "cannot be read: .*'utf-8' codec can't decode"),
        ("a: \x00", "cannot be read: .*control characters are not allowed"),
        ("a: 1\na: 2\n", "is no YAML: found duplicate key a in line 2"),
        ("a: !!python/object/apply:os.system [true]\n", "is no YAML: could not determine a constructor"),
        (f"a: {'9' * 5000}\n", "cannot be read: .*Exceeds the limit"),
        ("- a\n- b\n", "is not a config: it holds no keys"),
        ("", "is not a config: it holds no keys"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_what_is_not_read(read: Read, text: str | bytes, says: str) -> None:
    with pytest.raises(RunError, match=f"config.yaml {says}") as error:
        read(text)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "nothing"):
        with pytest.raises(RunError, match=f"{name} is not a file"):
            read_config(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "a: ${oc.env:HOME}",
        "a: ${b}\nb: 1",
        r"a: \\${b}",
        'a: "\\u0024{oc.env:HOME}"',
        "${oc.env:HOME}: 1",
        "a: |\n  line\n  ${oc.env:HOME}",
        "a: >-\n  $\\\n  {oc.env:HOME} ${oc.env:HOME}",
    ],
)
def test_an_interpolation_of_somebody_elses_is_refused(read: Read, text: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="was not written by you, and has an interpolation"):
        read(text)
    file = tmp_path / "config.yaml"
    assert read_config(file, trust=True)[1]
    file.write_text(sign(f"{text}\n"))
    assert read_config(file)[1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True, database=None)
@given(before=TEXT, after=TEXT, unicode=st.booleans(), more=st.sampled_from(["", "é", "\x07"]))
def test_no_interpolation_of_somebody_elses_gets_through(
    read: Read, before: str, after: str, unicode: bool, more: str
) -> None:
    OmegaConf.register_new_resolver("x", lambda *_: "ASKED", replace=True)
    try:
        node = read(yaml.safe_dump({"a": f"{more}{before}${{x:}}{after}"}, allow_unicode=unicode))
    except RunError:
        return
    assert "ASKED" not in str(OmegaConf.to_container(node, resolve=True))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True, database=None)
@given(text=TEXT, more=st.sampled_from(["", "é", "\x07"]))
def test_text_that_looks_like_an_interpolation_is_accepted_from_somebody_else(read: Read, text: str, more: str) -> None:
    try:
        value = OmegaConf.create({"a": text + more}).a
    except (GrammarParseError, InterpolationKeyError):
        return
    assert read(to_yaml(OmegaConf.create({"a": text + more}))).a == value
