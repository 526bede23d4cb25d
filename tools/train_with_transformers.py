"""An example: a student trained from a cache by Hugging Face's Trainer.

    python tools/train_with_transformers.py --cache runs/demo/cache --student runs/demo/student_init

`--student` starts from the model's weights; `--init random` takes its config.json alone.

Shows what another trainer needs: `open_cache` and `collate` for verified sequences with their
targets, `forward_inputs`, which keeps packed documents apart, and `fused_linear_distillation`,
which takes hidden states and the head's weight, so that the logits of a batch never exist.
Checkpoints, mixed precision, logging and devices are the Trainer's own. A loop in plain torch needs
less: `wrap_student` and `CacheSampler`.

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
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from megadistill.config import StudentConfig
from megadistill.models.pretrained import load_pretrained
from megadistill.student.model import check_fits, student_settings


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the distance from the cached targets."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The loss of one micro-batch, a scalar; nothing else is returned."""
        batch = inputs["batch"].to(self.args.device)
        packed = megadistill.forward_inputs(model, batch.tokens_BT, batch.documents)
        loss = megadistill.fused_linear_distillation(
            model.base_model(**packed).last_hidden_state,
            model.get_output_embeddings().weight,
            batch.targets,
            batch.labels_BT,
        )
        return (loss, None) if return_outputs else loss


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One micro-batch, in the dictionary that the Trainer expects."""
    return {"batch": megadistill.collate(samples)}


def load_student(name: str, init: str, cache: megadistill.Cache) -> Any:
    """The student without dropout, float32, that fits the cache."""
    config = StudentConfig(model=name, init="random" if init == "random" else "pretrained")
    settings = student_settings(config)
    check_fits(settings, vocab_size=cache.vocab_size, seq_len=cache.recipe["seq_len"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    if init == "pretrained":
        whole = load_pretrained(config, key="student.model", dtype=torch.float32)
        model.load_state_dict(whole.state_dict())
    return model


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    cache = megadistill.open_cache(args.cache)
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
        model=load_student(args.student, args.init, cache),
        args=its_arguments,
        train_dataset=megadistill.CacheDataset(cache),
        data_collator=collate,
    )
    trainer.train()
    trainer.save_model(args.out)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", required=True, help="a cache, a folder or a URL")
    parser.add_argument("--student", required=True, help="a model's folder or hub id")
    parser.add_argument(
        "--init",
        choices=("pretrained", "random"),
        default="pretrained",
        help="start from the model's weights, or from its config.json alone",
    )
    parser.add_argument("--out", default="runs/transformers", help="checkpoints and the model")
    parser.add_argument("--steps", type=count, default=100)
    parser.add_argument("--batch", type=count, default=8, help="sequences of a device")
    parser.add_argument("--lr", type=amount, default=1e-3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run(main))
