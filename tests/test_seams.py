"""A second engine, forward, collector and listener, each written as a user would: what the seams are worth."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import make
import pytest
import torch
from helpers import read_lines, train

from dppo_cli.commands.assembly import make_learner
from dppo_cli.commands.train import train as loop
from dppo_cli.policy.forward import hidden_states, split_by_tokens
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.collect import Collected, InStepCollector, Take
from dppo_cli.rollout.engine import in_order
from dppo_cli.telemetry.listeners import Listeners
from dppo_cli.training.order import Shuffled
from dppo_cli.training.run_folder import RunFolder
from dppo_cli.training.samples import StepSamples
from dppo_cli.training.state import RunState
from dppo_cli.training.stopping import Stopping
from dppo_cli.types import Batch, EvalReport, RunInfo, Score, StepReport

# An engine: transformers' own generate(), a prompt at a time.

ENGINE = '''
from dataclasses import dataclass

import torch

from dppo_cli.types import Completion, PolicyReport, Status


@dataclass(frozen=True)
class Transformers:
    """rollout=transformers"""

    def check(self, num_logprobs, adapter):
        assert num_logprobs == 0, "reports the sampled token only"

    def load(self, policy, warn):
        return Engine(policy)


class Engine:
    samples_with = "transformers' generate"

    def __init__(self, policy):
        self.policy = policy

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def sync(self, version):
        self.version = version

    def generate(self, prompts, samples_per_prompt, sampling, num_logprobs, seed):
        torch.manual_seed(seed)
        for number, prompt in enumerate(prompts):
            yield number, [self.one(prompt, sampling) for _ in range(samples_per_prompt)]

    def one(self, prompt, sampling):
        options = dict(do_sample=True, temperature=sampling.temperature, top_k=0, pad_token_id=self.policy.pad_id)
        options |= dict(output_logits=True, return_dict_in_generate=True, max_new_tokens=sampling.max_new_tokens)
        out = self.policy.model.generate(input_ids=torch.tensor([prompt.token_ids]), **options)
        ids = out.sequences[0, len(prompt.token_ids) :]
        log_mu = (torch.cat(out.logits) / sampling.temperature).log_softmax(-1)
        mu = PolicyReport(log_mu.gather(-1, ids[:, None])[:, 0])
        status = Status.FINISHED if int(ids[-1]) in self.policy.eos_ids else Status.CUT
        text = self.policy.decode(ids.tolist())
        return Completion(ids, torch.ones_like(ids, dtype=torch.bool), mu, text, status, (self.version,))
'''


def test_a_second_engine(model: Path, work: Path) -> None:
    (work / "my_engine.py").write_text(ENGINE)
    (work / "my_conf/rollout").mkdir(parents=True)
    (work / "my_conf/rollout/transformers.yaml").write_text("_target_: my_engine.Transformers\n")
    words = ["--config-dir", "my_conf", "rollout=transformers", "sampling.temperature=0.7", "optim.lr=0.01"]
    assert train(model, *words, "run_dir=run") == 0
    rows = read_lines(work / "run/metrics.jsonl")
    assert [row["mismatch_mean"] < 1e-5 and row["gradient_norm"] > 0 for row in rows] == [True, True]


# A forward: every sequence by itself.


class OneByOne:
    """No padding and no sharing."""

    def __init__(self, policy: Policy, prompts: Mapping[int, Sequence[int]], budget: int) -> None:
        self.policy, self.prompts = policy, prompts
        self.num_positions = self.num_tokens = 0

    @staticmethod
    def split(samples: Sequence[tuple[int, int, int]], budget: int) -> list[list[int]]:
        return split_by_tokens([prompt + own for _, prompt, own in samples], [0] * len(samples), budget)

    def predicting_states(self, batch: Batch) -> torch.Tensor:
        found = []
        for b, length in enumerate(batch.length_B.tolist()):
            prompt = self.prompts[batch.number_P[batch.prompt_B[b]]]
            ids = torch.tensor([[*prompt, *batch.response_ids_BR[b, :length].tolist()]])
            positions = batch.position_N[batch.row_N == b] + len(prompt) - 1
            found.append(hidden_states(self.policy, ids)[0, positions])
            self.num_positions += ids.numel()
            self.num_tokens += ids.numel()
        return torch.cat(found)

    def backward(self) -> None: ...


def test_a_second_forward(train_config) -> None:
    """It trains to the same weights."""
    config = train_config("optim.lr=0.01", "kl_to_reference=0.1", "hardware.tokens_per_micro_batch=40")
    trained = []
    for forward in (None, OneByOne):
        policy = make.policy(config, adapter_scale=0.1)
        prompts = make.prompts(policy)
        with config.rollout.load(policy, make.fail) as engine:
            engine.sync(0)
            sampled = in_order(engine.generate(prompts, 2, config.sampling, 0, seed=1))
            groups = make.groups(prompts, sampled, [1.0, -1.0] * 4)
        learner = make_learner(policy, config)
        learner.forward = forward or learner.forward
        result = learner.update(groups)
        trained.append([p.detach().clone() for p in policy.parameters])
    assert result.num_padding == 0
    start = make.policy(config, adapter_scale=0.1).parameters
    for shared, alone, before in zip(*trained, start, strict=True):
        assert (shared - before).abs().max() > 1e-3
        torch.testing.assert_close(shared, alone, rtol=0, atol=2e-5)


# A collector: one step behind, losing and adding completions.


class StaleAndUneven:
    """Trains on the groups of the step before. The second prompt has lost a sample, one of the first was not judged."""

    def __init__(self, inner: InStepCollector) -> None:
        self.inner = inner
        self.waiting: Collected | None = None

    def collect(self, take: Take, step: int) -> Collected:
        new = self.inner.collect(take, step)
        ready, self.waiting = self.waiting or new, new
        groups = [
            replace(g, completions=g.completions[i:], scores=g.scores[i:], advantages=g.advantages[i:])
            for i, g in enumerate(ready.groups)
        ]
        groups[0] = replace(groups[0], scores=[Score(None, note="late"), *groups[0].scores[1:]])
        return Collected(groups, ready.seconds)


class Recorder:
    """A listener: what it heard, as JSON lines in memory."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def started(self, run: RunInfo) -> None:
        self.heard.append(json.dumps({"started": run.model}))

    def evaluated(self, report: EvalReport) -> None:
        self.heard.append(json.dumps({"evaluated": report.step}))

    def stepped(self, report: StepReport) -> None:
        versions = sorted({v for g in report.groups for c in g.completions for v in c.versions})
        sizes = [len(g.completions) for g in report.groups]
        self.heard.append(json.dumps({"step": report.metrics["step"], "versions": versions, "sizes": sizes}))

    def warned(self, text: str) -> None:
        self.heard.append(json.dumps({"warned": text}))

    def finished(self, summary: Mapping[str, object] | None) -> None:
        self.heard.append(json.dumps({"finished": summary is not None}))


def test_a_second_collector_and_a_second_listener(
    train_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["steps=3", "batch.samples_per_prompt=3", "optim.lr=0.01", "reward=exact", "checkpoint.every=2"]
    config = train_config(*words)
    policy = make.policy(config)
    prompts = make.prompts(policy)
    recorder = Recorder()

    def scorer(prompts, completions):
        return [[Score(float(len(c.text) + i)) for i, c in enumerate(row)] for row in completions]

    saved: list[int] = []
    folder, stopping = RunFolder(tmp_path / "run", "", policy.adapter_bytes), Stopping(60.0, make.fail)
    with folder, config.rollout.load(policy, make.fail) as engine, stopping:
        engine.sync(0)
        inner = InStepCollector(
            engine, scorer, config.advantage, config.batch, config.sampling, 0, 1, mask_truncated=False
        )
        state = RunState(make_learner(policy, config), Shuffled(prompts, 1), {})
        collector, listeners = StaleAndUneven(inner), Listeners([recorder])

        def save() -> None:
            saved.append(state.step)

        samples = StepSamples(config.samples, config.steps, str, make.fail)
        loop(state, config, collector, engine, make.fail, save, lambda: 0.0, folder, samples, listeners, stopping)
    assert state.step == 3 and saved == [2]
    assert [json.loads(line) for line in recorder.heard] == [
        {"step": 1, "versions": [0], "sizes": [3, 2]},
        {"step": 2, "versions": [0], "sizes": [3, 2]},
        {"step": 3, "versions": [1], "sizes": [3, 2]},
    ]
    rows = read_lines(tmp_path / "run/metrics.jsonl")
    assert [row["unjudged"] for row in rows] == [pytest.approx(0.2)] * 3
    assert rows[0]["mismatch_mean"] < 1e-5 < 1e-4 < rows[2]["mismatch_mean"], "a step behind is another policy"
