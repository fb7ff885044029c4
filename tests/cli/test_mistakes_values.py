"""Values, and combinations of them, that cannot work: one line that names the key."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from disturbed import fail_at
from helpers import read_json, train

from dppo_cli.rollout.collect import InStepCollector

pytestmark = pytest.mark.usefixtures("work")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["steps=many"], ["steps", "'many'"]),
        (["steps=1.5"], ["steps", "1.5"]),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=x"], ["hydra.launcher.n_jobs=x: ", "converted to Integer"]),
        (["hydra.sweeper.max_batch_size=x"], ["hydra.sweeper.max_batch_size=x: ", "converted to Integer"]),
        (["hydra/launcher=joblib", "hydra.launcher.n_job=2"], ["did you mean hydra.launcher.n_jobs?", "pre_dispatch"]),
        (
            ["hydra.sweeper.x=2"],
            ["there is no key hydra.sweeper.x", "Choices in hydra.sweeper: max_batch_size, params"],
        ),
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
        (["run_dir=" + 5000 * "9"], ["run_dir has a number with more than 4,300 digits"]),
        (["steps=" + 5000 * "9"], ["steps has a number with more than 4,300 digits"]),
        (["approx=topk", "approx.k=5000"], ["approx.k=5000", "rollout.max_logprobs=1024"]),
        (["approx=topk", "approx.k=0"], ["approx.k=0", "at least 1"]),
        (["region=prefix_budget", "region.w_min=2"], ["region.w_min=2.0 is outside (0, 1]"]),
        (["filter=icepop", "filter.low=9"], ["filter.low=9 is above filter.high=5: nothing would be kept"]),
        (
            ["filter=all_of", "filter.members.x=icepop", "filter.members.x.low=9"],
            ["filter.members.x.low=9 is above filter.members.x.high=5"],
        ),
        (["filter=all_of"], ["filter=all_of has no members: add filter.members.NAME=CHOICE"]),
        (["adapter=qlora", "rollout.weights=adapter"], ["rollout.weights=adapter", "dequantized", "quantized"]),
        (
            ["rollout.weights=dequantized"],
            ["rollout.weights=dequantized needs a quantised base", "rollout.weights=auto"],
        ),
        (["adapter.quantization=int3"], ["adapter.quantization=int3", "nf4, null"]),
        (
            ["adapter=qlora", "rollout.weights=quantized", "rollout.dtype=bfloat16"],
            ["rollout.dtype=bfloat16", "rollout.weights=dequantized"],
        ),
        (["rollout.weights=quantized", "rollout.dtype=bfloat16"], ["rollout.dtype=bfloat16", "use null"]),
        (["recipe=long_tail", "+recipes/long_tail/point=lr1e-3"], ["did you mean 'lr1e-3_2'?", "four_bit, lr1e-3_16"]),
        (["recipe=long_tail", "+recipes/method=dppo"], ["there is no recipes/method=dppo", "cispo, clip_higher"]),
        (["objective.ratio_cap=0.5"], ["objective.ratio_cap=0.5", "at least 1"]),
        (["objective=ppo", "objective.eps_low=0"], ["objective.eps_low=0", "positive"]),
        (["optim.lr=-1"], ["optim.lr=-1", "lr > 0"]),
        (["optim.lr=inf"], ["optim.lr=inf must be a finite number"]),
        (["sampling.temperature=1e400"], ["sampling.temperature=inf must be a finite number"]),
        (["optim.betas=[0.9,-inf]"], ["optim.betas=-inf must be a finite number"]),
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
        (["adapter.target_modules=[1,2]"], ["adapter.target_modules=[1, 2]", "a list of names", "[q_proj,v_proj]"]),
        (["adapter.target_modules=[]"], ["adapter.target_modules=[]", "a list of names"]),
        (["seed=99999999999999999999999999"], ["seed=99999999999999999999999999 is larger than 2^63"]),
        (["objective.ratio_cap=1e300"], ["objective.ratio_cap=1e+300 is larger than 3.4e+38"]),
        (["optim.betas=[0.9,1e300]"], ["optim.betas=1e+300 is larger than 3.4e+38"]),
        (["hardware.gradient_checkpointing=7"], ["hardware.gradient_checkpointing=7 must be true or false"]),
        (["seed=true"], ["seed", "True", "Integer"]),
        (["optim.lr=true"], ["optim.lr", "rue"]),
        (["run_dir=true"], ["run_dir=true cannot be true or false"]),
        (
            ["batch.prompts_per_step=1000000000", "batch.prompts_per_update=1000000000"],
            ["batch.prompts_per_step=1000000000 makes 8,000,000,000 samples at once", "this machine has"],
        ),
        (["data=${.}"], ["Hydra cannot make a config of these words: data=${.}"]),
        (["+rollout=[[1]]"], ["Hydra cannot make a config of these words: +rollout=[[1]]"]),
        (["rollout=[[1]]"], ["rollout=[[1]] is an invalid value: rollout takes one choice"]),
        (["run_dir=" + "x" * 256], ["x" * 256 + ": File name too long"]),
        (["run_dir=" + "a/" * 300], ["is more than 200 folders deep; name another folder"]),
        (["optim.eps=1e-320"], ["optim.eps=1e-320 is smaller than 1.2e-38, the smallest float32"]),
        (["divergence._target_=.."], ["divergence._target_=.. cannot be imported"]),
        (["run_dir='${oc.env:HF_TOKEN}'"], ["${oc.env:HF_TOKEN} would put a secret into files"]),
        (["run_dir='${oc.env:NO_SUCH_VARIABLE}'"], ["Environment variable 'NO_SUCH_VARIABLE' not found"]),
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


def test_memory_that_does_not_suffice_is_a_line(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model is loading; in a sampled step, where what was saved is told, too."""
    assert train(model, "adapter.r=100000000000") == 2
    error = capsys.readouterr().err
    assert error.startswith("dppo: out of memory (tried to allocate ") and error.count("\n") == 1
    assert "lower rollout.concurrent_sequences, hardware.tokens_per_micro_batch" in error
    fail_at(2, InStepCollector, "collect", monkeypatch, MemoryError())
    assert train(model, "run_dir=run") == 2
    error = capsys.readouterr().err
    assert error.startswith("dppo: out of memory; lower ") and error.count("\n") == 1
    assert error.endswith("; the state after step 1 is saved; to go on: dppo train resume=run\n")


def test_more_evaluation_samples_than_memory_holds(model: Path, refused: Callable[..., str]) -> None:
    words = [f"model.path={model}", "data=arithmetic", "data.eval_problems=4", "sampling.max_new_tokens=8"]
    line = refused("eval", *words, "samples_per_prompt=1000000000")
    assert line.startswith("samples_per_prompt=1000000000 makes 4,000,000,000 samples at once, 7,629 GiB or more")


def test_an_output_that_shows_no_boxes(
    model: Path, work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHONIOENCODING=ascii, as in some containers."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert train(model, "steps=1", "run_dir='ü'") == 0
    sys.stdout.flush()
    said = sys.stdout.buffer.getvalue().decode("ascii")
    assert "run folder: ?" in said and "held-out samples right" in said
    assert (work / "ü/summary.json").is_file()


def test_a_value_as_long_as_a_file_is_cut(refused: Callable[..., str]) -> None:
    error = refused("train", f"sampling.max_new_tokens=[{','.join(['1'] * 3000)}]")
    assert "sampling.max_new_tokens" in error and error.endswith("...") and len(error) < 2100
