"""Select: a distribution over the vocabulary becomes a short list of (token id, weight).

Stands between the teacher's head, which gives log-probabilities in chunks of positions, and the
cache. Works on one rank's slice of the vocabulary: of a tensor-parallel group only each rank's
best candidates (K ids), its tail mass and the ids it drew travel, never a row of V.

Everything that decides which id is kept is an integer. Probabilities are fixed point, 2^-40, so
that sums are exact in any order and every slicing of the vocabulary picks the same ids; float32
prefix sums picked other ids in 4 of 2,560 positions at tp = 4. Ties go to the larger value, then
to the lower id. The random start of a position is a function of (seed, purpose, sequence number,
position) and of nothing else.

varopt is threshold sampling (Cohen, Duffield, Kaplan, Lund, Thorup: "Efficient stream sampling for
variance-optimal estimation of subset sums") with systematic draws (Madow 1949): an id of
probability p >= tau is kept as it is, the rest, of mass r, is drawn m = ceil(r / tau) times at
equal steps r / m. E[weight] = p for every id, and the weights of a position sum to 1.

Shape letters: N positions, C positions of a chunk, V vocabulary (here: this rank's slice), K
candidates, M systematic points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megadistill.errors import TeacherError
from megadistill.targets import SparseTargets
from megadistill.teacher.starts import ROUND, SELECT, below, uniform

FIXED_POINT = 1 << 40
_BLOCK = 64  # ids a block of the two-level prefix sum


@dataclass(frozen=True)
class VocabularySlice:
    """Which ids [first, first + size) this rank holds, and whom to ask for the others."""

    first: int
    size: int
    group: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[ranks, *shape]: everybody's tensor, in rank order."""
        if self.ranks == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.ranks)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.stack(parts)


def select_targets(
    log_probs_NV: torch.Tensor,
    *,
    method: str,
    keys_N: torch.Tensor,
    labels_N: torch.Tensor | None = None,
    tau: float = 0.06,
    k: int = 64,
    seed: int = 0,
    temperature: float = 1.0,
    vocabulary: VocabularySlice | None = None,
) -> SparseTargets:
    """The sparse targets of N distributions.

    log_probs_NV  float32 [N, V], natural logarithms, at `temperature`; under tensor parallelism
                  this rank's slice of the vocabulary
    method        "varopt" (takes tau) or "topk" (takes k; the ground truth is added where labels
                  are given and it is not among the k)
    keys_N        int64 [N, 2]: (sequence number, position), which with `seed` fix the draw
    labels_N      int64 [N] true next tokens, or None; a position with -100 gets an empty row
    temperature   recorded in the targets: what log_probs_NV was computed at

    Returns targets on the device of log_probs_NV, equal on all ranks of the group. Raises
    TeacherError where a log-probability is nan or +inf, naming sequence and position.
    """
    vocabulary = vocabulary or VocabularySlice(0, log_probs_NV.shape[1])
    if log_probs_NV.dtype != torch.float32:
        raise ValueError(f"log_probs_NV is {log_probs_NV.dtype}, expected torch.float32")
    if keys_N.shape != (len(log_probs_NV), 2):
        raise ValueError(f"keys_N is {tuple(keys_N.shape)}, expected ({len(log_probs_NV)}, 2)")
    keep_N = None
    if labels_N is not None and (labels_N == -100).any():
        keep_N = labels_N != -100
        log_probs_NV, keys_N, labels_N = log_probs_NV[keep_N], keys_N[keep_N], labels_N[keep_N]
    chosen = _select(
        log_probs_NV, vocabulary, method=method, keys_N=keys_N, labels_N=labels_N, tau=tau, k=k,
        seed=seed, temperature=temperature,
    )  # fmt: skip
    return chosen if keep_N is None else spread(chosen, keep_N)


def spread(targets: SparseTargets, keep_N: torch.Tensor) -> SparseTargets:
    """Rows for all N positions: those of `targets` where keep_N, empty ones elsewhere."""
    counts_N = keep_N.new_zeros(len(keep_N), dtype=torch.int64)
    counts_N[keep_N] = targets.counts

    def scatter(values: torch.Tensor | None, fill: float) -> torch.Tensor | None:
        if values is None:
            return None
        out = values.new_full((len(keep_N),), fill)
        out[keep_N] = values
        return out

    nan = float("nan")
    return SparseTargets(
        offsets=_offsets(counts_N), ids=targets.ids, weights=targets.weights,
        tail=scatter(targets.tail, 0), method=targets.method, temperature=targets.temperature,
        entropy=scatter(targets.entropy, nan), nll=scatter(targets.nll, nan),
        heads=scatter(targets.heads, 0), truth_added=scatter(targets.truth_added, False),
        rounding=scatter(targets.rounding, 0),
    )  # fmt: skip


def _select(
    log_probs_NV: torch.Tensor,
    vocabulary: VocabularySlice,
    *,
    method: str,
    keys_N: torch.Tensor,
    labels_N: torch.Tensor | None,
    tau: float,
    k: int,
    seed: int,
    temperature: float,
) -> SparseTargets:
    probs_NV = log_probs_NV.exp()
    entropy_N = _entropy(probs_NV, log_probs_NV, vocabulary)
    _require_distributions(probs_NV, vocabulary, keys_N)
    # A float32 times a power of two is exact, and so is what int64 keeps of it: units of 2^-40.
    fixed_NV = probs_NV.mul_(FIXED_POINT).to(torch.int64)
    common = {"method": method, "temperature": temperature, "entropy": entropy_N, "nll": None}
    truth_N = None
    if labels_N is not None:
        truth_N = _log_prob_of(labels_N, log_probs_NV, vocabulary)
        common["nll"] = -truth_N
    if method == "topk":
        return _topk(log_probs_NV, fixed_NV, vocabulary, k, labels_N, truth_N, common)
    if method == "varopt":
        common["rounding"] = uniform(keys_N, seed=seed, purpose=ROUND) >> 12
        start_N = uniform(keys_N, seed=seed, purpose=SELECT)
        return _varopt(log_probs_NV, fixed_NV, vocabulary, tau, start_N, common)
    raise ValueError(f"method is {method!r}, expected 'varopt' or 'topk'")


def _require_distributions(
    probs_NV: torch.Tensor, vocabulary: VocabularySlice, keys_N: torch.Tensor
) -> None:
    """TeacherError where a position's probabilities do not sum to 1: nan, inf, not a softmax."""
    sum_N = vocabulary.gather(probs_NV.sum(1)).sum(0)
    bad_N = ~((sum_N - 1).abs() < 0.01)  # nan compares false, too
    if bad_N.any():
        sequence, position = keys_N[bad_N][0].tolist()
        raise TeacherError(
            f"sequence {sequence}, position {position}: the teacher's probabilities sum to "
            f"{float(sum_N[bad_N][0])}, expected 1: check the weights, or run the teacher in "
            "teacher.dtype=float32"
        )


def _entropy(
    probs_NV: torch.Tensor, log_probs_NV: torch.Tensor, vocabulary: VocabularySlice
) -> torch.Tensor:
    """float32 [N], nats. 0 * log 0 counts as 0."""
    return -vocabulary.gather((probs_NV * log_probs_NV).nansum(1)).sum(0)


def _log_prob_of(
    ids_N: torch.Tensor, log_probs_NV: torch.Tensor, vocabulary: VocabularySlice
) -> torch.Tensor:
    """float32 [N]: the log-probability of one id a position, wherever its slice is."""
    local_N = ids_N - vocabulary.first
    here_N = (local_N >= 0) & (local_N < vocabulary.size)
    found_N = log_probs_NV.gather(1, local_N.clamp(0, vocabulary.size - 1)[:, None])[:, 0]
    return vocabulary.gather(found_N.masked_fill(~here_N, -math.inf)).amax(0)


def _candidates(
    log_probs_NV: torch.Tensor, fixed_NV: torch.Tensor, vocabulary: VocabularySlice, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most probable ids of the whole vocabulary: ids_NK, log_probs_NK, fixed_NK, sorted.

    Of equal values the lower id comes first, on any device and at any slicing.
    """
    local_NK = _local_best(log_probs_NV, k)
    keys_NK = _ordered(log_probs_NV.gather(1, local_NK), local_NK + vocabulary.first)
    fixed_NK = fixed_NV.gather(1, local_NK)
    if vocabulary.ranks > 1:
        # Slices may differ in size by one id: pad to k, below every real candidate.
        pad = (0, k - keys_NK.shape[1])
        lowest = torch.iinfo(torch.int64).min
        keys_NK = torch.nn.functional.pad(keys_NK, pad, value=lowest)
        fixed_NK = torch.nn.functional.pad(fixed_NK, pad)
        keys_NK = torch.cat(list(vocabulary.gather(keys_NK)), 1)
        fixed_NK = torch.cat(list(vocabulary.gather(fixed_NK)), 1)
    best = keys_NK.topk(min(k, keys_NK.shape[1]), dim=1)
    keys_NK, fixed_NK = best.values, fixed_NK.gather(1, best.indices)
    if vocabulary.ranks > 1:
        real_K = (keys_NK > lowest).all(0)
        keys_NK, fixed_NK = keys_NK[:, real_K], fixed_NK[:, real_K]
    ids_NK = 0xFFFFFFFF - (keys_NK & 0xFFFFFFFF)
    order_NK = (keys_NK >> 32).to(torch.int32)
    log_probs_NK = (order_NK ^ ((order_NK >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return ids_NK, log_probs_NK, fixed_NK


def _local_best(log_probs_NV: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [N, K]: columns of the k largest values, in no order; ties go to the lower column.

    torch.topk leaves open which of equal values it takes: rows with a tie at the border are done
    again on integers that hold value and column. Doing so for all rows took twice the time.
    """
    V = log_probs_NV.shape[1]
    if k >= V:
        columns_V = torch.arange(V, device=log_probs_NV.device)
        return columns_V.expand(log_probs_NV.shape)
    best = log_probs_NV.topk(k + 1, dim=1)
    columns_NK = best.indices[:, :k]
    tied_N = best.values[:, k] == best.values[:, k - 1]
    if tied_N.any():
        tied_NV = log_probs_NV[tied_N]
        columns_V = torch.arange(V, device=log_probs_NV.device)
        columns_NK[tied_N] = _ordered(tied_NV, columns_V).topk(k, dim=1).indices
    return columns_NK


def _ordered(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64, larger for a larger value, then for a lower id (below 2^32).

    The bits of a float, made to order like an integer, stand above the id's complement.
    """
    bits = log_probs.view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    return (order << 32) | (0xFFFFFFFF - ids)


def _topk(
    log_probs_NV: torch.Tensor,
    fixed_NV: torch.Tensor,
    vocabulary: VocabularySlice,
    k: int,
    labels_N: torch.Tensor | None,
    truth_N: torch.Tensor | None,
    common: dict,
) -> SparseTargets:
    total_N = vocabulary.gather(fixed_NV.sum(1)).sum(0)
    ids_NK, log_probs_NK, fixed_NK = _candidates(log_probs_NV, fixed_NV, vocabulary, k)
    listed_N = fixed_NK.sum(1)
    keep_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    added_N = torch.zeros_like(total_N, dtype=torch.bool)
    if labels_N is not None and truth_N is not None:
        added_N = ~(ids_NK == labels_N[:, None]).any(1)
        truth_fixed_N = (truth_N.exp() * FIXED_POINT).to(torch.int64)
        listed_N = listed_N + torch.where(added_N, truth_fixed_N, 0)
        ids_NK = torch.cat([ids_NK, labels_N[:, None]], 1)
        log_probs_NK = torch.cat([log_probs_NK, truth_N[:, None]], 1)
        keep_NK = torch.cat([keep_NK, added_N[:, None]], 1)
    tail_N = ((total_N - listed_N).clamp_min(0).double() / total_N.double()).float()
    return SparseTargets(
        offsets=_offsets(keep_NK.sum(1)), ids=ids_NK[keep_NK],
        weights=log_probs_NK.exp()[keep_NK], tail=tail_N, truth_added=added_N, **common,
    )  # fmt: skip


def _varopt(
    log_probs_NV: torch.Tensor,
    fixed_NV: torch.Tensor,
    vocabulary: VocabularySlice,
    tau: float,
    start_N: torch.Tensor,
    common: dict,
) -> SparseTargets:
    threshold = max(1, round(tau * FIXED_POINT))
    # An id joins the heads above r/m, and r/m > tau/2 where there is more than one point to draw:
    # so there are at most 2/tau + 1 heads.
    k = int(2 / tau) + 2
    ids_NK, _, fixed_NK = _candidates(log_probs_NV, fixed_NV, vocabulary, k)
    blocks_NBb = _in_blocks(fixed_NV)
    sums_NB = blocks_NBb.sum(2)
    total_N = vocabulary.gather(sums_NB.sum(1)).sum(0)
    heads_N, rest_N, points_N = _heads(fixed_NK, total_N, threshold)

    # The heads leave the mass that is drawn from.
    head_NK = torch.arange(fixed_NK.shape[1], device=heads_N.device) < heads_N[:, None]
    local_NK = ids_NK - vocabulary.first
    mine_NK = head_NK & (local_NK >= 0) & (local_NK < vocabulary.size)
    row_E, column_E = mine_NK.nonzero()[:, 0], local_NK[mine_NK]
    block_E, inside_E = column_E // _BLOCK, column_E % _BLOCK
    blocks_NBb[row_E, block_E, inside_E] = 0
    sums_NB.index_put_((row_E, block_E), -fixed_NK[mine_NK], accumulate=True)
    drawn_NM = _systematic(blocks_NBb, sums_NB, rest_N, points_N, start_N, vocabulary)

    total = total_N.double()[:, None]
    drawn_weight_N = rest_N.double() / points_N.clamp_min(1).double()
    ids_NE = torch.cat([ids_NK, drawn_NM], 1)
    weights_NE = torch.cat(
        [fixed_NK.double() / total, (drawn_weight_N[:, None] / total).expand(drawn_NM.shape)], 1
    )
    keep_NE = torch.cat([head_NK, drawn_NM >= 0], 1)
    return SparseTargets(
        offsets=_offsets(keep_NE.sum(1)), ids=ids_NE[keep_NE], weights=weights_NE[keep_NE].float(),
        tail=torch.zeros_like(total_N, dtype=torch.float32), heads=heads_N, **common,
    )  # fmt: skip


def _heads(
    fixed_NK: torch.Tensor, total_N: torch.Tensor, threshold: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(heads_N, rest_N, points_N), all int64 [N].

    How many ids keep their own probability, what mass is left, and how many points are drawn from
    it. fixed_NK is sorted, so the heads are its beginning.
    """
    before_NK = torch.nn.functional.pad(fixed_NK.cumsum(1), (1, 0))
    heads_N = (fixed_NK >= threshold).sum(1).clamp_min(1)
    while True:
        rest_N = total_N - before_NK.gather(1, heads_N[:, None])[:, 0]
        points_N = (rest_N + threshold - 1) // threshold
        above_N = (fixed_NK * points_N[:, None] > rest_N[:, None]).sum(1)
        more_N = torch.maximum(heads_N, above_N)
        if torch.equal(more_N, heads_N):
            return heads_N, rest_N, points_N
        heads_N = more_N


def _in_blocks(fixed_NV: torch.Tensor) -> torch.Tensor:
    """[N, V / _BLOCK, _BLOCK], a view where V is a multiple of _BLOCK."""
    N, V = fixed_NV.shape
    padded = torch.nn.functional.pad(fixed_NV, (0, -V % _BLOCK)) if V % _BLOCK else fixed_NV
    return padded.view(N, -(-V // _BLOCK), _BLOCK)


def _systematic(
    blocks_NBb: torch.Tensor,
    sums_NB: torch.Tensor,
    rest_N: torch.Tensor,
    points_N: torch.Tensor,
    start_N: torch.Tensor,
    vocabulary: VocabularySlice,
) -> torch.Tensor:
    """int64 [N, M]: the ids that the points (start + j * rest) / points fall on; -1 beyond.

    blocks_NBb holds 0 for the heads. No id has more than rest / points, so none is drawn twice.
    """
    M = int(points_N.max()) if len(points_N) else 0
    j_M = torch.arange(M, device=sums_NB.device)
    safe_N = points_N.clamp_min(1)
    point_NM = (below(rest_N, start_N)[:, None] + j_M * rest_N[:, None]) // safe_N[:, None]
    ends_NB = sums_NB.cumsum(1)
    mass_N = ends_NB[:, -1]
    masses_RN = vocabulary.gather(mass_N)
    point_NM = point_NM - masses_RN[: vocabulary.rank].sum(0)[:, None]
    mine_NM = (j_M < points_N[:, None]) & (point_NM >= 0) & (point_NM < mass_N[:, None])
    found_NM = torch.full_like(point_NM, -1)
    row_E = mine_NM.nonzero()[:, 0]
    found_NM[mine_NM] = vocabulary.first + _search(blocks_NBb, ends_NB, row_E, point_NM, mine_NM)
    return vocabulary.gather(found_NM).amax(0)


def _search(
    blocks_NBb: torch.Tensor,
    ends_NB: torch.Tensor,
    row_E: torch.Tensor,
    point_NM: torch.Tensor,
    mine_NM: torch.Tensor,
) -> torch.Tensor:
    """int64 [E]: for each of the points `mine_NM`, the first column whose prefix sum exceeds it.

    Two levels, the sums of blocks and then one block a point, so that no prefix sum over V is
    stored.
    """
    block_E = torch.searchsorted(ends_NB, point_NM, right=True)[mine_NM]
    before_E = torch.nn.functional.pad(ends_NB, (1, 0))[row_E, block_E]
    prefix_Eb = blocks_NBb[row_E, block_E].cumsum(1)
    inside_E = (prefix_Eb <= (point_NM[mine_NM] - before_E)[:, None]).sum(1)
    return block_E * _BLOCK + inside_E


def _offsets(counts_N: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts_N.cumsum(0), (1, 0))
