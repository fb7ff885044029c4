"""Steps of gpu.py about where the time goes: the device's kernels of decoding steps and of an update, by name.

Each writes `<step>.kernels.txt` beside gpu.json: milliseconds of all calls, their number, and the kernel's name.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial

from gpu_decode import seconds_of, static_engine
from gpu_model import config
from gpu_steps import BF16, NF4, Bench, groups_of, prompts_of
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dppo_cli.commands.assembly import make_learner
from dppo_cli.kernels.graphs import Graphs

TOKENS = 17
SHOWN = 60
"""Kernels that are listed, from those that take most."""


def traced(bench: Bench, name: str, work: Callable[[], object]) -> None:
    """`work` runs once before, so that nothing is compiled or recorded in what is listed."""
    work()
    on_cuda = bench.device.type == "cuda"
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as seen:
        seconds, _ = bench.timed(work)
    taken: defaultdict[str, list[float]] = defaultdict(list)
    for event in seen.events() or ():
        if event.device_type == kind:
            taken[event.name].append((event.device_time_total if on_cuda else event.self_cpu_time_total) / 1e3)
    busy, calls = sum(map(sum, taken.values())), sum(map(len, taken.values()))
    lines = sorted(((sum(each), len(each), kernel) for kernel, each in taken.items()), reverse=True)[:SHOWN]
    text = "\n".join(f"{ms:10.3f} ms {count:7d}  {kernel[:160]}" for ms, count, kernel in lines)
    name_of_file = name.replace(", ", "_").replace(" ", "_").replace("+_", "")
    (bench.out / f"{name_of_file}.kernels.txt").write_text(
        f"{name}: {1e3 * seconds:.1f} ms, busy {busy:.1f} ms\n{text}\n"
    )
    bench.add(f"kernels of {name}", ms=1e3 * seconds, busy_ms=busy, calls=calls, most=lines[0][2][:60] if lines else "")


def decoding(bench: Bench, words: tuple[str, ...], name: str, num_logprobs: int = 0) -> None:
    size = bench.size
    for rows in size.rows[:2]:
        group = min(size.group, rows)
        prompts = prompts_of(size, rows // group, size.prompt)
        with static_engine(bench, words, rows, Graphs) as engine:
            run = partial(seconds_of, bench, engine, prompts, group, TOKENS, num_logprobs, once=True)
            traced(bench, f"{name}, {rows} rows, {TOKENS} tokens", run)


def updating(bench: Bench, words: tuple[str, ...], name: str) -> None:
    size = bench.size
    learner = make_learner(bench.policy(words), config(size, *words), print)
    groups = groups_of(size, prompts_of(size, max(1, size.prompts // 4), size.prompt), size.new)
    traced(bench, name, lambda: learner.update(groups))


STEPS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "trace": (40, lambda b: decoding(b, BF16, "decode bf16", 20)),
    "trace_update": (40, lambda b: updating(b, BF16, "update bf16")),
    "trace_nf4": (40, lambda b: decoding(b, NF4, "decode NF4")),
    "trace_update_nf4": (40, lambda b: updating(b, NF4, "update NF4")),
}
"""As in gpu_steps.py."""
