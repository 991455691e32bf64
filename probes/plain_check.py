# ruff: noqa: T201 (a script)
"""Agreement with a script written differently: stock `Trainer`, `from_pretrained` from a folder and
`torch.cuda.max_memory_allocated`, nothing of the probes but the numbers they recorded.

    python -m probes.plain_check results/records/nvidia-h200/measured-rows.jsonl [rows]

Each row runs in a fresh process: a random checkpoint is saved once, loaded as a user would, and
trained for six steps. Prints resident, peak allocated and peak reserved beside the record's.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> int:
    """Compare every stock Chameleon row of a store; 1 when one differs by more than 0.5 %."""
    if argv[0] == "--child":
        return child(json.loads(argv[1]), argv[2])
    limit = int(argv[1]) if len(argv) > 1 else 100
    records = [json.loads(line) for line in Path(argv[0]).read_text().splitlines()]
    records = [r for r in records if r["outcome"] == "ok" and r["spec"]["stack"] == "stock"][:limit]
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        save_random_chameleon(folder)
        for record in records:
            command = [sys.executable, "-m", "probes.plain_check", "--child"]
            answer = subprocess.run(
                [*command, json.dumps(record["spec"]), folder], stdout=subprocess.PIPE, check=True
            )
            plain = json.loads(answer.stdout.splitlines()[-1])
            for name, value in plain.items():
                ours = record["meters"][name]
                ours = ours["median_s"] if isinstance(ours, dict) else ours
                off = ours / value - 1
                exact = name in ("resident_bytes", "peak_allocated_bytes")
                worst = max(worst, abs(off) if exact else 0.0)
                print(f"{record['key']} {name:22} plain {value} probe {ours} ({off:+.3%})")
    print(f"worst difference of resident and peak allocated bytes: {worst:.3%}")
    return int(worst > 0.005)


def save_random_chameleon(folder: str) -> None:
    """Chameleon-7B at random, in bf16, as a checkpoint on the disk."""
    import torch
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    images = {f"IMGIMG{''.join(chr(65 + int(d)) for d in str(i))}Z": 4 + i for i in range(8192)}
    config = ChameleonConfig(vocabulary_map={**images, "<image>": 8711}, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = ChameleonForConditionalGeneration(config)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def child(spec: dict[str, Any], folder: str) -> int:
    """Six steps of one spec, as a user would write them; the numbers as JSON."""
    import torch
    import transformers as tf
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    four_bit = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    quantized = spec["quantization"] != "none"
    model: Any = tf.ChameleonForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0},
        quantization_config=four_bit if quantized else None,
    )  # fmt: skip
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if spec["method"] == "lora":
        lora = spec["lora"]
        model = get_peft_model(model, LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"],
            target_modules=lora["target_modules"], task_type="CAUSAL_LM",
        ))  # fmt: skip
    resident = torch.cuda.memory_allocated()
    rows = torch.randint(9000, 60000, (512, spec["sequence_length"]))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = tf.TrainingArguments(
        tempfile.mkdtemp(), max_steps=6, per_device_train_batch_size=spec["micro_batch_size"],
        gradient_accumulation_steps=spec["gradient_accumulation_steps"],
        gradient_checkpointing=spec["gradient_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False}, optim=spec["optimizer"],
        bf16=spec["precision"] == "bf16", fp16=spec["precision"] == "fp16",
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    times: list[float] = []

    class Clock(tf.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer = tf.Trainer(model, arguments, train_dataset=data, callbacks=[Clock()])
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    steps = sorted(b - a for a, b in itertools.pairwise(times[1:]))
    print(json.dumps({
        "resident_bytes": resident,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "step_seconds": steps[len(steps) // 2],
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
