"""Values, and combinations of them, that cannot work: one line that names the key."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import read_json, train

pytestmark = pytest.mark.usefixtures("work")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["steps=many"], ["steps", "'many'"]),
        (["steps=1.5"], ["steps", "1.5"]),
        (["divergence.delta_high=wide"], ["divergence.delta_high", "'wide'"]),
        (["optim.betas=0.9"], ["optim.betas"]),
        (["model=hf"], ["model.path is not set; add model.path=..."]),
        (["data=file"], ["data.path is not set; add data.path=..."]),
        (["reward=function"], ["reward.path is not set; add reward.path=..."]),
        (["divergence.delta_low=-0.1"], ["divergence.delta_low=-0.1", "[0, 1]", "tv"]),
        (["divergence=kl", "divergence.delta_high=-0.1"], ["divergence.delta_high=-0.1", "kl"]),
        (["divergence.delta_high=1.5"], ["divergence.delta_high=1.5", "[0, 1]"]),
        (["divergence.delta_high=nan"], ["divergence.delta_high=nan"]),
        (["batch.samples_per_prompt=1"], ["batch.samples_per_prompt=1", "at least 2"]),
        (["batch.samples_per_prompt=0"], ["batch.samples_per_prompt=0", "samples_per_prompt >= 1"]),
        (
            ["batch.prompts_per_step=32", "batch.prompts_per_update=5"],
            ["batch.prompts_per_update=5", "batch.prompts_per_step=32"],
        ),
        (["sampling.top_p=0.9"], ["sampling.top_p", "top_p=1"]),
        (["sampling.top_k=50"], ["top_k", "top_k=0"]),
        (["sampling.min_p=0.1"], ["min_p", "min_p=0"]),
        (["sampling.temperature=0"], ["sampling.temperature=0", "greedy"]),
        (["sampling.temperature=-1"], ["sampling.temperature=-1", "temperature >= 0"]),
        (["approx=topk", "approx.k=5000"], ["approx.k=5000", "rollout.max_logprobs=1024"]),
        (["approx=topk", "approx.k=0"], ["approx.k=0", "at least 1"]),
        (["adapter=qlora", "rollout.merge=true"], ["rollout.merge=true", "nf4", "rollout.merge=false"]),
        (["adapter.quantization=int3"], ["adapter.quantization=int3", "nf4, null"]),
        (["rollout.merge=false", "rollout.dtype=bfloat16"], ["rollout.dtype=bfloat16", "rollout.merge=true"]),
        (["objective.ratio_cap=0.5"], ["objective.ratio_cap=0.5", "at least 1"]),
        (["objective=ppo", "objective.eps_low=0"], ["objective.eps_low=0", "positive"]),
        (["optim.lr=-1"], ["optim.lr=-1", "lr > 0"]),
        (["optim.lr=inf"], ["optim.lr=inf", "lr < inf"]),
        (["optim.schedule=linear"], ["optim.schedule=linear", "constant, cosine"]),
        (["steps=0"], ["steps=0", "dppo eval"]),
        (["anchor=pi_old"], ["anchor=pi_old", "recompute, rollout"]),
        (["kl_to_reference=-1"], ["kl_to_reference=-1"]),
        (["prompt.system=Hi"], ["prompt.system", "template=chat"]),
        (["data.eval_problems=3000"], ["data.eval_problems", "3000", "2000"]),
        (["divergence._target_=dppo_cli.algorithm.divergence.TV"], ["cannot be imported", "TV"]),
        (["divergence._target_=json.JSONDecoder"], ["json.JSONDecoder is not a dataclass"]),
        (["divergence._target_=dppo_cli.reward.exact.Exact"], ["Exact cannot be used as Divergence", "delta_low"]),
        (["divergence._target_=.mine.Mine"], ["divergence._target_=.mine.Mine cannot be imported"]),
        (["adapter.target_modules={a: 1}"], ["adapter.target_modules"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] and len(value) < 3 else None,
)
def test_values_that_cannot_work(overrides: list[str], parts: list[str], refused: Callable[..., str]) -> None:
    line = refused("train", *overrides)
    for part in parts:
        assert part in line


def test_a_kl_threshold_on_the_scale_of_tv_is_warned_of_but_runs(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, "divergence=kl", "divergence.delta_high=0.2", "steps=1", "run_dir=run") == 0
    said = capsys.readouterr().out
    assert "warning: divergence.delta_high=0.2 lies outside 0.05 to 0.15" in said
    (warning,) = read_json(work / "run/summary.json")["warnings"][:1]
    assert warning.startswith("divergence.delta_high=0.2 lies outside 0.05 to 0.15")
