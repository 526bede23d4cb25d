"""The planted mutants: one wrong expression each, and the tests that should notice it.

`old` occurs exactly once in the Python files below `megadistill/<area>` (the folder itself for an
area that has folders of its own in this list), so that moving code within a subpackage leaves the
list as it is. `tests` mirror the subpackage and take less than a minute.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    area: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    # storage
    Mutant(
        "purposes share one random start",
        "storage",
        "for word in (zero + purpose, keys_N[:, 0], keys_N[:, 1]):",
        "for word in (zero, keys_N[:, 0], keys_N[:, 1]):",
        ("tests/storage/test_counter_rng.py",),
    ),
    Mutant(
        "records in another notation are believed",
        "storage",
        "    if canonical != data:\n",
        "    if False:\n",
        ("tests/blocks/test_hostile.py",),
    ),
    Mutant(
        "files are renamed before they are durable",
        "storage",
        "    files.fsync(temporary)\n    files.replace(temporary, target)\n",
        "    files.replace(temporary, target)\n",
        ("tests/blocks/test_crash.py",),
    ),
    Mutant(
        "the time remaining counts blocks that are done",
        "storage",
        "left = max(0, self._total - self._done) / rate",
        "left = self._total / rate",
        ("tests/storage/test_progress.py",),
    ),
    # blocks
    Mutant(
        "padding counts as tokens",
        "blocks",
        'return tokens[: len(tokens) - int(sample.get("padding", 0))]',
        "return tokens",
        ("tests/data/packing/test_best_fit.py", "tests/cache/test_padding.py"),
    ),
    Mutant(
        "the last block is never missing",
        "blocks",
        "return [b for b in range(self.num_blocks or 0) if b not in committed]",
        "return [b for b in range((self.num_blocks or 1) - 1) if b not in committed]",
        ("tests/blocks/test_store.py",),
    ),
    Mutant(
        "the newest local copies are removed first",
        "blocks/remote",
        "for _, bytes_, path in sorted(shards):",
        "for _, bytes_, path in sorted(shards, reverse=True):",
        ("tests/blocks/remote/test_remote.py",),
    ),
    Mutant(
        "uploads are not read back",
        "blocks/remote",
        "if there != size or (self._verify and not _reads_back(remote, marker)):",
        "if there != size:",
        ("tests/blocks/remote/test_upload.py",),
    ),
    Mutant(
        "repair keeps blocks with a single finding",
        "blocks/maintenance",
        "            if findings:\n                dropped[block]",
        "            if len(findings) > 1:\n                dropped[block]",
        ("tests/blocks/maintenance/test_repair.py",),
    ),
    Mutant(
        "merging takes every block from the first part",
        "blocks/maintenance",
        "taken[block] = parts[number]",
        "taken[block] = parts[0]",
        ("tests/blocks/maintenance/test_merge.py",),
    ),
    # data
    Mutant(
        "sequences stay in order within a window",
        "data",
        "line[rows] += shuffled[inside[rows]]",
        "line[rows] += inside[rows]",
        ("tests/data/test_order.py",),
    ),
    Mutant(
        "weights of 1 make another order",
        "data",
        "mixed = weights is not None and any(w != 1 for w in weights)",
        "mixed = weights is not None",
        ("tests/data/test_order.py", "tests/data/test_mixture.py"),
    ),
    Mutant(
        "the shortest pieces are placed first",
        "data",
        'order_P = np.argsort(-lengths_P, kind="stable")',
        'order_P = np.argsort(lengths_P, kind="stable")',
        ("tests/data/packing/test_best_fit.py",),
    ),
    Mutant(
        "every token counts as behind a cut",
        "data",
        'self._statistics["cut_tokens"] += count * self._cut',
        'self._statistics["cut_tokens"] += count',
        ("tests/data/packing/test_best_fit.py",),
    ),
    # models
    Mutant(
        "the loss mask is that of the position, not of the next token",
        "models",
        "result[:-1][loss_mask[1:] == 0] = IGNORED",
        "result[:-1][loss_mask[:-1] == 0] = IGNORED",
        ("tests/models/test_packed_sequences.py",),
    ),
    Mutant(
        "positions count on through documents",
        "models",
        "return np.arange(seq_len) - np.repeat(starts, lengths)",
        "return np.arange(seq_len)",
        ("tests/models/test_packed_sequences.py",),
    ),
    # teacher
    Mutant(
        "a draw too few where the rest is no multiple of tau",
        "targets",
        "points_N = (rest_N + threshold - 1) // threshold",
        "points_N = rest_N // threshold",
        ("tests/teacher/test_select.py",),
    ),
    Mutant(
        "the soft cap bounds by 1",
        "teacher",
        "logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)",
        "logits_CV.tanh_().mul_(self.softcap)",
        ("tests/teacher/test_chunked_head.py",),
    ),
    Mutant(
        "Granite's logits are multiplied",
        "teacher",
        "return 1.0 / float(config.logits_scaling)",
        "return float(config.logits_scaling)",
        ("tests/teacher/test_chunked_head.py",),
    ),
    # targets
    Mutant(
        "rows of targets keep the offsets of the whole",
        "targets",
        "offsets=self.offsets[start : stop + 1] - first,",
        "offsets=self.offsets[start : stop + 1],",
        ("tests/targets/test_sparse.py",),
    ),
    Mutant(
        "joined targets begin at the end of the last part alone",
        "targets",
        "base += int(part.offsets[-1])",
        "base = int(part.offsets[-1])",
        ("tests/targets/test_sparse.py",),
    ),
    # cache
    Mutant(
        "codes of entropy round down",
        "cache",
        "np.rint(np.nan_to_num(roots, nan=0.0, posinf=NONE - 1))",
        "np.floor(np.nan_to_num(roots, nan=0.0, posinf=NONE - 1))",
        ("tests/cache/test_codec.py",),
    ),
    Mutant(
        "ties are retruncated to the higher id",
        "targets",
        "order = np.lexsort((t.ids, -t.weights, added_E, row_E))",
        "order = np.lexsort((-t.ids, -t.weights, added_E, row_E))",
        ("tests/cache/test_retruncate.py",),
    ),
    Mutant(
        "either reserve of the disk is enough",
        "cache",
        "if free >= floor and free >= share * to_come:",
        "if free >= floor or free >= share * to_come:",
        ("tests/cache/test_disk_guard.py",),
    ),
    Mutant(
        "a sampled entry counts as listed mass",
        "cache",
        "fixed[place >= np.repeat(t.heads, counts)] = 0",
        "fixed[place > np.repeat(t.heads, counts)] = 0",
        ("tests/cache/test_statistics.py",),
    ),
    # cache/codec
    Mutant(
        "another temperature than 1 is not written",
        "cache/codec",
        "(_WARM if t.temperature != 1 else 0)",
        "0",
        ("tests/cache/test_codec.py",),
    ),
    # targets/streams
    Mutant(
        "weights are rounded to the nearest, with a bias",
        "targets",
        "return (steps + ((start_N[row] * (total >> 10)) >> 22)) // total",
        "return (steps + total // 2) // total",
        ("tests/cache/test_unbiased.py",),
    ),
    Mutant(
        "raw bits that are left over are not noticed",
        "targets",
        "        if -(-self._bit // 32) * 32 != self._bits:\n",
        "        if False:\n",
        ("tests/targets/test_symbols.py",),
    ),
    # student
    Mutant(
        "a probability on the edge falls into the upper bin",
        "student",
        "bin_C = (prob_C * BINS).ceil().sub(1).clamp(0, BINS - 1)",
        "bin_C = (prob_C * BINS).floor().clamp(0, BINS - 1)",
        ("tests/student/test_calibration.py",),
    ),
    Mutant(
        "least squares is not regularised",
        "student",
        "gram_SS.diagonal().add_(1e-3 * gram_SS.diagonal().mean())",
        "gram_SS.diagonal().add_(0.0)",
        ("tests/student/test_projection.py",),
    ),
    # student/loss
    Mutant(
        "reverse KL has no floor",
        "student/loss",
        "held = (self.log_p >= LOG_TINY) | (self.q == 0)",
        "held = torch.ones_like(self.q, dtype=torch.bool)",
        ("tests/student/loss/test_row_kernel.py",),
    ),
    Mutant(
        "the slope of skewed reverse KL forgets alpha",
        "student/loss",
        "-where_positive(q, log_m_q + alpha * torch.expm1(-log_m_q))",
        "-where_positive(q, log_m_q + torch.expm1(-log_m_q))",
        ("tests/student/loss/test_divergences.py",),
    ),
    Mutant(
        "rounding in the tail counts where every id is listed",
        "student/loss",
        "p_tail_C = torch.where(entries.listed_C == z_CV.shape[1], 0.0, entries.tail_C)",
        "p_tail_C = entries.tail_C",
        ("tests/student/loss/test_row_kernel.py",),
    ),
    # train
    Mutant(
        "warm-up begins at a rate of 0",
        "train",
        "return peak * (step + 1) / (warmup + 1)",
        "return peak * step / (warmup + 1)",
        ("tests/train/test_schedule.py",),
    ),
    Mutant(
        "a run may grow although its decay began",
        "train",
        "done > decay_begins(old, train)",
        "done > old",
        ("tests/train/test_more_steps.py",),
    ),
    Mutant(
        "gradients are communicated in bfloat16",
        "train",
        'settings.setdefault("communication_data_type", "fp32")',
        'settings.setdefault("communication_data_type", "bf16")',
        ("tests/train/test_student_engine.py",),
    ),
    Mutant(
        "tokens per second count sequences",
        "train",
        '"tokens_per_s": tokens / seconds,',
        '"tokens_per_s": batch_size / seconds,',
        ("tests/train/test_metrics.py",),
    ),
    Mutant(
        "matrices do not decay",
        "train",
        "(decayed if len(shape) > 1 else spared).append(parameter)",
        "(decayed if len(shape) > 2 else spared).append(parameter)",
        ("tests/train/test_student_engine.py",),
    ),
    # train/online
    Mutant(
        "a block too few is read of an endless stream",
        "train/online",
        "return math.ceil(config.sequences_needed / config.data.block_size)",
        "return config.sequences_needed // config.data.block_size",
        ("tests/train/online/test_blocks_needed.py",),
    ),
    # train/checkpoint
    Mutant(
        "the best checkpoint is that of the highest loss",
        "train/checkpoint",
        "key=lambda item: (item[1], item[0])",
        "key=lambda item: (-item[1], item[0])",
        ("tests/train/test_keep_best.py",),
    ),
    Mutant(
        "a save that failed counts as sealed",
        "train/checkpoint",
        "not (thread.is_alive() or self._failed)",
        "not thread.is_alive()",
        ("tests/train/checkpoint/test_background.py",),
    ),
    # train/reporting
    Mutant(
        "used and free memory of a GPU are swapped",
        "train/reporting",
        "return total - free, total",
        "return free, total",
        ("tests/train/reporting/test_device_stats.py",),
    ),
    Mutant(
        "attention counts half its operations",
        "train/reporting",
        "+ 12.0 * tokens * attended",
        "+ 6.0 * tokens * attended",
        ("tests/train/reporting/test_flops.py",),
    ),
    # preflight
    Mutant(
        "sixteen values a token and layer",
        "preflight",
        "values = model.layers + 17 if again else 17 * model.layers",
        "values = model.layers + 16 if again else 16 * model.layers",
        ("tests/preflight/test_memory.py",),
    ),
    Mutant(
        "ZeRO-3 gathers one layer at a time",
        "preflight",
        "max(largest, 2 * max(layers.values(), default=0))",
        "max(largest, max(layers.values(), default=0))",
        ("tests/preflight/test_shares.py",),
    ),
    # inspect
    Mutant(
        "the last mean of a long curve is too small",
        "inspect",
        "np.add.reduceat(y_P, starts) / sizes",
        "np.add.reduceat(y_P, starts) / group",
        ("tests/inspect/test_training_report.py",),
    ),
    Mutant(
        "blocks of equal length count as equal",
        "inspect",
        'for key in ("sequences", "content_hash"))',
        'for key in ("sequences",))',
        ("tests/inspect/test_difference.py",),
    ),
    # parallel
    Mutant(
        "ranks of a tensor-parallel group lie apart",
        "parallel",
        "return self.rank % self.tp\n",
        "return self.rank // self.dp\n",
        ("tests/parallel/test_ranks.py",),
    ),
    Mutant(
        "fewer hosts than expected are welcome",
        "parallel",
        "if expect_hosts is not None and len(names) != expect_hosts:",
        "if expect_hosts is not None and len(names) > expect_hosts:",
        ("tests/parallel/test_parallel_keys.py",),
    ),
    # config
    Mutant(
        "a suggestion points at the wrong key",
        "config",
        '"save_steps": "train.save_every"',
        '"save_steps": "train.eval_every"',
        ("tests/config/test_suggest.py",),
    ),
    Mutant(
        "curves run backwards between two points",
        "config",
        "return low + (high - low) * (done - start) / (end - start)",
        "return low + (high - low) * (end - done) / (end - start)",
        ("tests/config/test_curves.py",),
    ),
    # cli
    Mutant(
        "amounts below 0 are taken",
        "cli",
        "if 0 <= float(text) < math.inf:",
        "if float(text) < math.inf:",
        ("tests/cli/test_command_line.py",),
    ),
    Mutant(
        "every rank repeats a common error",
        "cli",
        "if (common and rank != 0) or (isinstance(error, ConfigError) and local_rank != 0):",
        "if isinstance(error, ConfigError) and local_rank != 0:",
        ("tests/cli/test_command_line.py",),
    ),
    # launching
    Mutant(
        "a host without slots is dropped",
        "launching",
        "        if host.slots == 0:\n",
        "        if host.slots == 0 and not line:\n",
        ("tests/launching/test_hostfile.py",),
    ),
    Mutant(
        "one machine under two names is two hosts",
        "launching",
        "        if known != name:\n",
        "        if known != known:\n",
        ("tests/launching/test_reach.py",),
    ),
    # api
    Mutant(
        "every micro-batch of a step is the first one",
        "api",
        "yield rows[number * self.micro_batch : (number + 1) * self.micro_batch]",
        "yield rows[: self.micro_batch]",
        ("tests/api/test_cache_sampler.py",),
    ),
)
