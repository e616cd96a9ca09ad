"""The list of seeded faults: one operator, bound, sign, guard or factor each."""

from typing import NamedTuple

from of_ops import OPS
from of_runs import RUNS
from selections import (
    ACCUMULATE,
    ATTENTION,
    CHECKPOINT,
    CLIP,
    DENSE_KERNELS,
    LEAN,
    MODULES,
    ORDER,
    OTHERS,
    SIGMOID,
    TRITON,
)


class Mutant(NamedTuple):
    """`old`, which occurs once in `file`, as `new`; `tests` must then fail."""

    file: str
    old: str
    new: str
    tests: str


_REST: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("kernels/merge.py", "tests/kernels/test_tilings.py -k merged"): [
        ("run_dot = run_dot * keep +", "run_dot = run_dot +"),
        ("        p += BLOCK_T * lines", "        p += lines"),
        ("(o_t < tiles - start)", "(o_t <= tiles - start)"),
    ],
    ("kernels/attention_plans.py", "tests/kernels/test_attention.py -k tiles_cover"): [
        ("rest <= size // 2)", "rest < size // 2)"),
        ("max(rest // size, 1)", "max(rest // size, 2)"),
    ],
    ("kernels/dense.py", DENSE_KERNELS): [
        ("total = total * tl.exp(top - anchor) + found", "total += found"),
        ("keep = keep & tl.expand_dims(i_k >= first_negative, 1 - AXIS)", "pass"),
        ("part = tl.where(b == c, 0.0, part / (blocks - 1))", "part = part / (blocks - 1)"),
    ],
    ("kernels/dense_gradient.py", DENSE_KERNELS): [
        ('other=float("inf"))', "other=0.0)"),
        (
            "q = tl.load(planes_ptr + (PULL + b) * lines",
            "q = tl.load(planes_ptr + (PULL + c) * lines",
        ),
        ("0.5 if matrix.symmetric else 1.0", "1.0"),
    ],
    ("kernels/similarity.py", TRITON): [
        ("anchor_s = (finite(anchor_s) - offset)", "anchor_s = (finite(anchor_s) + offset)"),
        ("v = weight_s * tl.exp2(low - anchor_s)", "v = weight_s"),
        ("g += tl.exp2(logits - anchor_s", "g -= tl.exp2(logits - anchor_s"),
        ("0.0, e * logits), 1) / scale", "0.0, e * logits), 1)"),
        ("tl.exp2(tl.minimum(top - row_max, SPAN))", "1.0"),
        ("tl.exp2(tl.minimum(top - column_max, SPAN))", "1.0"),
        ("if top - tl.minimum(low_r, low_s) < SPAN:", "if True:"),
        ("if high - low < SPAN:", "if True:"),
        ("u = weight_r * tl.exp2(low - anchor_r)", "u = weight_r"),
        ("(u[:, None] + v[None, :])", "(u[:, None] - v[None, :])"),
        ("tl.store(p_dot, dot / (scale * LOG2E))", "tl.store(p_dot, dot / scale)"),
    ],
    ("kernels/sigmoid.py", "tests/kernels/test_tilings.py -k over_their_range"): [
        ("p * e + 0.19111430644989014", "p * e - 0.19111430644989014"),
        ("0.005253457929939032 * e - 0.0", "0.005253457929939032 * e + 0.0"),
        ("(p * e + 1.0) * e", "(p * e + 1.0) * p"),
    ],
    ("kernels/sigmoid.py", SIGMOID): [
        ("slope = f * _reciprocal(1.0 + f, EMULATE)", "slope = f"),
        ("scale * LOG2E) + offset * LOG2E", "scale * LOG2E) - offset * LOG2E"),
        ("row_sum += tl.sum(_log1p(product), 1)", "row_sum -= tl.sum(_log1p(product), 1)"),
        ("tl.where(p < 1.0, p, mantissa - 1.0)", "mantissa - 1.0"),
        ("tl.join(dot * weight, total * weight)", "tl.join(dot, total * weight)"),
        ("dot += tl.sum(slope * parts[part], 1)", "dot += tl.sum(slope, 1)"),
        (
            "p_scalars = scalars_ptr + 2 * index\n        cos",
            "p_scalars = scalars_ptr\n        cos",
        ),
        ("slope * (weight * scale)[:, None]", "slope * weight[:, None]"),
    ],
    ("kernels/lean.py", LEAN): [
        ("tl.maximum(largest - BELOW_LARGEST, 0.0)", "largest - BELOW_LARGEST"),
        ("tl.where(span > LARGEST_SPAN", "tl.where(span < -1.0"),
        ("row_sum += tl.sum(of_rows, 1)", "row_sum = tl.sum(of_rows, 1)"),
        (
            "tl.store(dot_ptr + p_slot, tl.sum(dot, 0) / scale)",
            "tl.store(dot_ptr + p_slot, tl.sum(dot, 0))",
        ),
        ("        raised += tl.load(raised_ptr + tl.cdiv", "        tl.load(raised_ptr + tl.cdiv"),
    ],
    ("kernels/weigh.py", LEAN): [
        ("factor = factor + tl.load(v_ptr", "factor = tl.load(v_ptr"),
        ("tl.where(inside, e * factor, 0.0)", "e * factor"),
        ("tl.sum(total, 0) / tl.load(scale_ptr)", "tl.sum(total, 0)"),
        ("            total += tl.sum(g, 1)", "            total = tl.sum(g, 1)"),
    ],
    ("kernels/flags.py", LEAN): [
        ("(total >= tl.exp2(LEAST_SUM))", "(total > 0)"),
        ("(total < tl.exp2(LARGEST_SUM))", "(total == total)"),
        ("mask=mask & ok)\n    tl.store(run_sum", "mask=mask)\n    tl.store(run_sum"),
        ("largest = (top + anchor) * LN2 + offset", "largest = (top + anchor) * LN2"),
    ],
    (
        "kernels/launch.py",
        "tests/kernels/test_tilings.py -k only_where or against_float64 and info_nce",
    ): [
        ("x.data_ptr() % 16 == 0 and", "x.data_ptr() % 8 == 0 and"),
        ("x.stride(0) * x.itemsize % 16", "x.stride(0) % 2"),
        ("tma or x.shape[1] % tiling.width == 0", "tma or x.shape[1] % tiling.width >= 0"),
    ],
    ("kernels/attention.py", "tests/kernels/test_attention.py -k every_plan and short"): [
        ("return first + size * count > length", "return first + size * count > length + 1"),
    ],
    ("kernels/attention.py", "tests/kernels/test_attention.py -k nan_in"): [
        ("lse = tl.where(total == total, lse, total)", "lse = tl.where(total == total, lse, 0.0)"),
    ],
    ("kernels/attention.py", ATTENTION): [
        ("first_k = FIRST_K + n * KEYS", "first_k = FIRST_K"),
        ("inverse = tl.where(total == 0.0, 0.0, 1.0 / total)", "inverse = 1.0 / total"),
        ("keep = i_key <= i_query", "keep = i_key < i_query"),
        ("keep = keep & (i_key < limit)", "keep = keep & (i_key <= limit)"),
        ("total = total * shrink +", "total = total +"),
        ("top + tl.log2(total)", "top - tl.log2(total)"),
    ],
    ("kernels/attention_gradient.py", ATTENTION): [
        ("delta = tl.sum(p * dp, 1 - AXIS)", "delta = tl.sum(dp, 1 - AXIS)"),
        ("tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)", "tl.sum(out.to(tl.float32), 1)"),
        ("ds = p * (dp - tl.expand_dims(", "ds = p * (dp + tl.expand_dims("),
        (
            "limit,\n                scale, LENGTH_Q, KEY_TILES[g][0]",
            "limit,\n                1.0, LENGTH_Q, KEY_TILES[g][0]",
        ),
    ],
    ("kernels/tile.py", "tests/kernels/test_tilings.py -k corner or pass_the_end"): [
        ("(gap < BLOCK_R)", "(gap < BLOCK_R - 1)"),
        ("gap = first_s - first_r - diagonal", "gap = first_s - first_r + diagonal"),
        ("first = band * GROUP", "first = band"),
        ("(gap > -BLOCK_S)", "(gap > 1 - BLOCK_S)"),
        ("(first_r + BLOCK_R > rows)", "(first_r + BLOCK_R > rows + 1)"),
        ("(first_s + BLOCK_S > columns)", "(first_s + BLOCK_S > columns + 1)"),
    ],
    ("kernels/tile.py", TRITON): [
        ("(row_id[:, None] != column_id[None, :])", "(row_id[:, None] == column_id[None, :])"),
        ("m_d = o_d < width - d", "m_d = o_d <= width - d"),
    ],
    ("kernels/merge.py", TRITON): [
        ("run_sum = run_sum * keep +", "run_sum = run_sum +"),
        ("* LN2 + offset", "* LN2 - offset"),
        ("(own * LN2 - finite(top)) * LOG2E", "(own - finite(top)) * LOG2E"),
    ],
    ("kernels/finish.py", "tests/kernels/test_tilings.py -k any_width"): [
        ("total += tl.sum(", "total = tl.sum("),
        (
            "tl.store(out_ptr + i_r, total, mask=i_r < rows)",
            "tl.store(out_ptr + i_r, 2 * total, mask=i_r < rows)",
        ),
        ("partner.to(tl.float32)", "partner.to(tl.float32) * 2"),
        ("0 if partner is None else partner.stride(0)", "0"),
    ],
    ("kernels/finish.py", TRITON): [
        ("total += coefficient[:, None]", "total -= coefficient[:, None]"),
    ],
    ("fastclip/ops/reductions.py", CLIP): [
        ("return loss + 0 * logit_bias", "return loss + logit_bias"),
    ],
    ("fastclip/losses/clip.py", CLIP): [
        (
            "return logits_per_image + logit_bias, logits",
            "return logits_per_image - logit_bias, logits",
        ),
        ("if local_loss and (label_smoothing or not", "if local_loss and (label_smoothing and not"),
        ("labels + self._first_row(num", "labels - self._first_row(num"),
    ],
    ("fastclip/losses/clip.py", "tests/losses/test_distributed.py"): [
        (
            '{"reduction": "none"} if self.local_loss',
            '{"reduction": "none"} if not self.local_loss',
        ),
        ("self.world_size == 1 or self.local_loss", "self.world_size == 1 or not self.local_loss"),
        ("            **self._sharing(),\n", ""),
        (
            "            self._averaged(logit_scale, image_features),\n",
            "            logit_scale,\n",
        ),
        ("torch.arange(self.rank * n, (self.rank + 1) * n, dev", "torch.arange(n, dev"),
        ("if self.world_size == 1 or self.gather_with_grad:", "if self.world_size == 1:"),
        ("self.world_size > 1 and self.local_loss and not", "self.world_size > 1 and not"),
        ("return (one + other) / 2", "return one + other"),
        ("scale_gradient(f, 1 / self.world_size)", "scale_gradient(f, 1.0)"),
    ],
    ("fastclip/losses/clip.py", MODULES + " -k coca"): [
        ("        if self.clip_loss_weight:", "        if not self.clip_loss_weight:"),
        ("labels) * self.caption_loss_weight", "labels)"),
        ("ignore_index=pad_id)", "ignore_index=pad_id + 1)"),
    ],
    ("fastclip/losses/info_nce.py", MODULES): [
        ("is not None and self.training:", "is not None:"),
        ("1 / self.temperature", "self.temperature"),
        ("self.memory_bank is None and not in_batch", "self.memory_bank is None and in_batch"),
    ],
    ("fastclip/losses/memory_bank.py", MODULES): [
        ("if size < 1 or width < 1:", "if size < 0 or width < 1:"),
        ("(self.position + torch.arange(", "(self.position - torch.arange("),
        ("isinstance(size, int) or len(size)", "isinstance(size, str) or len(size)"),
        ("features.detach()[-size:]", "features.detach()[:size]"),
        ("(self.position + len(newest)) % size)", "(self.position + 1) % size)"),
    ],
    ("fastclip/losses/mp_nce.py", MODULES): [
        ("if num_domains < 1:", "if num_domains < 0:"),
        ("index[columns, rows] = torch.arange(pairs)", "index[columns, rows] = 0"),
        ("counts[min(p, q)][max(p, q)] += 1", "counts[p][q] += 1"),
        ("(-self.offset * scale)", "(self.offset * scale)"),
        ("clamp_(min=-math.log", "clamp_(max=-math.log"),
        ("total / (present * count)", "total / count"),
    ],
    ("fastclip/losses/non_contrastive.py", OTHERS): [
        ("correlation[index, start + index] - 1", "correlation[index, start + index] + 1"),
        ("gradient = off_diagonal * correlation", "gradient = correlation"),
        ("return loss * scale", "return loss"),
        ("own[here][1 - a] @", "own[here][a] @"),
        ("if iterations < 1:", "if iterations < 0:"),
        ("(ranks.rows if ranks else len(terms))", "len(terms)"),
        ("part.T @ b / rows", "part.T @ b / len(b)"),
        ("assignments(swapped / epsilon", "assignments(swapped * epsilon"),
        ("_mean(2 - 2 * cosines, ranks)", "_mean(2 - cosines, ranks)"),
        ("ctx.factor = 2 * scale * world / rows", "ctx.factor = 2 * scale / rows"),
        ("gradient[index, start + index] = diagonal", "gradient[index, start + index] = 0"),
        ("return total / 8", "return total / 4"),
        ("range(iterations - 1)", "range(iterations)"),
    ],
    ("fastclip/losses/siglip.py", "tests/losses/test_distributed.py"): [
        ("loss = total / mean_rows", "loss = total"),
    ],
    ("fastclip/losses/siglip.py", MODULES + " -k siglip"): [
        ("else logits + logit_bias", "else logits - logit_bias"),
        ("labels if negative_only else", "labels if not negative_only else"),
    ],
    ("fastclip/losses/sup_con.py", MODULES + " tests/ops/test_borders.py -k sup_con"): [
        ("labels.repeat_interleave(views)", "labels.repeat(views)"),
        ("torch.arange(samples, device", "torch.ones(samples, dtype=torch.long, device"),
        ('check_positive("temperature", temperature)', "pass"),
    ],
    ("fastclip/losses/clip.py", MODULES): [
        ("loss = self._mean_of_own(distill)", "loss = distill.sum() * 2"),
        ("clip = self.clip_loss_weight * contrastive", "clip = contrastive"),
    ],
    ("fastclip/losses/nt_xent.py", MODULES): [
        ("scale = 1 / self.temperature", "scale = self.temperature"),
        ("if out0.requires_grad:", "if True:"),
    ],
    ("fastclip/train/accumulate.py", ACCUMULATE): [
        ("    if last == 0:", "    if last <= 1:"),
        ("backward(value if scale_loss is None else scale_loss(value))", "backward(value)"),
        ("(value if scale_loss is None else scale_loss(value)).backward()", "value.backward()"),
        ("module.training or module.running_mean is None", "module.training"),
        ("len({shape[0] for shape in shapes.values()}) > 1", "False"),
        ("if outputs:\n", "if False:\n"),
        ("* last + [gradient]", "* last + [2 * gradient]"),
        ("with context(index == last):", "with context(index == 0):"),
        ("_set_random_state(states[index])", "_set_random_state(states[0])"),
        ("_set_random_state(end)", "_set_random_state(states[-1])"),
        ("promote_types(value.dtype, torch.float32)", "promote_types(value.dtype, value.dtype)"),
        ("if micro_batches > 1 and names:", "if micro_batches > 2 and names:"),
    ],
    ("fastclip/data/order.py", ORDER): [
        ("hash64(order.seed, epoch, window, 1)", "hash64(order.seed, epoch, 0, 1)"),
        ("hash64(order.seed, epoch, shard, 4)", "hash64(order.seed, epoch, shard, 3)"),
        ("np.rint(fraction * counts)", "np.ceil(fraction * counts)"),
        ("if any(count < 0 for", "if any(count <= 0 for"),
        ("all(0 < weight < math.inf", "all(0 <= weight < math.inf"),
        ("+ (stretch > 0)\n", "+ (stretch > 1)\n"),
        ("int(firsts[slot]) + offset - int", "offset - int"),
        ("if self.window < 0:", "if self.window < -1:"),
        ('side="right")) - 1', 'side="left")) - 1'),
        ("(fraction > 0) & (counts > 0)", "(fraction > 1) & (counts > 0)"),
        ("return shard, index % self.counts[shard]", "return shard, index"),
        ("hash64(order.seed, epoch, window, 1)", "hash64(order.seed, window, 1)"),
        ("if not 0 <= position < length:", "if not 0 <= position <= length:"),
    ],
    ("fastclip/models/checkpoint.py", CHECKPOINT): [
        ("os.fsync(file.fileno())", "pass"),
        (
            'path.stat().st_size != manifest.get("bytes")',
            'path.stat().st_size == manifest.get("x")',
        ),
        ('isinstance(content, dict) or "state_dict"', 'isinstance(content, dict) and "state_dict"'),
        ("not all(isinstance(v, Tensor)", "not any(isinstance(v, Tensor)"),
        ('name.removeprefix("module.")', "name"),
        ("if AVERAGE not in content:", "if AVERAGE in content:"),
        ("return content[AVERAGE]", 'return content["state_dict"]'),
        ("partial.unlink(missing_ok=True)\n", "pass\n"),
        ("path.name), reverse=True)", "path.name))"),
        ('describe(path)["sha256"] ==', 'describe(path)["sha256"] !='),
        ("elif not _is_whole(path):", "elif _is_whole(path):"),
        ("_MANIFEST_KEYS & read_object(beside)", "_MANIFEST_KEYS | read_object(beside)"),
        ("    require_whole(path)\n    try:", "    try:"),
        ("weights_only=True", "weights_only=False"),
        ("if key in content:", "if False:"),
    ],
    ("fastclip/models/checkpoint.py", "tests/models/test_checkpoint_fuzz.py"): [
        ("        require_sums(path)\n", "        pass\n"),
    ],
    ("fastclip/models/checkpoint.py", "tests/models/test_sharded.py"): [
        ("sharded.is_distributed(path) and not trust", "sharded.is_distributed(path) and trust"),
        ("{PARTIAL_SUFFIX, sharded.TEMPORARY_SUFFIX} &", "{PARTIAL_SUFFIX} &"),
        ("not path.is_dir() or sharded", "path.is_dir() and not sharded"),
    ],
}

MUTANTS = [
    Mutant(file, old, new, tests)
    for (file, tests), changes in (OPS | RUNS | _REST).items()
    for old, new in changes
]
