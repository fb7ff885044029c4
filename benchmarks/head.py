"""The language-model head, forward and backward: chunked against materialised logits.

    python benchmarks/head.py               # compares; the two sides alternate, each in a process of its own
    python benchmarks/head.py chunked       # one side (or materialised): seconds, extra peak memory, a fingerprint

4,096 tokens x hidden 2,048 x vocabulary 128,256, float32. The chunked head also computes the entropy and the 20 largest
log-probs; the materialised one does not.
"""

import json
import resource
import sys
import time

import torch

TOKENS, HIDDEN, VOCABULARY, K, CHUNK = 4096, 2048, 128_256, 20, 256


def one_side(kind: str) -> None:
    from dppo_cli.policy.head import Head, token_log_probs

    torch.manual_seed(0)
    # Filled in place, because the memory of a second copy would hide the memory that is measured here.
    weight_VH = torch.empty(VOCABULARY, HIDDEN).normal_(std=0.02)
    hidden_NH = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    token_N = torch.randint(VOCABULARY, (TOKENS,))
    # A small run first, so that libraries are loaded and threads started.
    (hidden_NH[:64] @ weight_VH[:64].T).logsumexp(-1).sum().backward()
    hidden_NH.grad = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if kind == "materialised":
        logits_NV = hidden_NH @ weight_VH.T
        logp_N = logits_NV.log_softmax(-1).gather(-1, token_N[:, None]).squeeze(-1)
    else:
        top: list[torch.Tensor] = []
        logp_N, _ = token_log_probs(
            Head(weight_VH), hidden_NH, token_N, CHUNK, lambda _, log_pi_CV: top.append(log_pi_CV.topk(K).values)
        )
    logp_N.mean().backward()
    seconds = time.perf_counter() - start
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert hidden_NH.grad is not None
    fingerprint = [float(logp_N.detach().sum()), float(hidden_NH.grad.norm())]
    print(json.dumps({"seconds": seconds, "extra_gib": extra, "fingerprint": fingerprint}))


def compare(rounds: int = 3) -> None:
    from measure import Spread, run_json, save

    runs: dict[str, list[dict[str, float]]] = {"chunked": [], "materialised": []}
    for _ in range(rounds):
        for kind in runs:
            runs[kind].append(run_json("head.py", kind)[0])
    found = {
        "seconds": {kind: Spread.of([r["seconds"] for r in rows]) for kind, rows in runs.items()},
        "extra_gib": {kind: Spread.of([r["extra_gib"] for r in rows]) for kind, rows in runs.items()},
        "time_ratio": Spread.of(
            [a["seconds"] / b["seconds"] for a, b in zip(runs["chunked"], runs["materialised"], strict=True)]
        ),
        "memory_ratio": Spread.of(
            [b["extra_gib"] / a["extra_gib"] for a, b in zip(runs["chunked"], runs["materialised"], strict=True)]
        ),
        "fingerprints": {kind: rows[0]["fingerprint"] for kind, rows in runs.items()},
    }
    print(found)
    save("head", found)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one_side(sys.argv[1])
    else:
        compare()
