"""An example: a student trained from a cache by Hugging Face's Trainer.

    python tools/train_with_transformers.py --cache runs/demo/cache --student runs/demo/student_init

Shows the three functions that another trainer needs: `open_cache` for verified sequences with their
targets, `forward_inputs` so that packed documents do not see each other, and
`fused_linear_distillation`, which takes hidden states and the head's weight, so that logits of a
batch never exist. Checkpoints, mixed precision, logging and devices are the Trainer's own.

The Trainer divides each micro-batch's loss by its own positions. launch/train.py divides by those
of the global batch, which matters where sequences have loss masks of different lengths.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import megadistill  # before transformers
from megadistill.cli.command_line import amount, count, run

# isort: split
import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from megadistill.config import StudentConfig
from megadistill.models.attention import forward_inputs
from megadistill.models.packed_sequences import sample_labels
from megadistill.student.model import check_fits, student_settings
from megadistill.targets import concatenate


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the distance from the cached targets."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The loss of one micro-batch, a scalar; nothing else is returned."""
        device = self.args.device
        packed = forward_inputs(model, inputs["tokens"], inputs["documents"], device=device)
        hidden_NH = model.base_model(**packed).last_hidden_state.flatten(0, 1)
        loss = megadistill.fused_linear_distillation(
            hidden_NH,
            model.get_output_embeddings().weight,
            inputs["targets"].torch(device),
            torch.as_tensor(inputs["labels_N"], device=device),
        )
        return (loss, None) if return_outputs else loss


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Sequences of a cache as one micro-batch."""
    return {
        "tokens": np.stack([s["tokens"] for s in samples]),
        "documents": [s["documents"] for s in samples],
        "labels_N": np.concatenate([sample_labels(s) for s in samples]),
        "targets": concatenate([s["targets"] for s in samples]),
    }


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    cache = megadistill.open_cache(args.cache)
    settings = student_settings(StudentConfig(model=args.student, init="random"))
    check_fits(settings, vocab_size=cache.vocab_size, seq_len=cache.recipe["seq_len"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings)
    its_arguments = TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        logging_steps=10,
        remove_unused_columns=False,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = DistillationTrainer(
        model=model, args=its_arguments, train_dataset=cache, data_collator=collate
    )
    trainer.train()
    trainer.save_model(args.out)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", required=True, help="a cache, a folder or a URL")
    parser.add_argument("--student", required=True, help="a model's folder: its config.json")
    parser.add_argument("--out", default="runs/transformers", help="checkpoints and the model")
    parser.add_argument("--steps", type=count, default=100)
    parser.add_argument("--batch", type=count, default=8, help="sequences of a device")
    parser.add_argument("--lr", type=amount, default=1e-3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run(main))
