"""Fine-tunes a model in the memory that is there: `MemoryEfficientTrainer` with flags.

    python scripts/run_memory_efficient_training.py \\
        --model_name_or_path assets/sample_model --output_dir outputs --bits 4 --lora_r 16 \\
        --auto_find_batch_size --auto_find_parameters --memory_profiling

Without --train_file and --validation_file it learns the shipped sample data. What each flag means is
said by --help, and at length by `MemoryEfficientTrainer`.
"""

import argparse
import logging

from fitlora import MemoryEfficientTrainer
from fitlora.console import run, say
from fitlora.params import DataParams, LoraParams, QuantizationParams, TrainParams

_LORA, _TRAIN, _QUANTIZATION = LoraParams(), TrainParams(), QuantizationParams()


def parser() -> argparse.ArgumentParser:
    """The flags; those that are left out are left to the trainer."""
    found = argparse.ArgumentParser(
        description="Fine-tune a model with QLoRA in the memory that is there.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = found.add_argument
    add("--model_name_or_path", required=True, help="a folder, or a hub id with --revision")
    add("--output_dir", required=True, help="gets artifacts/, params.yaml and model/")
    add("--revision", help="the full commit of a hub model")
    add("--train_file", help="rows to learn; the shipped sample data without it")
    add("--validation_file", help="rows that are held out; a share of the others without it")
    add("--bits", type=int, help=f"4, or 16 for no quantization (default {_QUANTIZATION.bits})")
    add(
        "--double_quant",
        action=argparse.BooleanOptionalAction,
        help="quantize the scales too (default: yes)",
    )
    add("--quant_type", help=f"nf4 or fp4 (default {_QUANTIZATION.type})")
    add("--lora_r", type=int, help=f"rank; with --auto_find_parameters the highest ({_LORA.r})")
    add("--lora_alpha", type=float, help="default: twice the rank")
    add("--lora_dropout", type=float, help=f"default {_LORA.dropout}")
    add(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute every layer's activations, or none's; default: as few as the budget asks for",
    )
    add("--memory_profiling", action="store_true", help="keep the memory of each step, show peaks")
    add(
        "--cpu_offloading",
        action=argparse.BooleanOptionalAction,
        help="keep on the host what the GPU has no room for (default: yes)",
    )
    add("--auto_find_batch_size", action="store_true", help="the planner finds the micro-batch")
    add("--auto_find_parameters", action="store_true", help="find rank and sequence length")
    add("--device_map", help="auto for every GPU that is here; cuda, cpu")
    add("--memory_budget", help="like 8GiB; default: all of the device's")
    add("--per_device_train_batch_size", type=int, help="the micro-batch (default 1)")
    add("--gradient_accumulation_steps", type=int, help="micro-batches of one optimizer step")
    add("--max_seq_length", type=int, help=f"tokens kept of a row ({DataParams().max_length})")
    add("--learning_rate", type=float, help=f"default {_TRAIN.learning_rate}")
    add("--num_train_epochs", type=float, help="passes over the rows; this or --max_steps")
    add("--max_steps", type=int, help=f"optimizer steps (default {_TRAIN.max_steps})")
    add("--warmup_steps", type=int, help=f"default {_TRAIN.warmup_steps}")
    add("--optim", help=f"default {_TRAIN.optimizer}; adamw_8bit takes less memory")
    add("--from_adapter", help="folder of an adapter to go on from")
    add("--seed", type=int, help=f"default {_TRAIN.seed}")
    return found


def main() -> None:
    # bitsandbytes says at import that an optional kernel is missing, which is never used here
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    trainer = MemoryEfficientTrainer(**vars(parser().parse_args()))
    trainer.train()
    trainer.evaluate()
    say(f"saved in {trainer.save_model()}")


if __name__ == "__main__":
    run(main)
