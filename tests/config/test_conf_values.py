"""What the YAML files say: the paper's settings, those of the embedded model, and what a choice sets elsewhere."""

import make
from config_cases import train_config

from dppo_cli.algorithm.advantage import GroupMean
from dppo_cli.algorithm.aggregation import TokenMean
from dppo_cli.algorithm.approx import Binary, TopK
from dppo_cli.algorithm.divergence import TotalVariation
from dppo_cli.algorithm.objective import DPPO
from dppo_cli.config.sections import BatchPlan


def test_the_papers_settings() -> None:
    """r=32, alpha=64, lr 1e-5, 128 prompts x 8 samples, 16 prompts an update, TV 0.15, K=20, cap 5, temperature 1."""
    config = train_config("model=llama3_8b", "divergence=tv", "approx=topk")
    assert config.model.path == "meta-llama/Llama-3.1-8B-Instruct"
    assert config.divergence == TotalVariation(0.15, 0.15)
    assert config.approx == TopK(20)
    assert config.objective == DPPO(ratio_cap=5.0)
    assert config.loss == make.loss(TopK(20), TotalVariation(0.15, 0.15), DPPO(ratio_cap=5.0), kl_weight=0.0)
    assert config.advantage == GroupMean()
    assert config.aggregation == TokenMean()
    assert config.batch == BatchPlan(128, 8, 16, 1)
    assert config.batch.updates_per_step == 8
    assert (config.adapter.r, config.adapter.alpha) == (32, 64)
    assert (config.optim.lr, config.optim.warmup_updates, config.optim.schedule) == (1e-5, 0, "constant")
    sampling = config.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (config.anchor, config.kl_to_reference, config.prompt.template) == ("rollout", 0.0, "chat")
    assert config.unusual() == []


def test_the_papers_threshold_of_kl() -> None:
    divergence = train_config("divergence=kl").divergence
    assert (divergence.delta_low, divergence.delta_high) == (0.05, 0.05)


def test_a_threshold_outside_the_papers_range_is_unusual() -> None:
    """Both are named, each with the range of its own divergence; the range's ends belong to it."""
    found = train_config("divergence=kl", "divergence.delta_low=0.2", "divergence.delta_high=0.01").unusual()
    assert [text.partition(", where")[0] for text in found] == [
        "divergence.delta_low=0.2 lies outside 0.05 to 0.15",
        "divergence.delta_high=0.01 lies outside 0.05 to 0.15",
    ]
    assert train_config("divergence=tv", "divergence.delta_low=0.1", "divergence.delta_high=0.2").unusual() == []


def test_the_embedded_default() -> None:
    config = train_config()
    assert config.model.path == "embedded:arithmetic_1m"
    assert config.divergence == TotalVariation(0.15, 0.15)
    assert config.approx == Binary()
    assert config.sampling.max_new_tokens == 8
    # The model chooses the batch and the optimizer that suit its size.
    assert config.batch == train_config("batch=small").batch != train_config("batch=paper").batch
    assert config.optim == train_config("optim=adamw_small").optim != train_config("optim=adamw").optim


def test_the_command_line_wins_over_what_a_choice_sets() -> None:
    """A model chooses batch and optimizer that suit it, a data set the response length; the user has the last word."""
    config = train_config("batch=paper", "optim=adamw", "sampling.max_new_tokens=5", "batch.samples_per_prompt=4")
    assert config.batch == BatchPlan(128, 4, 16, 1)
    assert config.optim.lr == 1e-5
    assert config.sampling.max_new_tokens == 5


def test_choices_that_set_keys_of_other_groups() -> None:
    qlora = train_config("adapter=qlora")
    assert (qlora.adapter.quantization, qlora.rollout.weights) == ("nf4", "auto")
    assert qlora.adapter.r == train_config().adapter.r
    kinds = {
        name: (a.use_dora, a.use_rslora, a.quantization, a.alpha)
        for name in ("lora", "rslora", "dora", "qlora", "qdora")
        for a in [train_config(f"adapter={name}").adapter]
    }
    assert kinds == {
        "lora": (False, False, None, 64.0),
        "rslora": (False, True, None, 12.0),
        "dora": (True, False, None, 64.0),
        "qlora": (False, False, "nf4", 64.0),
        "qdora": (True, False, "nf4", 64.0),
    }
    assert train_config().adapter.path is None
    minirl = train_config("objective=minirl")
    assert minirl.anchor == "recompute"
    assert minirl.objective == train_config("objective=ppo").objective
