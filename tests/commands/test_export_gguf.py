"""`dppo export format=gguf`, with a stand-in for llama.cpp's converter, and runs that were trained on a GGUF file."""

import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import gguf_files
import make
import pytest
import torch
from gguf import GGUFReader
from helpers import read_json, train
from transformers import AutoModelForCausalLM

from dppo_cli.cli.main import main
from dppo_cli.commands.export import PLAIN_CPU
from dppo_cli.commands.trained import read_run_config
from dppo_cli.config.sections import Model
from dppo_cli.policy.loading import load_policy
from dppo_cli.telemetry import phases

CONVERTER = f"converter={gguf_files.__file__}"
AS_MODULE = f"import sys\nsys.path.insert(0, {str(Path(gguf_files.__file__).parent)!r})\nimport gguf_files as g\n"
"""What a converter begins with that is the stand-in, changed."""
REWARD = """\
def late(prompts, completions, **columns):
    texts = [messages[-1]["content"] for messages in completions]
    return [sum(ord(c) % 16 for c in text) / (15 * max(1, len(text))) for text in texts]
"""
IDS = torch.tensor([[5, 9, 30, 31, 7, 60, 61, 3, 4, 4, 22, 258, 259]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a GGUF file, whose policy differs clearly from its base. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        gguf_files.save(folder / "base")
        gguf_files.write(folder / "base", folder / "tiny.gguf")
        (folder / "rewards.py").write_text(REWARD)
        words = ["model.gguf_file=tiny.gguf", "prompt.template=chat", "steps=4", "optim.lr=0.02", "run_dir=run"]
        assert train(folder, *words, "checkpoint.every=2") == 0
    return folder / "run"


@pytest.fixture
def exported(trained: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`dppo export format=gguf ... out=mine`; what it printed."""

    def run(*words: str) -> str:
        assert main(["export", f"run={trained}", "format=gguf", "out=mine", CONVERTER, *words]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(trained: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`dppo export format=gguf ...` that is refused in one line and leaves nothing behind."""

    def run(*words: str) -> str:
        before = sorted(work.iterdir())
        assert main(["export", f"run={trained}", "format=gguf", "out=deep/mine", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error
        assert sorted(work.iterdir()) == before
        return error

    return run


@torch.no_grad()
def logits_of_run(run: Path) -> torch.Tensor:
    config = read_run_config(run)
    policy = load_policy(config.model, PLAIN_CPU, warn=make.fail, adapter=config.adapter, saved_adapter=run / "adapter")
    return policy.model(input_ids=IDS).logits


def difference(output: str) -> float:
    match = re.search(r"largest logit difference[^│]*│\s*([-+.e\d]+)", output)
    assert match, output
    return float(match.group(1))


# What is written


def test_a_gguf_file_is_the_trained_policy(exported: Callable[..., str], trained: Path, work: Path) -> None:
    assert difference(exported()) < 1e-4
    assert sorted(p.name for p in (work / "mine").iterdir()) == ["Modelfile", "README.md", "model-f32.gguf"]
    with torch.no_grad():
        policy = load_policy(Model("mine", None, "model-f32.gguf"), PLAIN_CPU, warn=make.fail)
        found = policy.model(input_ids=IDS).logits
        base = AutoModelForCausalLM.from_pretrained(trained.parent / "base")(input_ids=IDS).logits
    expected = logits_of_run(trained)
    assert torch.allclose(found, expected, atol=1e-4)
    # The base model's logits are others, so the comparison means something.
    assert (base - expected).abs().max() > 0.5


def test_every_phase_that_takes_long_is_a_line(
    trained: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "LONG", 0.0)
    assert main(["export", f"run={trained}", "format=gguf", "out=mine", "dtype=q8_0", CONVERTER]) == 0
    ends = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert [line.rpartition(": ")[0] for line in ends] == [
        "loading the trained policy",
        "trying gguf_files.py on the vocabulary",
        "sampling the responses to compare on",
        "merging in float32",
        "writing the merged model",
        "rounding to q8_0, to compare",
        "converting with gguf_files.py",
        "loading model-q8_0.gguf",
        "comparing",
    ]


@pytest.mark.parametrize(
    ("dtype", "name", "kind", "least", "most"),
    [("float16", "f16", "F16", 1e-4, 0.1), ("q8_0", "q8_0", "Q8_0", 1e-3, 2)],
)
def test_a_lower_precision_says_what_it_costs(
    dtype: str, name: str, kind: str, least: float, most: float, exported: Callable[..., str], work: Path
) -> None:
    assert least < difference(exported(f"dtype={dtype}")) < most
    types = {t.name: t.tensor_type.name for t in GGUFReader(work / f"mine/model-{name}.gguf").tensors}
    assert types["output.weight"] == kind and types["output_norm.weight"] == "F32"


def test_the_accuracy_of_a_gguf_file(exported: Callable[..., str]) -> None:
    output = exported("check=accuracy")
    assert len(re.findall(r"accuracy, (?:trained|exported)", output)) == 2


def test_the_modelfile_samples_as_the_run_does(exported: Callable[..., str], work: Path) -> None:
    exported("sampling.temperature=0.5", r"sampling.stop=['\nQ:']")
    lines = (work / "mine/Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model-f32.gguf"
    assert lines[1].startswith('TEMPLATE """') and "PARAMETER temperature 0.5" in lines
    assert {"PARAMETER top_k 0", "PARAMETER top_p 1.0", "PARAMETER repeat_penalty 1.0"} <= set(lines)
    assert 'PARAMETER stop "<eos>"' in lines


def test_the_card_of_a_gguf_file(exported: Callable[..., str], trained: Path, work: Path) -> None:
    exported()
    text = (work / "mine/README.md").read_text()
    assert "library_name: gguf\n" in text and "- gguf\n" in text
    assert "llama-cli -m FOLDER/NAME.gguf" in text and "ollama create NAME -f FOLDER/Modelfile" in text
    assert "`tiny.gguf`" in text and str(trained.parent) not in text
    assert main(["export", f"run={trained}", "out=adapter"]) == 0
    assert (
        'gguf_file="tiny.gguf", quantization_config=GgufConfig(dequantize=True)'
        in (work / "adapter/README.md").read_text()
    )


def test_the_converter_on_the_path(
    trained: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = work / "bin/convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text(f"{AS_MODULE}g.main()\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    assert main(["export", f"run={trained}", "format=gguf", "out=mine"]) == 0
    assert main(["export", f"run={trained}", "format=gguf", "out=other", "converter=bin"]) == 0
    assert (work / "mine/model-f32.gguf").read_bytes() == (work / "other/model-f32.gguf").read_bytes()


# What is refused


def test_without_a_converter(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    monkeypatch.setenv("PATH", "")
    assert "git clone --depth 1 https://github.com/ggml-org/llama.cpp`, then add converter=llama.cpp" in refused()
    assert "is not convert_hf_to_gguf.py, nor a folder of llama.cpp" in refused("converter=nowhere")
    assert "is not convert_hf_to_gguf.py, nor a folder of llama.cpp" in refused("converter=.")
    (work / "script.sh").touch()
    assert "is not convert_hf_to_gguf.py" in refused("converter=script.sh")
    assert "is for format=gguf; leave it out" in refused(CONVERTER, "format=merged")
    assert "dtype=q8_0 is an invalid value" in refused("dtype=q8_0", "format=merged")
    assert "dtype=q4_0 is an invalid value" in refused("dtype=q4_0", CONVERTER)


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("import no_such_package.x", "needs the package no_such_package: pip install no_such_package"),
        (
            "raise NotImplementedError('BPE pre-tokenizer was not recognized - update get_vocab_base_pre()')",
            "it does not know this tokenizer",
        ),
        (
            "import sys; print('ERROR:hf-to-gguf:Model X is not supported', file=sys.stderr); sys.exit(1)",
            ": Model X is",
        ),
        ("import sys; sys.exit(3)", "cannot convert this model: exit status 3"),
        ("", "cannot convert this model: exit status 0"),
    ],
)
def test_a_converter_that_fails(program: str, text: str, refused: Callable[..., str], work: Path) -> None:
    (work / "own.py").write_text(program)
    assert text in refused("converter=own.py")


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        ("g.rotated = lambda data, heads: data", "what was read back is not what was written: logits differ by"),
        (
            "words = g.vocabulary; g.vocabulary = lambda f: [w.translate({61: 43, 43: 61}) for w in words(f)]",
            "token 12 is",
        ),
        (
            "write = g.write; g.write = lambda *a: write(*a, without='blk.0.ffn_up.weight')",
            "lack 1 of the model's tensors",
        ),
    ],
)
def test_a_converter_that_is_wrong(mistake: str, text: str, refused: Callable[..., str], work: Path) -> None:
    """Rows in another order, two tokens that are exchanged (+ and =), a tensor that is left out."""
    (work / "own.py").write_text(f"{AS_MODULE}{mistake}\ng.main()\n")
    assert text in refused("converter=own.py")


def test_an_architecture_that_cannot_be_read_back(
    tiny_models: dict[str, Path], work: Path, refused: Callable[..., str]
) -> None:
    assert train(tiny_models["cohere2"], "steps=1", "run_dir=run") == 0
    assert "a GGUF file of a cohere2 model cannot be read back" in refused("run=run", CONVERTER)


def test_a_disk_without_room(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 0))
    assert "the disk has 0 MiB free" in refused(CONVERTER)


# Runs on a GGUF file


def test_a_run_on_a_gguf_file_goes_on(trained: Path, work: Path) -> None:
    shutil.copytree(trained, work / "run")
    assert main(["train", "resume=run", "steps=5"]) == 0
    assert read_json(work / "run/summary.json")["steps"] == 5


def test_what_reads_a_run_on_a_gguf_file(trained: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["eval", "out=eval"], ["sample", "text=1+1=", "sampling.max_new_tokens=2"], ["export", "out=a"]):
        assert main([*command, f"run={trained}"]) == 0
    assert difference(capsys.readouterr().out) == 0.0
    assert main(["export", f"run={trained}", "format=merged", "out=merged"]) == 0
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(work / "merged")(input_ids=IDS).logits
    assert torch.allclose(found, logits_of_run(trained), atol=1e-4)


def test_plain_gguf_models_are_evaluated_and_sampled(trained: Path, work: Path) -> None:
    plain = [f"model.path={trained.parent}", "model.gguf_file=tiny.gguf", "hardware=cpu", "sampling.max_new_tokens=2"]
    assert main(["eval", *plain, "data=arithmetic", "data.eval_problems=4", "out=eval"]) == 0
    assert read_json(work / "eval/summary.json")["model"] == str(trained.parent)
    assert main(["sample", *plain, "text=1+1="]) == 0
