"""Names of settings in other trainers, and the key that each one is here.

The names are those of transformers (TrainingArguments), TRL (SFTConfig, GKDConfig, ScriptArguments)
and DeepSpeed's configuration.
"""

from __future__ import annotations

KEYS = {
    # The model and the data
    "attn_implementation": "student.attention",
    "chat_template_path": "data.chat_template",
    "data_files": "data.files",
    "dataloader_num_workers": "data.workers",
    "dataset_config": "data.config",
    "dataset_config_name": "data.config",
    "dataset_name": "data.name",
    "dataset_num_proc": "data.workers",
    "dataset_path": "data.files",
    "dataset_streaming": "data.streaming",
    "dataset_test_split": "eval.split",
    "dataset_text_field": "data.text_field",
    "dataset_train_split": "data.split",
    "max_length": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "max_train_samples": "data.max_samples",
    "model_name_or_path": "student.model",
    "sequence_length": "data.seq_len",
    "teacher_model_name_or_path": "teacher.model",
    "tokenizer_name": "data.tokenizer",
    "tokenizer_name_or_path": "data.tokenizer",
    "torch_dtype": "teacher.dtype",
    # The batch
    "accumulation_steps": "train.global_batch",
    "batch_size": "train.global_batch",
    "grad_accum": "train.global_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "micro_batch_size": "train.micro_batch",
    "per_device_eval_batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "per_gpu_train_batch_size": "train.micro_batch",
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    # The optimizer and its schedule
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "clip": "train.grad_clip",
    "gradient_clipping": "train.grad_clip",
    "learning_rate": "train.lr",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "max_grad_norm": "train.grad_clip",
    "max_steps": "train.steps",
    "min_lr": "train.min_lr_ratio",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "scheduler": "train.schedule",
    "warmup": "train.warmup_steps",
    "warmup_num_steps": "train.warmup_steps",
    "warmup_ratio": "train.warmup_steps",
    # The loss
    "label_smoothing_factor": "loss.label_smoothing",
    "loss_type": "loss.divergence",
    "temperature": "loss.temperature",
    "top_k": "targets.k",
    "top_p": "targets.p",
    # The run
    "data_seed": "order.seed",
    "eval_steps": "train.eval_every",
    "eval_strategy": "train.eval_every",
    "evaluation_strategy": "train.eval_every",
    "full_determinism": "train.deterministic",
    "gradient_checkpointing": "train.activation_checkpointing",
    "load_best_model_at_end": "train.keep_best",
    "logging_dir": "train.out_dir",
    "max_eval_samples": "eval.max_samples",
    "output_dir": "train.out_dir",
    "report_to": "train.trackers",
    "save_steps": "train.save_every",
    "save_strategy": "train.save_every",
    "save_total_limit": "train.keep",
    "seed": "train.seed",
    "wandb_project": "train.project",
    # DeepSpeed, and how models are spread
    "bf16": "deepspeed.bf16.enabled",
    "fp16": "deepspeed.fp16.enabled",
    "fsdp": "deepspeed.zero_optimization",
    "offload_optimizer": "deepspeed.zero_optimization.offload_optimizer",
    "offload_param": "deepspeed.zero_optimization.offload_param",
    "stage": "deepspeed.zero_optimization.stage",
    "steps_per_print": "deepspeed.steps_per_print",
    "tensor_parallel_size": "teacher.tp",
    "tp_size": "teacher.tp",
    "wall_clock_breakdown": "deepspeed.wall_clock_breakdown",
    "zero_optimization": "deepspeed.zero_optimization",
    "zero_stage": "deepspeed.zero_optimization.stage",
}

_ON_POLICY = "the student generates no text (on-policy distillation is not supported): leave it out"
_ALWAYS = "a run resumes by itself: leave it out"

# Settings without a counterpart, and why none is needed.
ABSENT = {
    "lmbda": _ON_POLICY,
    "logging_steps": "train.out_dir/metrics.jsonl has a line for every step: leave it out",
    "logging_strategy": "train.out_dir/metrics.jsonl has a line for every step: leave it out",
    "max_new_tokens": _ON_POLICY,
    "overwrite_output_dir": "set train.out_dir to a new folder to start anew",
    "push_to_hub": "the trained model is a folder, train.out_dir/model: `hf upload` sends it",
    "remove_unused_columns": "only the columns that data names are read: leave it out",
    "resume_from_checkpoint": _ALWAYS,
    "seq_kd": _ON_POLICY,
    "torch_compile": "nothing is compiled: leave it out",
    "use_liger_kernel": "the head and the loss are fused already: leave it out",
}
