"""The page of one run."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dppo_cli.config.saved import PLAIN
from dppo_cli.telemetry.report.curves import Event
from dppo_cli.telemetry.report.data import RunData, differences, flat, read_run, section
from dppo_cli.telemetry.report.figures import run_figures
from dppo_cli.telemetry.report.packing import Packed, pack
from dppo_cli.telemetry.report.page import LIMIT, Page, Served, figures_html, pairs_html, render, table_html, text
from dppo_cli.telemetry.report.verdict import events_of, state_of, verdicts
from dppo_cli.training.run_folder import samples_path

RESERVE = 100_000
"""Bytes kept free for the marks around the samples."""
PARTS = ("objective", "divergence", "approx", "region", "filter")
"""Of the method, as its line names them."""


def run_page(path: Path, served: Served | None = None) -> str:
    """HTML of at most LIMIT bytes. Raises RunError if there is no run to be read."""
    run = read_run(path)
    events = events_of(run)
    groups = run_figures(run, events)
    page = Page(
        title=path.resolve().name,
        facts=[_method(run.config), *_facts(run)],
        data={"figures": {f.id: f.plot for figures in groups.values() for f in figures}},
    )
    for name, figures in groups.items():
        page.sections.append((name, name.lower().replace(" ", "-"), figures_html(figures)))
    if events:
        page.sections.insert(min(1, len(page.sections)), ("Events", "events", _events(events)))
    page.sections += [("Tokens the trust region touched", "tokens", _masked(run.run.masked_tokens))]
    page.sections += [("Config", "config", _config(run.config)), ("System", "system", pairs_html(_system(run)))]
    # The verdicts come last, because reading the samples may find problems, too.
    room = LIMIT - RESERVE - len(render(page, served).encode())

    def file_of(step: int) -> tuple[str, int, int]:
        file = samples_path(path, step)
        stat = file.stat() if file.exists() else None
        return (str(file), stat.st_mtime_ns, stat.st_size) if stat else (str(file), 0, 0)

    packed = pack(run.run.sample_steps, run.run.samples, room, served.packed if served else None, file_of)
    run.problems.extend(packed.problems)
    page.blocks = packed.blocks
    page.data["samples"] = {
        "steps": [[step, packed.kept[step], packed.total[step]] for step in packed.blocks],
        "delta": {"low": run.delta("low"), "high": run.delta("high")},
    }
    after_curves = next(i for i, (_, name, _) in enumerate(page.sections) if name == "tokens")
    page.sections.insert(after_curves, ("Samples", "samples", _samples(run, packed)))
    page.verdicts = verdicts(run, events)
    return render(page, served)


def _method(config: Mapping[str, Any]) -> str:
    """Example: TotalVariation, Binary, DPPO on embedded:arithmetic_1m."""
    parts = [str(section(config, name).get("_target_", "")) for name in PARTS]
    names = [part.rpartition(".")[2] for part in parts if part not in PLAIN]
    names += ["verdict=upper"] if config.get("verdict") == "upper" else []
    return " ".join(
        filter(None, [", ".join(filter(None, names)), f"on {section(config, 'model').get('path', 'a model')}"])
    )


def _facts(run: RunData) -> list[str]:
    facts = [state_of(run)]
    if run.seconds is not None:
        facts.append(duration(run.seconds))
    file = run.path / "metrics.jsonl"
    if file.is_file():
        facts.append(f"last step {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(file.stat().st_mtime))}")
    return [*facts, f"seed {run.config['seed']}"] if "seed" in run.config else facts


def duration(seconds: float) -> str:
    """Example: 1 h 12 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _events(events: Sequence[Event]) -> str:
    rows = [("–" if event.step is None else event.step, event.kind, event.text) for event in events]
    return table_html(("step", "kind", "what"), rows, "Dotted lines in the curves, in words", numeric=(0,))


def _masked(rows: list[dict[str, Any]] | None) -> str:
    if rows is None:
        return "<p>masked_tokens.json is written when a run ends.</p>"
    if not rows:
        return "<p>The trust region masked no token in this run.</p>"

    def cells(row: Mapping[str, Any]) -> tuple[Any, ...]:
        masked, seen = row.get("masked"), row.get("seen")
        share = f"{masked / seen:.1%}" if isinstance(masked, int) and isinstance(seen, int) and seen else "–"
        means = [f"{row[k]:.3f}" if isinstance(row.get(k), float | int) else "–" for k in ("mean_mu", "mean_pi")]
        return repr(row.get("text")), row.get("advantage"), masked, seen, share, *means

    head = ("token", "sign of A", "masked", "seen", "share", "mean mu", "mean pi")
    caption = "Masked most often, over the whole run; means are over the masked ones"
    return table_html(head, [cells(row) for row in rows if isinstance(row, dict)], caption, numeric=(2, 3, 4, 5, 6))


def _config(config: Mapping[str, Any]) -> str:
    changed = [(key, _value(own), _value(default)) for key, own, default in differences(config)]
    body = table_html(("key", "this run", "default"), changed, "What differs from the defaults of dppo train")
    if not changed:
        body = "<p>Every key has the default of <code>dppo train</code>.</p>"
    rows = [(key, _value(value)) for key, value in flat(config).items()]
    everything = table_html(("key", "value"), rows, "config.yaml")
    return f"{body}<details><summary>All {len(rows)} keys</summary>{everything}</details>"


def _value(value: Any) -> str:
    if isinstance(value, str) and value.startswith("dppo_cli."):
        return value.rpartition(".")[2]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _system(run: RunData) -> dict[str, Any]:
    summary = run.summary or {}
    found = {k: v for k, v in section(summary, "system").items() if not isinstance(v, dict | list)}
    # What auto came to is known at the end.
    asked = {f"hardware.{k}": section(run.config, "hardware").get(k) for k in ("device", "dtype") if k not in found}
    facts: dict[str, Any] = {"run folder": run.path.resolve(), **asked, **found}
    if isinstance(n := summary.get("trained_parameters"), int):
        facts["trained parameters"] = f"{n:,}"
    if isinstance(gib := summary.get("peak_memory_gib"), float):
        facts["peak memory"] = f"{gib:.2f} GiB"
    if run.seconds is not None:
        facts["time"] = duration(run.seconds)
    return facts | run.versions | {"SHA-256 of the adapter": summary.get("adapter_sha256", "not written yet")}


def _samples(run: RunData, packed: Packed) -> str:
    if not packed.blocks:
        return (
            "<p>This run kept no samples that can be shown.</p>"
            if run.run.sample_steps
            else "<p>This run kept no samples: there is no folder <code>samples</code> in it.</p>"
        )
    note = f'<p class="note">{text(packed.note)}</p>' if packed.note else ""
    return f'{note}<div id="browser"></div>'
