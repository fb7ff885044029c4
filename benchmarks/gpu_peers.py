"""Steps of gpu.py: the same work by others, transformers' `generate` and TRL's trainer."""

from collections.abc import Callable
from typing import Any

import torch
from gpu_model import plain_model, tokenizer
from gpu_steps import BF16, Bench, or_nothing, prompts_of
from measure import BUILD
from peft import LoraConfig


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
    """TRL's DPPOTrainer with the same shapes, its second step."""
    try:
        from datasets import Dataset
        from peer_step import StepClock
        from trl.experimental.dppo import DPPOConfig, DPPOTrainer
    except ImportError as error:
        bench.add("whole step, TRL", not_run=f"{error}")
        return
    size, on_cuda = bench.size, bench.device.type == "cuda"
    bench.forget()
    texts = [" ".join(f"w{i}" for i in p.token_ids) for p in prompts_of(size, 2 * size.prompts, size.prompt)]
    clock = StepClock()
    settings = DPPOConfig(
        output_dir=str(BUILD / "peer_gpu"),
        num_generations=size.group,
        per_device_train_batch_size=size.group,
        gradient_accumulation_steps=size.prompts,
        max_completion_length=size.new,
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
    _, peak = bench.timed(trainer.train)
    seconds = [after - before for before, after in zip(clock.marks, clock.marks[1:], strict=False)]
    bench.add("whole step, TRL", seconds=seconds[-1], response_tokens=clock.tokens[-1], peak_gib=or_nothing(peak))


STEPS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "generate": (60, generate),
    "peer": (110, peer),
}
"""As in gpu_steps.py."""
