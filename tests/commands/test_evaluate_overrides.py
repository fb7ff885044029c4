"""Single keys and whole options in place of the run's, in `dppo eval` and `dppo export`; and what is the run's."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY_RUN, read_json, read_lines
from omegaconf import OmegaConf

from dppo_cli.cli.main import main

OF_THE_RUN = ("prompt.template=chat", "prompt.system=Add.", "sampling.max_new_tokens=3", "eval.success_reward=0.5")
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def made(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = [*TINY_RUN, "data.train_problems=32", f"model.path={tiny_models['llama3']}", "steps=1", "run_dir=run"]
        assert main(["train", *words, *OF_THE_RUN, "eval.temperature=0.5"]) == 0
    return folder / "run"


@pytest.fixture
def run(made: Path, work: Path) -> Path:
    return Path(shutil.copytree(made, "run"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    def refusing(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("dppo: ")
        assert not Path("result").exists() and not Path("evals").exists()
        return error

    return refusing


ARITHMETIC = "dppo_cli.data.arithmetic.Arithmetic"


def evaluated(*words: str) -> tuple[dict[str, Any], Any]:
    """Summary and config of an evaluation."""
    shutil.rmtree("result", ignore_errors=True)
    assert main(["eval", *words, "out=result"]) == 0
    return read_json(Path("result/summary.json")), OmegaConf.load("result/config.yaml")


def plain(model: Path) -> list[str]:
    return [f"model.path={model}", "hardware=cpu"]


# Of a run


def test_what_comes_from_the_run(run: Path) -> None:
    summary, config = evaluated("run=run")
    trained = OmegaConf.load(run / "config.yaml")
    for name in ("model", "data", "reward", "rollout", "hardware", "adapter", "prompt"):
        assert config[name] == trained[name], name
    assert [config.prompt[name] for name in ("template", "system")] == ["chat", "Add."]
    assert (config.sampling.max_new_tokens, config.sampling.temperature, config.success_reward) == (3, 0.5, 0.5)
    assert (config.data._target_, config.data.train_problems, config.data.eval_problems) == (ARITHMETIC, 32, 4)
    assert (summary["problems"], summary["sampling"]["max_new_tokens"], summary["sampling"]["temperature"]) == (
        4,
        3,
        0.5,
    )


def test_single_keys_of_the_runs_sections(run: Path) -> None:
    words = ["data.eval_problems=2", r"reward.pattern='\d'", "rollout.concurrent_sequences=1"]
    summary, config = evaluated("run=run", *words, "hardware.tokens_per_micro_batch=64", "hardware.head_chunk=8")
    assert summary["problems"] == 2 == len(read_lines(Path("result/samples.jsonl")))
    assert (config.data._target_, config.data.train_problems, config.data.eval_problems) == (ARITHMETIC, 32, 2)
    assert config.reward == {"_target_": "dppo_cli.reward.exact.Exact", "pattern": r"\d"}
    assert (config.rollout.concurrent_sequences, config.rollout.max_logprobs) == (1, 1024)
    assert (config.hardware.tokens_per_micro_batch, config.hardware.head_chunk, config.hardware.device) == (
        64,
        8,
        "cpu",
    )


def test_a_pattern_counts(run: Path) -> None:
    """Nothing is found in every response, and is the answer of no problem, or of all."""
    assert evaluated("run=run", "reward.pattern='()'")[0]["accuracy"] == 0.0
    Path("sums.jsonl").write_text('{"prompt": "1+1=", "answer": "z"}\n' * 4)
    data = ["data=file", "data.path=sums.jsonl", "data.eval_path=sums.jsonl", "data.answer_pattern='()z'"]
    assert evaluated("run=run", *data)[0]["accuracy"] == 0.0
    assert evaluated("run=run", *data, "reward.pattern='()'")[0]["accuracy"] == 1.0


def test_whole_options_in_place_of_the_runs(run: Path) -> None:
    _, config = evaluated("run=run", "data=arithmetic", "hardware=cpu", "reward=exact", "rollout=local", "seed=2")
    assert (config.data.train_problems, config.data.eval_problems) == (8000, 500)
    _, config = evaluated("run=run", "data=arithmetic", "data.eval_problems=3", "hardware=auto", "hardware.device=cpu")
    assert (config.data.train_problems, config.data.eval_problems) == (8000, 3)
    assert config.hardware.device == "cpu"


def test_all_problems_of_a_file(run: Path) -> None:
    """Without a word of rows to train on, which there need not be."""
    Path("other.jsonl").write_text("".join(f'{{"q": "{n}+1=", "a": "{n + 1}"}}\n' for n in range(5)))
    words = ("data=file", "data.eval_path=other.jsonl", "data.prompt_column=q", "data.answer_column=a")
    summary, config = evaluated(f"run={run}", *words)
    assert (summary["problems"], config.data.path) == (5, None)


def test_the_words_of_eval_itself(run: Path) -> None:
    words = ["sampling.temperature=0", "sampling.max_new_tokens=2", "success_reward=0.25", "prompt.template=plain"]
    summary, config = evaluated("run=run", *words)
    assert [config.prompt[name] for name in ("template", "system")] == ["plain", None]
    assert (summary["sampling"]["temperature"], summary["sampling"]["max_new_tokens"]) == (0.0, 2)
    assert config.success_reward == 0.25
    assert max(row["tokens"] for row in read_lines(Path("result/samples.jsonl"))) <= 2


def test_the_jobs_of_a_sweep(run: Path) -> None:
    assert main(["eval", "-m", "run=run", "data.eval_problems=2,3"]) == 0
    (sweep,) = Path("sweeps").iterdir()
    assert [read_json(sweep / f"{n}/job.json")["summary"]["problems"] for n in (0, 1)] == [2, 3]
    assert [read_json(sweep / f"{n}/job.json")["overrides"] for n in (0, 1)] == [
        ["run=run", "data.eval_problems=2"],
        ["run=run", "data.eval_problems=3"],
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("data.eval_problem=2", "no key data.eval_problem; did you mean data.eval_problems?"),
        ("data.answer_column=a", "data.answer_column is a key of data="),
        ("reward.timeout=5", "reward.timeout is a key of reward=code, function, "),
        ("rollout.max_logprob=9", "no key rollout.max_logprob; did you mean rollout.max_logprobs?"),
        ("hardware.dtyp=float32", "no key hardware.dtyp; did you mean hardware.dtype?"),
        ("data.eval_problems=0", "data.eval_problems=0"),
        ("data.eval_problems=many", "data.eval_problems: Value 'many'"),
        ("hardware.dtype=float17", "hardware.dtype=float17 is an invalid value; did you mean "),
        ("data=fil", "there is no data=fil; did you mean 'file'?"),
        ("data=file", "data.path is not set; add data.path=..."),
        ("data.eval_problems=2,3", "add -m"),
        ("model.path=x", "one of them"),
    ],
)
def test_words_that_are_wrong(words: str, says: str, run: Path, refused: Refused) -> None:
    assert says in refused("eval", "run=run", "out=result", *words.split())


def test_a_word_that_is_typed_twice(run: Path, refused: Refused) -> None:
    """The last one counts, as everywhere."""
    summary, _ = evaluated("run=run", "data.eval_problems=2", "data.eval_problems=3")
    assert summary["problems"] == 3


# Of a plain model


def test_the_defaults_of_a_plain_model(model: Path, work: Path) -> None:
    summary, config = evaluated(*plain(model), "data=arithmetic", "data.eval_problems=2", "sampling.max_new_tokens=8")
    assert summary["problems"] == 2 and summary["run"] is None
    assert [config.prompt[name] for name in ("template", "system")] == ["plain", None]
    assert (config.sampling.temperature, config.success_reward, config.adapter) == (1.0, 1.0, None)
    assert config.reward == {"_target_": "dppo_cli.reward.exact.Exact", "pattern": None}
    assert config.rollout._target_ == "dppo_cli.rollout.local.LocalRollout"
    assert (config.hardware.device, config.hardware.dtype) == ("cpu", "auto")


def test_the_length_of_answers_where_nothing_says_it(model: Path, work: Path, refused: Refused) -> None:
    (work / "sums.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n')
    data = ["data=file", "data.path=sums.jsonl", "data.eval_path=sums.jsonl"]
    # 256 tokens, and the prompt, are more than the 256 positions of this model.
    assert "256" in refused("eval", *plain(model), *data, "out=result")
    summary, config = evaluated(*plain(model), *data, "sampling.max_new_tokens=5")
    assert (summary["problems"], config.sampling.max_new_tokens) == (2, 5)


def test_single_keys_for_a_plain_model(model: Path, work: Path) -> None:
    """On the defaults of sections that it has."""
    words = [*plain(model), "data=arithmetic", "data.eval_problems=2", "reward.pattern='x'", "rollout.max_logprobs=7"]
    words.append("sampling.max_new_tokens=8")
    _, config = evaluated(*words, "hardware.head_chunk=9")
    assert (config.reward.pattern, config.rollout.max_logprobs, config.hardware.head_chunk) == ("x", 7, 9)
    _, config = evaluated(f"model.path={model}", *words[2:], "hardware.device=cpu", "hardware.dtype=float32")
    assert (config.hardware.device, config.hardware.dtype) == ("cpu", "float32")


@pytest.mark.parametrize("words", [[], ["data.eval_problems=2"]])
def test_a_plain_model_without_data(words: list[str], model: Path, work: Path, refused: Refused) -> None:
    said = refused("eval", *plain(model), *words, "out=result")
    assert "data=" in said


# Exports


def test_single_keys_of_an_export(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def stop(self: object, examples: list[object], prompting: object) -> None:
        seen.append(len(examples))
        raise KeyboardInterrupt

    monkeypatch.setattr("dppo_cli.policy.policy.Policy.encode", stop)
    for words in ([], ["data.eval_problems=2"], ["hardware.dtype=float32"]):
        assert main(["export", "run=run", *words]) == 130
    assert seen == [4, 2, 4]


def test_another_data_option_for_an_export(run: Path) -> None:
    assert main(["export", "run=run", "data=arithmetic", "data.eval_problems=5"]) == 0


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("data.eval_problem=2", "no key data.eval_problem; did you mean data.eval_problems?"),
        ("hardware.dtyp=float32", "no key hardware.dtyp; did you mean hardware.dtype?"),
        ("approx=topk", "there is no key approx"),
        ("success_reward=1", "there is no key success_reward"),
    ],
)
def test_words_that_are_wrong_in_an_export(word: str, says: str, run: Path, refused: Refused) -> None:
    assert says in refused("export", "run=run", "out=result", word)
