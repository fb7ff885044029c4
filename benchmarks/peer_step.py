"""The benchmark's work with TRL's DPPOTrainer. `step.py` runs it in the peer's environment, without dppo.

Prints one line of JSON: seconds per step, mean response tokens per step.
"""

import argparse
import json

import torch
from datasets import Dataset
from peft import LoraConfig
from step_clock import StepClock
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.dppo import DPPOConfig, DPPOTrainer


def contains_answer(completions: list[list[dict[str, str]]], answer: list[str], **_: object) -> list[float]:
    return [float(a in c[0]["content"]) for a, c in zip(answer, completions, strict=True)]


def all_differ(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
    return [float(i % 8) for i in range(len(completions))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--divergence", default="binary_tv")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--reward", choices=["contains_answer", "all_differ"], default="contains_answer")
    args = parser.parse_args()
    with open(args.data) as file:
        rows = [json.loads(line) for line in file]
    prompts = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in rows]
    clock = StepClock()
    config = DPPOConfig(
        output_dir=args.out,
        divergence_type=args.divergence,
        divergence_topk=20,
        num_generations=8,
        # The fastest of the settings tried on two cores. 64 sequences at a time took 1.5 times as long, and 20 GB.
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        max_completion_length=args.max_new_tokens,
        max_steps=args.steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        temperature=1.0,
        beta=0.0,
        # Both are on by default. On a CPU both cost time; bf16 only where the processor has no bfloat16.
        bf16=args.bf16,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
    trainer = DPPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        reward_funcs={"contains_answer": contains_answer, "all_differ": all_differ}[args.reward],
        args=config,
        train_dataset=Dataset.from_list(prompts),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.train()
    seconds = clock.seconds
    print(json.dumps({"seconds": seconds, "response_tokens": clock.tokens[: len(seconds)]}))


if __name__ == "__main__":
    main()
