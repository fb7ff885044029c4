"""Seconds of a step's rollout and reward where scoring begins while the engine samples, against scoring afterwards.

    python benchmarks/overlap.py [judge_seconds]

SmolLM2-135M in float32 with a LoRA r=16 adapter, 8 prompts x 4 samples of up to 32 tokens, temperature 1. Two rewards:
a judge whose server takes that long for a request (0.5 s), 8 at a time; and `math` with two workers. The two sides
alternate in one process, on the same seeds, so that they sample and score the same responses.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from measure import Spread, save, smollm2, sums
from omegaconf import OmegaConf

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.config.conf_tree import config_dir
from dppo_cli.data.file import File
from dppo_cli.policy.loading import load_policy
from dppo_cli.reward.scorer import Scorer
from dppo_cli.rollout.collect import sample_and_score


def main(judge_seconds: float, rounds: int = 4) -> None:
    with judge(judge_seconds) as url:
        for name, words in {
            f"judge, {judge_seconds:g} s": [
                "reward=judge",
                f"reward.url={url}",
                "reward.model=any",
                "reward.concurrency=8",
            ],
            "math, 2 workers": ["reward=math", "reward.workers=2"],
        }.items():
            found = compare(composed(*words), rounds)
            print(name, {side: {part: str(s) for part, s in of.items()} for side, of in found.items()}, flush=True)
            save(f"overlap_{name.partition(',')[0]}", found)


def compare(config: TrainConfig, rounds: int) -> dict[str, dict[str, Spread]]:
    """The first round is a warm-up and is left out."""
    policy = load_policy(config.model, config.hardware, warn=print, adapter=config.adapter)
    data = File(str(sums()), None, None, None, "prompt", None, "answer", None, None, None, 8, "refuse")
    prompts = policy.encode(data.load(print).train[:8], config.prompt)
    early = config.reward.load(print)

    def afterwards(*of: object) -> object:
        return early(*of)  # type: ignore[arg-type]

    sides: dict[str, Scorer] = {"afterwards": afterwards, "early": early}  # type: ignore[dict-item]
    seconds: dict[str, dict[str, list[float]]] = {side: {"step": [], "rollout": [], "reward": []} for side in sides}
    with config.rollout.load(policy, print) as engine:
        engine.sync(version=0)
        for turn in range(1 + rounds):
            for side in sides if turn % 2 else reversed(sides):
                start = time.perf_counter()
                found = sample_and_score(engine, sides[side], prompts, 4, config.sampling, 0, seed=turn)
                if turn:
                    seconds[side]["step"].append(time.perf_counter() - start)
                    for part, value in found.seconds.items():
                        seconds[side][part].append(value)
    return {side: {part: Spread.of(values) for part, values in of.items()} for side, of in seconds.items()}


def composed(*words: str) -> TrainConfig:
    from hydra import compose, initialize_config_dir

    fixed = [
        *("model=hf", f"model.path={smollm2()}", "hardware=cpu", "adapter.r=16", "adapter.alpha=32"),
        *("sampling.max_new_tokens=32", "sampling.temperature=1.0", "prompt.template=chat"),
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return build(TrainConfig, OmegaConf.create(OmegaConf.to_container(compose("train", [*fixed, *words]))))


@contextmanager
def judge(seconds: float) -> Iterator[str]:
    """The address of a server that says yes to everything, after that long."""
    answer = json.dumps({"choices": [{"message": {"content": "Verdict: yes"}}]}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(seconds)
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 0.5)
