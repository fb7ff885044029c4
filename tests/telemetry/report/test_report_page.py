"""The page as text: what is in it, what may not be, and how large it is."""

import base64
import gzip
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, figures, sample, summary, write_lines, write_run

from dppo_cli.telemetry.report.page import LIMIT
from dppo_cli.telemetry.report.run_page import run_page
from dppo_cli.training.lock import hold


class Parsed(HTMLParser):
    """Elements with their attributes, text outside scripts and styles, and content of scripts and styles by kind."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, dict[str, str | None], str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem and self.inside:
            tag, attributes, content = self.inside[-1]
            self.inside[-1] = (tag, attributes, content + data)
        else:
            self.text += data

    def block(self, name: str) -> str:
        return next(content for _, attributes, content in self.inside if attributes.get("id") == name)


def data_of(html: str) -> Any:
    return json.loads(Parsed(html).block("data"))


def samples_of(html: str, step: int) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(Parsed(html).block(f"step-{step}"))))


def test_a_page_answers_the_three_questions(tmp_path: Path) -> None:
    text = Parsed(run_page(write_run(tmp_path / "run", 12, done=summary(12)))).text
    assert "Yes: +50.0 points" in text
    assert "30.0% (95% interval 26.0 to 34.0%) before, 80.0% (95% interval 76.0 to 84.0%) after" in text
    assert "95% interval +45.0 to +55.0" in text
    assert "Yes: it masked tokens in 2 of 12 steps" in text and "against delta 0.15" in text
    assert "Nothing was flagged" in text and "finished: 12 of 12 steps" in text and "1 h 1 min" in text


def test_every_figure_has_a_place_and_the_numbers_of_the_run(tmp_path: Path) -> None:
    html = run_page(write_run(tmp_path / "run", 12, done=summary(12)))
    figures = data_of(html)["figures"]
    places = [a["data-figure"] for _, a in Parsed(html).elements if "data-figure" in a]
    assert sorted(places) == sorted(figures)
    assert set(figures) == {
        "accuracy",
        "reward",
        "entropy",
        "lengths",
        "divergence",
        "masked",
        "shift",
        "ratio",
        "gradient",
        "lr",
        "samples",
        "speed",
        "seconds",
        "memory",
    }
    reward = figures["reward"]["data"][0]
    assert reward["x"] == list(range(1, 13)) and reward["y"][-1] == pytest.approx(0.8)
    held_out = next(t for t in figures["accuracy"]["data"] if t.get("name") == "held-out problems")
    assert (held_out["x"], held_out["y"]) == ([0, 12], [0.3, 0.8])
    assert held_out["error_y"]["array"] == pytest.approx([0.04, 0.04])
    positive, negative = figures["masked"]["data"]
    assert (positive["name"], positive["line"]["color"]) == ("A &gt; 0", "var(--positive)")
    assert negative["y"][4] == 0.02
    limits = [s["y0"] for s in figures["divergence"]["layout"]["shapes"] if s.get("label")]
    assert limits == [0.15]


def test_nothing_can_be_loaded_from_or_sent_to_another_place(tmp_path: Path) -> None:
    """Every script and style is in the policy by its hash; no element names an address."""
    page = Parsed(run_page(write_run(tmp_path / "run", done=summary(12), samples={1: [sample(["a"])]})))
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a) or ""
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'none'" and rules["img-src"] == "data: blob:"
    assert "unsafe" not in rules["script-src"] + rules["style-src-elem"]
    for tag, attributes, content in page.inside:
        if attributes.get("type") is None:
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in rules["script-src" if tag == "script" else "style-src-elem"]
    kinds = [a.get("type") for tag, a, _ in page.inside if tag == "script"]
    assert kinds == ["application/json", "application/gzip", None, None, None]
    for tag, attributes in page.elements:
        assert not [k for k in attributes if k.startswith("on")], tag
        for name in ("src", "href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, name)


def test_hostile_text_is_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>\u202e"
    done = summary(12, warnings=[f"step 3: {evil}"])
    run = write_run(tmp_path / "run", done=done, samples={1: [sample(HOSTILE, prompt=evil, note=evil)]})
    rows = [{"token": 1, "text": evil, "advantage": "+", "masked": 1, "seen": 2, "mean_mu": 0.1, "mean_pi": 0.2}]
    (run / "masked_tokens.json").write_text(json.dumps(rows), encoding="utf-8")
    html = run_page(run)
    page = Parsed(html)
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 5
    assert not [tag for tag, a in page.elements if tag == "img" or "onerror" in a]
    assert "Step 3: </script><script>alert(1)</script>\\u202e" in page.text and "\u202e" not in html
    found = samples_of(html, 1)["samples"][0]
    assert found["tokens"] == list(HOSTILE) and found["note"] == evil


def test_a_page_is_never_larger_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that have no room are left out, those of the last and of the first step last of all."""
    monkeypatch.setattr("dppo_cli.telemetry.report.run_page.LIMIT", 5_100_000)
    chance = random.Random(0)
    rows = [sample([f"{chance.random()}" for _ in range(400)], sample=i) for i in range(8)]
    run = write_run(tmp_path / "run", 9, samples=dict.fromkeys(range(1, 10), rows))
    html = run_page(run)
    assert 4_900_000 < len(html.encode()) <= 5_100_000 < LIMIT
    kept = data_of(html)["samples"]["steps"]
    assert kept[-1] == [9, 8, 8] and all(n <= total == 8 for _, n, total in kept)
    assert "Left out, to keep this file small: " in Parsed(html).text


def test_a_run_without_samples_says_so(tmp_path: Path) -> None:
    html = run_page(write_run(tmp_path / "run"))
    assert "This run kept no samples: there is no folder samples in it." in Parsed(html).text
    assert data_of(html)["samples"]["steps"] == []


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    """The last line is half written, and nothing is known of the end; the checkpoint knows the beginning."""
    run = write_run(tmp_path / "run", 8, overrides=["eval.every=4"])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "rew')
    (run / "checkpoints/step-8").mkdir(parents=True)
    state = {"before": {"held_out": {"accuracy": 0.3, "interval": [0.2, 0.4], "problems": 10}}, "seconds": 61}
    state["warnings"] = ["step 2: odd"]
    (run / "checkpoints/step-8/state.json").write_text(json.dumps(state))
    (run / "checkpoints/step-8/manifest.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}}))
    page = Parsed(run_page(run))
    assert (
        "not finished, and not running: 8 of 8 steps" in page.text
        and "1 min 1 s" in page.text
        and "2.13.0" in page.text
    )
    assert "Not known before the run ends" in page.text and "30.0% (95% interval 20.0 to 40.0%) before" in page.text
    assert "Step 2: odd" in page.text and "the last line is not complete" in page.text
    assert "3 things were flagged" in page.text and f"dppo train resume={run} goes on" in page.text


def test_warnings_and_the_first_evaluation_of_a_run_are_shown_before_its_first_checkpoint(tmp_path: Path) -> None:
    """It is going on: a warning is being written at this moment, and one was cut when the disk was full."""
    run = write_run(tmp_path / "run", 3)
    odd = {"warning": "step 2: odd <b>"}
    (run / "warnings.jsonl").write_text(f'{json.dumps(odd)}\n{{"warn{json.dumps(odd)}\n{{"warning": "step 3: ha')
    (run / "eval_before.json").write_text(json.dumps({"held_out": figures(0.3, 0.26, 0.34)}))
    with hold(run):
        html = run_page(run)
        page = Parsed(html)
    assert "running: 3 of 3 steps so far" in page.text
    assert "Step 2: odd <b>" in page.text and "warnings.jsonl is damaged: line 2 is not a JSON object" in page.text
    assert "2 things were flagged" in page.text, "the one that is half written is read the next time"
    assert "30.0% (95% interval 26.0 to 34.0%) before" in page.text
    shapes = data_of(html)["figures"]["reward"]["layout"]["shapes"]
    assert [shape["x0"] for shape in shapes] == [2], "a dotted line at its step"


def test_the_memory_of_each_step(tmp_path: Path) -> None:
    """Of a GPU, too, where there is one. One that lies on another is dotted."""
    run = write_run(tmp_path / "run", 3)
    rows = [
        {"step": i, "memory": {"process_gib": 0.1 * i, "process_peak_gib": 2.0, "device_peak_gib": i}} for i in (1, 2)
    ]
    write_lines(run / "metrics.jsonl", [*rows, {"step": 3, "memory": {"process_peak_gib": 3.0}}])
    traces = data_of(run_page(run))["figures"]["memory"]["data"]
    assert {trace["name"]: trace["y"] for trace in traces} == {
        "GPU, peak of the step": [1.0, 2.0, None],
        "process, after the step": [0.1, 0.2, None],
        "process, peak so far": [2.0, 2.0, 3.0],
    }
    assert [trace["line"]["dash"] for trace in traces] == ["solid", "solid", "dot"]
    assert len({trace["line"]["color"] for trace in traces}) == 3


def test_the_reference_is_drawn_only_where_there_is_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2)
    assert "reference" not in data_of(run_page(run))["figures"]
    write_lines(run / "metrics.jsonl", [{"step": i, "reference_kl": 0.1 * (i - 1)} for i in (1, 2)])
    assert data_of(run_page(run))["figures"]["reference"]["data"][0]["y"] == [0.0, 0.1]


def test_the_system_is_what_auto_came_to(tmp_path: Path) -> None:
    system = {"device": "cuda:0, NVIDIA H100", "dtype": "bfloat16"}
    done = run_page(write_run(tmp_path / "done", done=summary(12, system=system)))
    asked = "<dt>hardware.device</dt><dd>auto</dd>"
    assert "<dt>device</dt><dd>cuda:0, NVIDIA H100</dd>" in done and asked not in done
    assert asked in run_page(write_run(tmp_path / "run"))


def test_a_run_of_an_older_version(tmp_path: Path) -> None:
    """Fewer metrics, a summary without intervals, keys that have gone."""
    run = write_run(tmp_path / "run", 3)
    write_lines(run / "metrics.jsonl", [{"step": i, "reward": 0.1 * i, "time": {"rollout": 1.0}} for i in (1, 2, 3)])
    old = {"eval_before": 0.2, "eval_before_error": 0.02, "eval_after": 0.5, "eval_after_error": 0.03, "steps": 3}
    (run / "summary.json").write_text(json.dumps(old))
    (run / "config.yaml").write_text("steps: 3\ncheckpoint_every: 5\n")
    html = run_page(run)
    page = Parsed(html)
    assert set(data_of(html)["figures"]) == {"accuracy", "reward", "seconds"}
    assert "+30.0 points, without interval" in page.text and "20.0% (95% interval 16.1 to 23.9%) before" in page.text
    assert "checkpoint_every" in page.text and "masked_tokens.json is written when a run ends" in page.text


def test_the_config_shows_what_differs_from_the_defaults(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 12, overrides=["divergence=kl", "optim.lr=0.001"])
    rows = re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td></tr>", run_page(run))
    changed = {key: (own, default) for key, own, default in rows}
    assert changed["steps"] == ("12", "60") and changed["optim.lr"] == ("0.001", "0.0003")
    assert changed["divergence._target_"] == ("KL", "TotalVariation")
    assert "seed" not in changed and "run_dir" not in changed


def test_long_curves_are_thinned_without_losing_a_spike(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    rows = [{"step": i, "reward": 0.5, "gradient_norm": 9.0 if i == 7777 else 1.0} for i in range(1, 20_001)]
    write_lines(run / "metrics.jsonl", rows)
    html = run_page(run)
    norm = data_of(html)["figures"]["gradient"]["data"][0]
    assert len(norm["x"]) <= 2002 and norm["x"][norm["y"].index(9.0)] == 7777
    assert (norm["x"][0], norm["x"][-1]) == (1, 20_000)


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2)
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": NaN, "entropy": 1e999}\n{"step": 2, "reward": 0.5}\n')
    figures = data_of(run_page(run))["figures"]
    assert figures["reward"]["data"][0]["y"] == [None, 0.5] and "entropy" not in figures


def test_figures_of_nonsense_are_left_out(tmp_path: Path) -> None:
    """As a run of another program, or an edited one, may have them."""
    run = write_run(tmp_path / "run", 2)
    odd = {"before": {"accuracy": "high", "interval": [None, 1]}, "after": {"accuracy": 0.5, "interval": [0.4]}}
    (run / "summary.json").write_text(json.dumps({"evaluations": {"held_out": odd}, "warnings": {"a": 1}}))
    line = {"step": 1, "reward": [1], "accuracy": 7.0, "sampled_groups": -3, "divergence_p50": 1e308, "time": []}
    write_lines(run / "metrics.jsonl", [line, {"reward": 1.0}])
    html = run_page(run)
    assert set(data_of(html)["figures"]) == {"accuracy", "divergence"}
    text = Parsed(html).text
    assert "50.0% after" in text and "metrics.jsonl has lines of no step, which were left out: 1" in text


def test_the_method_names_what_stands_beside_the_paper(tmp_path: Path) -> None:
    assert "DPPO, TotalVariation, Binary on embedded:arithmetic_1m" in run_page(write_run(tmp_path / "plain", 2))
    words = ("filter=k3", "verdict=upper", "approx=topk")
    html = run_page(write_run(tmp_path / "upper", 2, overrides=words))
    assert "DPPO, TotalVariation, TopK, Band, verdict=upper on" in html
    assert "Quantiles over tokens of the upper bound of the divergence of pi from mu, and the threshold delta" in html
    html = run_page(write_run(tmp_path / "mean", 2, overrides=("region=sequence_mean",)))
    assert "DPPO, TotalVariation, Binary, SequenceMean on" in html
    assert "Quantiles over tokens of the divergence of pi from mu." in html and "delta = 0.15" not in html
