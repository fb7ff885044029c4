"""Steps of gpu.py: the same work by others, transformers' `generate` and TRL's trainer."""

from collections.abc import Callable
from typing import Any

import torch
from gpu_model import plain_model, tokenizer
from gpu_steps import BF16, Bench, or_nothing, prompts_of
from measure import BUILD
from peft import LoraConfig
from step_clock import StepClock

from dppo_cli.kernels.devices import set_up

TRL = "whole step, TRL"


def generate(bench: Bench) -> None:
    """transformers' `generate` on the same model and rows, without log-probs."""
    size, of = bench.size, bench.policy(BF16)
    rows, width = size.rows[1], size.prompt + (size.new - size.decoded) // 2
    ids = torch.tensor([p.token_ids for p in prompts_of(size, rows, width)], device=bench.device)

    def run(tokens: int) -> float:
        with torch.no_grad(), of.autocast():
            options: dict[str, Any] = dict(do_sample=True, top_k=0, top_p=1.0, min_new_tokens=tokens)
            return bench.timed(
                lambda: of.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options
                )
            )[0]

    run(2)
    step = (run(size.decoded) - run(1)) / (size.decoded - 1)
    bench.add(f"transformers' generate, {rows} rows", ms_per_step=1e3 * step, tokens_per_s=rows / step)


def peer(bench: Bench) -> None:
    """TRL's DPPOTrainer with the same shapes: its second step. Out of memory, once more with half of a micro-batch.

    Recomputing, which is on in TRL, is off, and the attention kernels are those of our step: cuDNN's would make a plan
    for each length of the keys. For the rest its defaults: it samples all rows at once, and each token's logits stay in
    float32 on the device until the last (4 bytes x rows x tokens x vocabulary); the logits of all responses of a
    micro-batch exist at once, for log-probs and entropies.
    """
    try:
        import datasets  # noqa: F401
        import trl.experimental.dppo  # noqa: F401
    except ImportError as error:
        bench.add(TRL, not_run=f"{error}")
        return
    set_up(bench.device)
    size = bench.size
    too_large: dict[str, float | str] = {}
    for batch in (size.group, size.group // 2):
        bench.forget()
        clock = StepClock()
        why_not = _train(bench, clock, batch)
        peak = or_nothing(bench.peak())
        if batch < size.group or not why_not.startswith(torch.OutOfMemoryError.__name__):
            break
        print(f"{TRL}, micro-batches of {batch}: {why_not}", flush=True)
        too_large = {"out_of_memory_with": batch, "its_peak_gib": peak}
    found: dict[str, float | str] = dict(zip(("first_s", "seconds"), clock.seconds, strict=False))
    if clock.tokens:
        found["response_tokens"] = clock.tokens[-1]
    if why_not:
        found["not_ended"] = why_not
    bench.add(TRL, **found, peak_gib=peak, micro_batch=batch, **too_large)
    bench.forget()


def _train(bench: Bench, clock: StepClock, batch: int) -> str:
    """Two steps with micro-batches of so many sequences. What ended them before, or nothing."""
    from datasets import Dataset
    from trl.experimental.dppo import DPPOConfig, DPPOTrainer

    size, on_cuda = bench.size, bench.device.type == "cuda"
    texts = [" ".join(f"w{i}" for i in p.token_ids) for p in prompts_of(size, 2 * size.prompts, size.prompt)]
    settings = DPPOConfig(
        output_dir=str(BUILD / "peer_gpu"),
        num_generations=size.group,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=size.prompts * size.group // batch,
        max_completion_length=size.new,
        generation_kwargs={"min_new_tokens": size.new},  # the end has no probability, so all have the same length
        mask_truncated_completions=False,
        max_steps=2,
        learning_rate=1e-5,
        beta=0.0,
        bf16=on_cuda,
        use_cpu=not on_cuda,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DPPOTrainer(
        model=plain_model(size, bench.device, torch.bfloat16 if on_cuda else torch.float32),
        processing_class=tokenizer(size.model["vocab_size"]),
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    try:
        bench.timed(trainer.train)
    except (torch.OutOfMemoryError, TimeoutError) as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return ""


STEPS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "generate": (60, generate),
    "peer": (200, peer),
}
"""As in gpu_steps.py."""
