"""Words that are not a command, option, group, choice or key: one line, with the nearest right word."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dppo_cli.cli.main import main
from dppo_cli.cli.mistakes import OF_OTHERS
from dppo_cli.cli.table import COMMANDS
from dppo_cli.config.conf_tree import config_dir, known_keys

pytestmark = pytest.mark.usefixtures("work")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["no command 'trian'", "did you mean 'train'?", f"Choices: {', '.join(sorted(COMMANDS))}"]),
        (["train", "--steps", "5"], ["no option '--steps'", "key=value"]),
        (["train", "--cfg", "jobb"], ["--cfg job"]),
        (["train", "steps", "5"], ["cannot read 'steps'", "key=value"]),
        (["train", "divergence=tv,"], ["cannot read 'divergence=tv,'"]),
        (["train", "divergance=tv"], ["no key divergance", "did you mean divergence?", "advantage, aggregation"]),
        (["train", "approx=topkk"], ["no approx=topkk", "did you mean 'topk'?", "Choices: binary, full, topk"]),
        (["train", "approx=null"], ["no approx=null", "Choices: binary, full, topk"]),
        (["train", "checkpoint_every=1"], ["no key checkpoint_every", "did you mean checkpoint.every?"]),
        (["train", "seeed=1"], ["no key seeed", "did you mean seed?", "steps"]),
        (
            ["train", "divergence.delta_hi=1"],
            ["no key divergence.delta_hi", "did you mean divergence.delta_high?", "delta_high, delta_low"],
        ),
        (["train", "approx.k=5"], ["approx.k is a key of approx=topk, which is not chosen; add approx=topk"]),
        (
            ["train", "filter.bounds=1", "filter=geometric"],
            ["no key filter.bounds. Choices in filter: high, low"],
        ),
        (
            ["train", "filter.low=0.9"],
            [
                "is a key of filter=band, geometric, ",
                " and veto, of which none is chosen; add filter=band, for example",
            ],
        ),
        (["train", "resume=a", "filter.low=0.9"], ["with resume=a, type the run's own filter=... beside filter.low"]),
        (
            ["train", "resume=auto", "run_dir=a", "approx.k=9"],
            ["approx.k is a key of approx=topk, which is not chosen"],
        ),
        (["train", "filter.members.x=veto"], ["filter.members is a key of filter=all_of and trm, of which none"]),
        (["train", "reward.members.x=exact"], ["reward.members is a key of reward=mixture, which is not chosen"]),
        (["train", "data=file", "data.operands=9"], ["data.operands is a key of data=arithmetic", "add data="]),
        (["train", "lr=1e-4"], ["no key lr; did you mean optim.lr?"]),
        (["train", "learning_rate=1e-4"], ["no key learning_rate; did you mean optim.lr?"]),
        (["train", "trainer.num_generations=4"], ["did you mean batch.samples_per_prompt? Choices: adapter"]),
        (["train", "model.name=x"], ["did you mean model.path?"]),
        (["train", "samples_per_prompt=4"], ["did you mean batch.samples_per_prompt or eval.samples_per_prompt?"]),
        (["train", "path=x"], ["did you mean adapter.path, data.path, environment.path, model.path or reward.path?"]),
        (["train", "objective.c=1"], ["no key objective.c. Choices in objective: delta, eps"]),
        (["eval", "learning_rate=1"], ["no key learning_rate. Choices: checkpoint"]),
        (["train", "data.operands=9"], ["data.operands=9 must be a list, data.operands=[9] for one value"]),
        (["train", "+unknown.key=1"], ["no key unknown", "Choices: adapter"]),
        (["train", "+divergence.detla=1"], ["no key divergence.detla", "did you mean 'delta_low'?"]),
        (["train", "approx=topk,binary"], ["approx=topk,binary", "add -m"]),
        (
            ["train", "filter=[icepop,veto]"],
            ["filter takes one choice; for several: filter=all_of filter.members."],
        ),
        (["train", "region="], ["region= is an invalid value: region takes one choice"]),
        (
            ["train", "filter=all_of", "filter.members.1=veto"],
            ["filter.members.1=veto: a name has letters, digits and _"],
        ),
        (["train", "filter=all_of", "filter.members.x=icepop,vetto"], ["filter=vetto; did you mean 'veto'?"]),
        (["train", "filter=all_of", "filter.members.x=icepop,veto"], ["filter.members.x=icepop,veto", "add -m"]),
        (["train", "recipe=nowhere"], ["no recipe 'nowhere'"]),
        (["train", "~divergence"], ["divergence is not set"]),
        (["eval", "divergence=tv"], ["no key divergence", "Choices: checkpoint, data, environment, hardware, model"]),
        (["eval", "model=smollm2_135m"], ["model cannot be set as a whole", "model.path"]),
        (["export", "fromat=merged"], ["no key fromat", "did you mean format?"]),
        (["export", "format=merge"], ["did you mean 'merged'?", "adapter, gguf, merged"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].isalpha() else None,
)
def test_misspelt_words(words: list[str], parts: list[str], refused: Callable[..., str]) -> None:
    line = refused(*words)
    for part in parts:
        assert part in line


def test_names_of_other_tools_stand_for_keys() -> None:
    keys = known_keys("train")
    assert set(OF_OTHERS.values()) <= set(keys) and not set(OF_OTHERS) & set(keys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["divergence=kl", "sampling.temprature=1"], "no key sampling.temprature; did you mean sampling.temperature?"),
        (["divergence=kll"], "no divergence=kll; did you mean 'kl'?"),
        (["-m", "approx=full,topkk", "steps=1"], "no approx=topkk; did you mean 'topk'?"),
    ],
)
def test_a_word_that_no_file_has_is_answered_without_hydra(words: list[str], says: str, work: Path) -> None:
    """Hydra would compose first; and torch is far away."""
    code = (
        "import sys; from dppo_cli.cli.main import main\n"
        f"assert main(['train', *{words}]) == 2\n"
        "assert not {'hydra', 'omegaconf', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert says in done.stderr


def test_a_choice_in_a_folder_of_the_users_own_is_found(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "own/divergence").mkdir(parents=True)
    shutil.copy(config_dir() / "divergence/tv.yaml", work / "own/divergence/mine.yaml")
    assert main(["train", "--config-dir", "own", "divergence=mine", "--cfg", "job"]) == 0
    assert "dppo_cli.algorithm.divergence.TotalVariation" in capsys.readouterr().out
    assert main(["train", "--config-dir", "own", "divergence=mien", "--cfg", "job"]) == 2
    assert "no divergence=mien" in capsys.readouterr().err
