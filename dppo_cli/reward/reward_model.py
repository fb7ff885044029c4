"""Reward by a model: a sequence classifier of transformers with a single label."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dppo_cli.config.build import FilePath
from dppo_cli.config.checks import check_choice, check_rules
from dppo_cli.errors import RewardError
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Completion, Prompt, Score

Pair = tuple[Prompt, Completion]


@dataclass(frozen=True)
class RewardModel:
    """See conf/reward/model.yaml for the fields."""

    path: FilePath
    revision: str | None
    device: str
    dtype: str
    batch_size: int
    max_length: int

    def __post_init__(self) -> None:
        check_choice("reward.device", self.device, ("auto", "cpu", "cuda"))
        check_choice("reward.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        rules = {"batch_size >= 1": self.batch_size >= 1, "max_length >= 2": self.max_length >= 2}
        check_rules("reward", self, rules)

    def load(self, warn: Callable[[str], None]) -> Scorer:
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise RewardError("reward.device=cuda, but torch sees no GPU here; use reward.device=cpu")
        device = "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"
        dtype = ("bfloat16" if device == "cuda" else "float32") if self.dtype == "auto" else self.dtype
        tokenizer, model = _loaded(self.path, self.revision, torch.device(device), getattr(torch, dtype))
        batch_size = self.batch_size
        if tokenizer.pad_token_id is None or model.config.pad_token_id is None:
            # With another token in its place, the model could take a padded response for a shorter one.
            warn(f"the reward model {self.path} has no padding token, so responses are scored one by one")
            batch_size = 1
        return ModelScorer(tokenizer, model, batch_size, self.max_length)


class ModelScorer:
    """See `Scorer`."""

    def __init__(self, tokenizer: Any, model: Any, batch_size: int, max_length: int) -> None:
        self.tokenizer, self.model, self.batch_size, self.max_length = tokenizer, model, batch_size, max_length

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        pairs = [(prompt, c) for prompt, group in zip(prompts, completions, strict=True) for c in group]
        ids = [self._ids(pair) for pair in pairs]
        # Alike lengths together, so that little is padded.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        values: dict[int, float] = {}
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            values.update(zip(part, self._values([ids[i] for i in part]), strict=True))
        rest = iter(_score(values[i]) for i in range(len(pairs)))
        return [list(islice(rest, len(group))) for group in completions]

    def _ids(self, pair: Pair) -> list[int]:
        prompt, completion = pair
        if prompt.messages:
            messages = prompt.conversation(completion.said)
            text, special = self.tokenizer.apply_chat_template(messages, tokenize=False), False
        else:
            text, special = prompt.example.prompt + completion.written, True
        # The end of a response is what is judged.
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids[-self.max_length :]

    def _values(self, ids: Sequence[Sequence[int]]) -> list[float]:
        import torch

        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id or 0
        ids_BT = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in ids], device=self.model.device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self.model.device)
        with torch.inference_mode():
            values: list[float] = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0].float().tolist()
        return values


def _score(value: float) -> Score:
    return Score(value) if math.isfinite(value) else Score(None, note=f"the reward model gave {value}")


def _loaded(path: str, revision: str | None, device: Any, dtype: Any) -> tuple[Any, Any]:
    """Tokenizer and model. Only safetensors are read, and no code of the model's own is run. Raises RewardError."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    if not Path(path).is_dir() and (path.startswith(("/", ".", "~")) or path.count("/") != 1):
        raise RewardError(f"reward.path={path}: there is no such folder (in {Path.cwd()})")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": False, "local_files_only": Path(path).is_dir()}
    try:
        config = AutoConfig.from_pretrained(path, **source)
        if "/" in str(config._attn_implementation):
            raise RewardError(f"the config.json of {path} asks for attention code from the hub, which is not run")
        if config.num_labels != 1:
            raise RewardError(
                f"{path} has {config.num_labels} labels, so it is no reward model, which has one (num_labels=1)"
            )
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **source
        )
    except RewardError:
        raise
    except Exception as error:  # Broken files raise errors of many kinds.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RewardError(f"reward.path={path} cannot be loaded as a reward model: {reason}") from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise RewardError(
            f"{path} lacks {len(missing)} of a reward model's tensors, such as {missing[0]}: is it a language model?"
        )
    return tokenizer, model.to(device).eval().requires_grad_(False)
