"""A GGUF export in llama.cpp itself: its own converter writes it, its own runtime reads it.

`make test-llama-cpp` builds what this needs: convert_hf_to_gguf.py on the PATH, and the package llama-cpp-python.
"""

from pathlib import Path

import gguf_files
import make
import numpy as np
import pytest
import tiny
import torch
from helpers import train, write_rewards
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dppo_cli.cli.main import main
from dppo_cli.commands.export import PLAIN_CPU
from dppo_cli.commands.trained import read_run_config
from dppo_cli.policy.loading import load_policy

pytestmark = pytest.mark.llama_cpp
TEXTS = ("12+34=", "Hello world, how are you?", " 7  7", "été ✓\nx")


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters and bytes, of the kind that Llama 2 has: the one whose converter asks for no known vocabulary."""
    characters = [c for c in tiny.CHARACTERS if not c.isspace()]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters]
    ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(BPE(ids, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module", params=list(gguf_files.ROPE))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rewards(folder)
        gguf_files.save(folder / "base", request.param, tokenizer())
        assert train(folder / "base", "steps=4", "optim.lr=0.02", "run_dir=run") == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("dtype", "name", "kl", "greedy"),
    # llama.cpp computes attention with keys and values in float16; 8 bits a weight cost more.
    [
        ("float32", "f32", 1e-5, 1.0),
        ("float16", "f16", 1e-4, 0.95),
        ("bfloat16", "bf16", 1e-2, 0.8),
        ("q8_0", "q8_0", 0.05, 0.8),
    ],
)
def test_llama_cpp_has_the_trained_policy(
    dtype: str, name: str, kl: float, greedy: float, trained: Path, work: Path
) -> None:
    from llama_cpp import Llama

    assert main(["export", f"run={trained}", "format=gguf", f"dtype={dtype}", "out=mine"]) == 0
    config = read_run_config(trained)
    policy = load_policy(
        config.model, PLAIN_CPU, warn=make.fail, adapter=config.adapter, saved_adapter=trained / "adapter"
    )
    model = Llama(f"mine/model-{name}.gguf", n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    try:
        apart, same = [], []
        for text in TEXTS:
            ids = list(policy.tokenizer(text)["input_ids"])
            assert model.tokenize(text.encode(), add_bos=True, special=True) == ids
            model.reset()
            model.eval(ids)
            found_LV = torch.tensor(np.array(model.scores[: len(ids)])).double().log_softmax(-1)
            with torch.no_grad():
                expected_LV = policy.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            apart.append((expected_LV.exp() * (expected_LV - found_LV)).sum(-1))
            same.append(expected_LV.argmax(-1) == found_LV.argmax(-1))
    finally:
        model.close()
    assert 0 <= torch.cat(apart).mean() < kl
    assert torch.cat(same).double().mean() >= greedy


def test_a_tokenizer_that_the_converter_does_not_know(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Character by character, as the model in the package."""
    assert train(model, "steps=1", "run_dir=run") == 0
    capsys.readouterr()
    assert main(["export", "run=run", "format=gguf", "out=mine"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot convert this model: it does not know this tokenizer" in error
    assert not (work / "mine").exists()
