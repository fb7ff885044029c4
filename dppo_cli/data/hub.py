"""Problems from a data set on the Hugging Face hub, through its library `datasets` and that library's cache.

No data set can run code: `datasets` reads data files only, and `trust_remote_code` does not exist any more.
"""

import re
from dataclasses import dataclass
from typing import Any

from dppo_cli.config.checks import did_you_mean
from dppo_cli.data.examples import Problems
from dppo_cli.data.rows import Rows, chosen_split, dataset_rows, in_a_line
from dppo_cli.data.task import Task, Warn
from dppo_cli.errors import ConfigError, DataError

NAME = re.compile(r"[\w.-]+/[\w.-]+")
CONFIGS = re.compile(r"vailable(?: configs)?(?: in the cache)?: \[(.*?)\]|configurations in the cache: (.*?) Please")
"""Where `datasets` lists the configs there are."""

ANSWER_SECONDS = 10
"""How long the hub may take to say whether a set exists."""


@dataclass(frozen=True)
class Hub:
    """A data set on the hub; conf/data/hub.yaml explains the fields."""

    name: str
    config: str | None
    revision: str | None
    split: str | None
    eval_split: str | None
    prompt_column: str | None
    prompt_template: str | None
    answer_column: str | None
    answer_pattern: str | None
    shuffle: int | None
    train_problems: int | None
    eval_problems: int | None
    on_bad_row: str

    def __post_init__(self) -> None:
        Problems.of(self)
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"data.name={self.name} is no name on the hub; expected owner/name, such as openai/gsm8k")
        if self.split is None and self.eval_split is None:
            raise ConfigError("data.split and data.eval_split are null; set data.split to train on one")
        if self.eval_split is None and self.eval_problems is None:
            raise ConfigError("set data.eval_split, or data.eval_problems to hold out that many problems of data.split")

    def load(self, warn: Warn) -> Task:
        """Read the problems. Raises DataError if the set cannot be had, or not as the options say."""
        problems, splits = Problems.of(self), self._splits(warn)
        train = self._rows(splits, self.split, "data.split")
        heldout = self._rows(splits, self.eval_split, "data.eval_split")
        if train is not None and self.split == self.eval_split:
            return problems.trained_on(train, warn)
        return problems.task(train, heldout, "data.eval_split", warn)

    def _rows(self, splits: dict[str, Any], split: str | None, key: str) -> Rows | None:
        if split is None:
            return None
        return dataset_rows(
            splits[chosen_split(list(splits), split, key, None, self.name)], f"{self.name}, split {split}"
        )

    def _splits(self, warn: Warn) -> dict[str, Any]:
        """The splits by name: downloaded, or from the cache, also where the hub cannot be reached."""
        import datasets
        from huggingface_hub import HfApi, errors, logging, utils

        # A run's own lines are what is to be read.
        datasets.disable_progress_bars()
        utils.disable_progress_bars()  # type: ignore[attr-defined]
        datasets.logging.set_verbosity_error()
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        try:
            # Asked first, and once: `datasets` would repeat each of its questions to a hub that is not there for a
            # minute.
            commit = HfApi().dataset_info(self.name, revision=self.revision, timeout=ANSWER_SECONDS).sha
        except errors.RevisionNotFoundError:
            raise DataError(f"{self.name} has no revision {self.revision!r} (data.revision)") from None
        except errors.GatedRepoError:
            raise DataError(self._gated()) from None
        except errors.RepositoryNotFoundError:
            raise DataError(
                f"there is no data set {self.name} on the hub (data.name), or it is private and needs `hf auth login`"
            ) from None
        except errors.HFValidationError as error:
            raise DataError(f"data.name={self.name} is no name on the hub: {in_a_line(error)}") from None
        except Exception as error:  # No network, a proxy that refuses, an answer that is none.
            found = self._cached()
            if not isinstance(error, errors.OfflineModeIsEnabled):
                warn(f"the hub cannot be reached; {self.name} comes from the cache")
            return found
        try:
            # The prefix keeps a folder of that name, here, from taking the set's place.
            return dict(datasets.load_dataset(f"hf://datasets/{self.name}", self.config, revision=commit))
        except Exception as error:  # The library, its client and the network have some twenty kinds.
            raise DataError(self._why(error)) from None

    def _cached(self) -> dict[str, Any]:
        from datasets.packaged_modules.cache.cache import Cache

        try:
            short = self.name.partition("/")[2]
            builder = Cache(repo_id=self.name, dataset_name=short, config_name=self.config, version="auto", hash="auto")
            builder.download_and_prepare()
            return dict(builder.as_dataset())
        except Exception as error:  # Not there, there several times, or damaged.
            raise DataError(self._why(error)) from None

    def _gated(self) -> str:
        page = f"https://huggingface.co/datasets/{self.name}"
        return f"{self.name} is gated: accept its terms at {page}, then `hf auth login`, or set HF_TOKEN"

    def _why(self, error: Exception) -> str:
        """What went wrong with a set that exists, and what to type."""
        text = _without_token(in_a_line(error))
        if "gated dataset" in text:
            return self._gated()
        if found := CONFIGS.search(text):
            names = sorted(name.strip(" '\"") for name in (found[1] or found[2]).split(","))
            if self.config is None:
                return f"{self.name} has the configs {', '.join(names)}; choose one: data.config={names[0]}"
            return f"{self.name} has no config {self.config!r} (data.config){did_you_mean(self.config, names)}"
        if "Couldn't find cache" in text:
            return (
                f"{self.name} is not in the cache, and the hub cannot be reached; connect once, or save the set to a "
                "file and use data=file data.path=..."
            )
        return f"{self.name} cannot be loaded: {text}"


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "***") if token else text
