"""The list of seeded faults: one operator, bound, sign, guard or factor each."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old`, which occurs once in `file`, as `new`; `tests` must then fail."""

    file: str
    old: str
    new: str
    tests: str


_SIM = "tests/ops/test_similarity.py -k float64_equals_the_oracle or left_out or one_group"
_PRECISION = "tests/ops/test_precision.py -k float64_equals_the_oracle"
_MODULES = "tests/losses/test_modules.py"
_CLIP = "tests/losses/test_clip.py"
_OTHERS = "tests/losses/test_non_contrastive.py"
_RANKS = "tests/ops/test_distributed.py -k [3"
_CPP = "tests/ops/test_cpp.py -k pairwise"
_TRITON = (
    "tests/kernels/test_tilings.py tests/kernels/test_triton.py"
    " -k (against_float64 and not siglip) or span or ties"
)
_SIGMOID = (
    "tests/kernels/test_tilings.py tests/kernels/test_triton.py -k siglip and (against or ties)"
)
_ATTENTION = "tests/kernels/test_attention.py -k not same_bits and not ViT-L"
_ACCUMULATE = "tests/train/test_accumulate.py -k not two_ranks"
_ORDER = "tests/data/test_order.py tests/data/test_order_limits.py"
_CHECKPOINT = "tests/train/test_checkpoint.py"
_BORDERS = "tests/ops/test_borders.py"
_OPS_ATTENTION = (
    "tests/ops/test_attention.py tests/ops/test_borders.py -k packed_is or layouts or without_keys"
    " or differ or auto_is or autocast or products_and_flop or errors or widest or flash_is"
)

_BY_FILE: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("fastclip/ops/columns.py", "tests/ops/test_exchange_dtype.py"): [
        ("if compute_dtype == torch.float16 and not scaled:", "if False:"),
    ],
    ("fastclip/ops/columns.py", _RANKS): [
        ("owner = (self.rank - step) % self.world", "owner = (self.rank + step) % self.world"),
        ("self._gradient += block", "self._gradient = block"),
        ("self._gradient += self._under_way.wait()", "self._under_way.wait()"),
        ("merge_(*pairs.unbind(dim=1))", "merge_(*pairs.unbind(dim=1)[::-1])"),
    ],
    ("fastclip/ops/collectives.py", _RANKS): [
        ("return upstream * dist.get_world_size(", "return upstream / dist.get_world_size("),
        ("size * (columns // own)", "size * (columns // own + 1)"),
        ("[part[:size] for part, size", "[part[-size:] for part, size"),
    ],
    ("fastclip/ops/strip.py", _RANKS): [
        ("dscale_PP[p, q] += 0.5 * dscale", "dscale_PP[p, q] += dscale"),
        ("doffset_PP[p, q] += 0.5 * doffset", "doffset_PP[p, q] += doffset"),
        ("row_pair - column_pair,", "column_pair - row_pair,"),
    ],
    ("fastclip/ops/rectangle.py", _PRECISION): [
        ("dot_N[start:stop] = dot_C * share_C * weight_C", "dot_N[start:stop] = dot_C * share_C"),
        (
            "tiles.end_rows(share_C * weight_C * scale, G_CP)",
            "tiles.end_rows(share_C * weight_C, G_CP)",
        ),
        (
            "d_positive_N = -torch.sigmoid(lse_N - positive_N)",
            "d_positive_N = torch.sigmoid(lse_N - positive_N)",
        ),
        (
            "d_positive_N = -torch.sigmoid(-positive_N) * weight_N",
            "d_positive_N = -torch.sigmoid(positive_N) * weight_N",
        ),
        ("loss_N = softplus(-positive_N)", "loss_N = softplus(positive_N)"),
        ("loss_N[start:stop] += row_C", "loss_N[start:stop] = row_C"),
        ("dscale = dot_N.sum() + (d_positive_N * cosine_N).sum()", "dscale = dot_N.sum()"),
        ("sums]).sum() + d_positive_N.sum()", "sums]).sum() - d_positive_N.sum()"),
        ("alpha=1 / self.m)", "alpha=1 / self.n)"),
        (
            "weight_C = torch.sigmoid(lse_C - positive_N[start:stop])",
            "weight_C = torch.sigmoid(lse_C + positive_N[start:stop])",
        ),
    ],
    ("fastclip/ops/rectangle.py", _SIM): [
        ("positive_N = upstream.positive * scale", "positive_N = upstream.positive"),
        ("torch.stack(dscales).sum()", "torch.stack(dscales)[0]"),
        ("segment.column >= shape.paired", "segment.column > shape.paired"),
    ],
    ("fastclip/ops/tiles.py", _SIM): [
        ("merged = torch.maximum(self.max, maximum)", "merged = torch.minimum(self.max, maximum)"),
        ("torch.exp(self.max - anchor)", "torch.exp(anchor - self.max)"),
        ("torch.log(self.sum).add_(", "torch.log(self.sum).sub_("),
        ("G_CS.mul_((rows.weight * tile.scale)[:, None])", "G_CS.mul_(rows.weight[:, None])"),
        ("columns.weight * tile.scale)", "columns.weight)"),
        ("S_CS.diagonal(offset=tile.diagonal)", "S_CS.diagonal(offset=-tile.diagonal)"),
        ("tile.row_id_C[:, None] == tile", "tile.row_id_C[:, None] != tile"),
        ("/ scale / scale, total", "/ scale, total"),
    ],
    ("fastclip/ops/tiles.py", _PRECISION): [
        ("softplus(z_CS, out=room_CS).sum(dim=1)", "softplus(z_CS, out=room_CS).mean(dim=1)"),
        ("mul_((weight_C * tile.scale)[:, None])", "mul_(weight_C[:, None])"),
        ("line - offset", "line + offset"),
        ("maximum += tile.offset", "maximum -= tile.offset"),
        ("torch.add(S_CS, tile.offset, out=z_CS)", "torch.sub(S_CS, tile.offset, out=z_CS)"),
        ("sum(dim=1).div_(tile.scale)", "sum(dim=1)"),
        ("total_CD.addcmul_(coefficient_C", "total_CD.addcmul_(-coefficient_C"),
    ],
    ("fastclip/ops/tiles.py", _BORDERS + " -k chunks"): [
        ("size = -(-rows // count)", "size = rows // count"),
        ("return up if up <= most", "return up if up < most"),
        ("max(down, min(size, 128))", "max(down, 128)"),
    ],
    ("fastclip/ops/triangle.py", _PRECISION): [
        ("share = 0.5 if segment.square else 1.0", "share = 1.0"),
        (
            "yield _Segment(stop, own.stop, block, False, None)",
            "yield _Segment(stop, own.stop, block, False, 0)",
        ),
        ("other, False, start - own.start)", "other, False, own.start - start - 1)"),
        ("if stop < shape.rows:", "if stop + 1 < shape.rows:"),
        ("for c in range(b + 1, count)]", "for c in range(b, count)]"),
        ("shape.block(c if b == block else b)", "shape.block(b if b == block else c)"),
    ],
    ("fastclip/ops/symmetric.py", _PRECISION): [
        ("positive.mul_(triangle.couple_entries(scale, shape))", "positive.mul_(1)"),
        ("positive.add_(triangle.couple_entries(offset, shape))", "positive.add_(0)"),
        (
            "coefficient = d_positive * triangle.couple_entries(wide, shape)",
            "coefficient = d_positive",
        ),
        ("doffset[p, q] += d_positive[index].sum()", "doffset[p, q] -= d_positive[index].sum()"),
    ],
    ("fastclip/ops/labels.py", _PRECISION): [
        ("[(-2 * of_anchor[:, 0], features)]", "[(-1 * of_anchor[:, 0], features)]"),
        (
            "(d_positive_mean * positive_mean).sum() / table[0, 0]",
            "(d_positive_mean * positive_mean).sum()",
        ),
        ("dot.sub_(itself)", "dot.sub_(0)"),
    ],
    ("fastclip/ops/classes.py", _PRECISION): [
        ("self.others = last - first - 1", "self.others = last - first"),
        ("begins[1:] = ordered[1:] != ordered[:-1]", "begins[1:] = ordered[1:] > ordered[:-1] + 1"),
    ],
    ("fastclip/ops/candidates.py", "tests/losses/test_smoothing_groups.py"): [
        ("counts[found] * there", "counts[found]"),
    ],
    ("fastclip/ops/candidates.py", _RANKS + " and smoothed_grouped"): [
        ("1 - classes.others", "classes.others"),
        (
            "_outside_of_all(upstream, row_group, group_of_y,",
            "_outside_of_all(upstream, group_of_y, row_group,",
        ),
    ],
    ("fastclip/ops/distillation.py", _MODULES + " -k distillation"): [
        ("row, column = lse_N - mean_N", "row, column = lse_N + mean_N"),
        ("weighted.mul_(shrink)", "weighted.mul_(1)"),
        ("torch.exp(maximum - found)", "torch.exp(found - maximum)"),
        ("G_CN.mul_(d_row[rows, None])", "G_CN.mul_(d_row[:1, None])"),
        ("(dscale_N.sum() / walk.scale)", "(dscale_N.sum() * walk.scale)"),
        ("T_CN).mul_(self.teacher_scale)", "T_CN).mul_(self.scale)"),
    ],
    ("fastclip/ops/attention.py", _OPS_ATTENTION): [
        ("if t.stride(1) < t.stride(2):", "if t.stride(1) > t.stride(2):"),
        ("[t if t.stride(-1) == 1 else t.contiguous() for t in tensors]", "list(tensors)"),
        ("_count(q, k, 5 if plan.whole else 7)", "_count(q, k, 5)"),
        ("return query.shape[3] ** -0.5", "return query.shape[3] ** 0.5"),
        ('asked = backend != "auto" or os', "asked = os"),
        ("width, dtype, causal) in faster", "width, dtype, False) in faster"),
        ("if causal and query.shape[2] !=", "if query.shape[2] !="),
        ("if shape[2] > WIDEST:", "if shape[2] >= WIDEST:"),
        ("softmax_scale=scale, causal=causal)", "softmax_scale=scale)"),
        ("softmax_scale=scale, causal=causal)", "causal=causal)"),
    ],
    ("fastclip/ops/sigmoid.py", _PRECISION + " and siglip"): [
        ("return rows if per_row else rows.sum()", "return rows if per_row else rows.mean()"),
    ],
    ("fastclip/ops/sigmoid.py", "tests/ops/test_contracts.py tests/ops/test_borders.py -k flop"): [
        ("*args[6:9]) * (1 + bool(need_x)", "*args[6:9]) * (bool(need_x)"),
        ("*args[7:10]) * (1 + bool(need_x)", "*args[7:10]) * (bool(need_x)"),
    ],
    ("fastclip/ops/sigmoid.py", _BORDERS + " -k columns"): [
        ("if x.shape[0] != y.shape[0]:", "if x.shape[0] > y.shape[0]:"),
    ],
    ("fastclip/ops/sigmoid.py", _RANKS): [
        ("start = sum(ranks.sizes[: ranks.rank])", "start = sum(ranks.sizes[ranks.rank :])"),
    ],
    ("fastclip/ops/info_nce.py", _PRECISION + " and info_nce"): [
        ("found.row_lse - found.positive).sum()", "found.row_lse - found.positive).mean()"),
        (
            "first=first,\n            trainable=trainable,\n        )\n        loss",
            "first=0,\n            trainable=trainable,\n        )\n        loss",
        ),
    ],
    ("fastclip/ops/info_nce.py", _MODULES + " -k accuracy"): [
        ("found.positive.detach() - found.row_max", "found.positive.detach() + found.row_max"),
    ],
    ("fastclip/ops/info_nce.py", "tests/ops/test_contracts.py -k frozen"): [
        ("y.shape[0] if trainable is None else trainable,", "y.shape[0],"),
    ],
    ("fastclip/ops/similarity.py", _PRECISION + " and clip"): [
        ("y_mean).mul_(factor)", "y_mean)"),
        ("x_mean).mul_(factor)", "x_mean)"),
    ],
    ("fastclip/ops/similarity.py", _BORDERS + " -k ids or fewer"): [
        (
            "dtype = torch.promote_types(row_group.dtype, column_group.dtype)",
            "dtype = row_group.dtype",
        ),
        ("if positive_index is None and m < n:", "if m < n:"),
    ],
    ("fastclip/ops/similarity.py", _RANKS): [
        ("positive_index + first, rows", "positive_index, rows"),
        ("own = slice(start, start + n)", "own = slice(0, n)"),
    ],
    ("fastclip/ops/rectangle.py", _RANKS): [
        (
            "return type(lines)(*(line[part] for line in lines))",
            "return type(lines)(*(line[: len(line[part])] for line in lines))",
        ),
    ],
    ("fastclip/ops/rectangle.py", _BORDERS + " -k alone_or"): [
        ("coefficient_N * (shape.positive_index < shape.trained)", "coefficient_N"),
        (
            "start=segment.start + skip, column=segment.column + skip",
            "start=segment.start + skip, column=segment.column",
        ),
        ("last = min(shape.rows, shape.trained)", "last = shape.rows"),
    ],
    ("fastclip/ops/columns.py", _RANKS + " and clip"): [
        ("gradient[s.column : s.column + length]", "gradient[s.start : s.stop]"),
        ("if s.start < len(own)", "if s.start < 1"),
    ],
    ("fastclip/ops/collectives.py", "tests/losses/test_distributed.py"): [
        ("parts[rank] = features", "parts[0] = features"),
        ("        total += received", "        total -= received"),
        (
            "_global_sum(upstream, group) / dist.get_world_size",
            "_global_sum(upstream, group) * dist.get_world_size",
        ),
    ],
    ("fastclip/ops/collectives.py", "tests/ops/test_checks.py -k bytes"): [
        ("_received(total, 2 * (1 -", "_received(total, 1 * (1 -"),
        ("_received(out, 1 - 1 / len(sizes))", "_received(out, 1 / len(sizes))"),
        ("_received(everything, 1 - 1 / len(sizes))", "_received(everything, 1.0)"),
        ("tensor.numel() * tensor.element_size() * share", "tensor.numel() * share"),
    ],
    ("fastclip/ops/collectives.py", "tests/ops/test_checks.py -k share"): [
        ("min(shares) < 1", "min(shares) < 0"),
        ("len(shares) != world or shares[rank] != rows or", "len(shares) != world or"),
        ("        if columns % own:", "        if columns < own:"),
        ("if group is not None or sizes is not None:", "if sizes is not None:"),
        ("    if rank < 0:", "    if rank < -1:"),
    ],
    ("fastclip/ops/gemm.py", "tests/ops/test_contracts.py -k products or frozen"): [
        ("count.flop += 2 * rows", "count.flop += rows"),
        ("self.flop / (2 * rows", "self.flop / (1 * rows"),
    ],
    ("fastclip/ops/gemm.py", "tests/ops/test_cpp.py -k bf16_features or pairwise"): [
        ("if b.dtype != torch.bfloat16 or not (wide", "if b.dtype != torch.float16 or not (wide"),
        ("        *b.stride(),\n", "        *b.stride()[::-1],\n"),
    ],
    (
        "fastclip/ops/forward_gradient.py",
        "tests/ops/test_contracts.py -k products or frozen or kept or scale_before",
    ): [
        ("keeps is not None and not keeps()", "keeps is not None and keeps()"),
        ("enabled and t is not None and", "t is not None and"),
        ("torch.mul(gradient, upstream)", "torch.mul(gradient, upstream.abs())"),
    ],
    ("fastclip/ops/checks.py", "tests/ops/test_checks.py"): [
        ('if precision == "input" or features.dtype == torch.float64', 'if precision == "input"'),
        ("return upper + upper.triu(1).T", "return upper + upper.triu(0).T"),
        ("or value.shape[0] < domains", "or value.shape[0] > domains"),
        ("    if not value > 0:", "    if not value >= 0:"),
        ("if ids.dtype not in (torch.int32, torch.int64):", "if ids.is_floating_point():"),
        ("chunk_bytes < 1:", "chunk_bytes < 0:"),
        (
            "cast = compute_dtype != x.dtype or autocast_enabled(x.device)",
            "cast = compute_dtype != x.dtype",
        ),
        ("if x.dtype != y.dtype and (not cast or", "if x.dtype != y.dtype and (not cast and"),
    ],
    ("fastclip/ops/reference.py", _SIM): [
        ("(columns < first)", "(columns <= first)"),
    ],
    ("fastclip/ops/reference.py", _PRECISION): [
        ("* (z_MD[shape.block(b)] @ z_MD[", "* (z_MD[shape.block(c)] @ z_MD["),
        ("/ positives_M.clamp(min=1)", "/ positives_M.clamp(min=2)"),
        ("-torch.inf)\n    positives = [S_MM", "0.0)\n    positives = [S_MM"),
    ],
    ("fastclip/ops/tiles.py", "tests/ops/test_scalars.py -k no_scale or beyond"): [
        ("torch.finfo(dtype).tiny ** 0.25", "torch.finfo(dtype).tiny ** 0.75"),
        ("return 2 / torch.finfo(dtype).eps", "return 1e9 / torch.finfo(dtype).eps"),
        ("scale.abs() < least", "scale.abs() < 0"),
    ],
    ("fastclip/ops/tiles.py", "tests/ops/test_scalars.py -k negative"): [
        ("torch.where(scale.abs() < least", "torch.where(scale < least"),
    ],
    ("fastclip/ops/tiles.py", "tests/ops/test_similarity.py -k chunks_are_even"): [
        ("1 if chunk_bytes else MINIMUM", "2 if chunk_bytes else MINIMUM"),
    ],
    ("fastclip/ops/symmetric.py", "tests/ops/test_contracts.py -k flop_counter"): [
        ("// (1 if way else 2)", "// (2 if way else 1)"),
        ("* (2 if way else 3)", "* (3 if way else 2)"),
    ],
    ("fastclip/ops/similarity.py", "tests/ops/test_contracts.py -k flop_counter"): [
        ("need_x, need_y = args[18], args[19]", "need_x, need_y = False, args[19]"),
        ("return 2 * x_shape[0] * columns", "return x_shape[0] * columns"),
    ],
    ("fastclip/ops/info_nce.py", "tests/ops/test_contracts.py -k flop_counter"): [
        ("* (1 + bool(need_x) + bool(need_y))", "* (1 + bool(need_x))"),
    ],
    ("fastclip/ops/backend.py", "tests/ops/test_similarity.py -k environment or told"): [
        ("wanted in elsewhere - {", "wanted in elsewhere | {"),
        ("        if implementation.name == wanted:", "        if implementation.name != wanted:"),
    ],
    ("fastclip/ops/cpp_tiles.py", _CPP): [
        ("tile.diagonal - start", "tile.diagonal + start"),
        ("else column_id[start:stop]", "else column_id[: stop - start]"),
    ],
    ("kernels/merge.py", "tests/kernels/test_tilings.py -k merged"): [
        ("run_dot = run_dot * keep +", "run_dot = run_dot +"),
        ("        p += BLOCK_T * lines", "        p += lines"),
        ("(o_t < tiles - start)", "(o_t <= tiles - start)"),
    ],
    ("kernels/attention_plans.py", "tests/kernels/test_attention.py -k tiles_cover"): [
        ("rest <= size // 2)", "rest < size // 2)"),
        ("max(rest // size, 1)", "max(rest // size, 2)"),
    ],
    ("kernels/similarity.py", _TRITON): [
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
    ("kernels/sigmoid.py", _SIGMOID): [
        ("/ (1.0 + e) * weight", "/ (1.0 - e) * weight"),
        ("tl.maximum(z, 0.0) + _log1p(e)", "tl.maximum(z, 0.0) - _log1p(e)"),
        ("tl.where(z >= 0.0, 1.0, e)", "tl.where(z < 0.0, 1.0, e)"),
        ("z = logits + offset", "z = logits - offset"),
        ("tl.store(p_dot, dot / scale)", "tl.store(p_dot, dot)"),
        ("tl.store(p_sum, tl.sum(tl.sum(g, 1), 0))", "tl.store(p_sum, dot)"),
        ("tl.exp2(-tl.abs(z) * LOG2E)", "tl.exp2(-tl.abs(z))"),
        ("tile_s * PARTS + part,", "tile_s + part,"),
        ("tl.program_id(0) * PARTS + part", "tl.program_id(0) + part"),
        ("rounded(g * scale, p_g, EMULATE)", "rounded(g, p_g, EMULATE)"),
    ],
    (
        "kernels/launch.py",
        "tests/kernels/test_tilings.py -k only_where or against_float64 and info_nce",
    ): [
        ("t.data_ptr() % 16 or", "t.data_ptr() % 8 or"),
        ("t.stride(0) * t.itemsize % 16", "t.stride(0) % 2"),
        ("tma or x.shape[1] % tiling.width == 0", "tma or x.shape[1] % tiling.width >= 0"),
    ],
    ("kernels/attention.py", "tests/kernels/test_attention.py -k every_plan and short"): [
        ("return first + size * count > length", "return first + size * count > length + 1"),
    ],
    ("kernels/attention.py", "tests/kernels/test_attention.py -k nan_in"): [
        ("lse = tl.where(total == total, lse, total)", "lse = tl.where(total == total, lse, 0.0)"),
    ],
    ("kernels/attention.py", _ATTENTION): [
        ("first_k = FIRST_K + n * KEYS", "first_k = FIRST_K"),
        ("inverse = tl.where(total == 0.0, 0.0, 1.0 / total)", "inverse = 1.0 / total"),
        ("keep = i_key <= i_query", "keep = i_key < i_query"),
        ("keep = keep & (i_key < limit)", "keep = keep & (i_key <= limit)"),
        ("total = total * shrink +", "total = total +"),
        ("top + tl.log2(total)", "top - tl.log2(total)"),
    ],
    ("kernels/attention_gradient.py", _ATTENTION): [
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
    ("kernels/tile.py", _TRITON): [
        ("(row_id[:, None] != column_id[None, :])", "(row_id[:, None] == column_id[None, :])"),
        ("m_d = o_d < width - d", "m_d = o_d <= width - d"),
    ],
    ("kernels/merge.py", _TRITON): [
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
    ("kernels/finish.py", _TRITON): [
        ("total += coefficient[:, None]", "total -= coefficient[:, None]"),
    ],
    ("fastclip/losses/clip.py", _CLIP): [
        (
            "return logits_per_image + logit_bias, logits",
            "return logits_per_image - logit_bias, logits",
        ),
        ("loss = loss + 0 * logit_bias.sum()", "loss = loss + logit_bias.sum()"),
        ("if local_loss and (label_smoothing or not", "if local_loss and (label_smoothing and not"),
        ("labels + num_logits * self.rank", "labels - num_logits * self.rank"),
    ],
    ("fastclip/losses/clip.py", "tests/losses/test_distributed.py"): [
        ("distill[self.rank * n : (self.rank + 1) * n]", "distill[:n]"),
        (
            "if self.local_loss:\n                    opt",
            "if not self.local_loss:\n                    opt",
        ),
        ("torch.arange(self.rank * n, (self.rank + 1) * n, dev", "torch.arange(n, dev"),
        ("if self.world_size == 1 or self.gather_with_grad:", "if self.world_size == 1:"),
        ("self.world_size > 1 and self.local_loss and not", "self.world_size > 1 and not"),
        ("return (one + other) / 2", "return one + other"),
        ("scale_gradient(f, 1 / self.world_size)", "scale_gradient(f, 1.0)"),
    ],
    ("fastclip/losses/clip.py", _MODULES + " -k coca"): [
        ("        if self.clip_loss_weight:", "        if not self.clip_loss_weight:"),
        ("labels) * self.caption_loss_weight", "labels)"),
        ("ignore_index=pad_id)", "ignore_index=pad_id + 1)"),
    ],
    ("fastclip/losses/info_nce.py", _MODULES): [
        ("is not None and self.training:", "is not None:"),
        ("1 / self.temperature", "self.temperature"),
        ("self.memory_bank is None and not in_batch", "self.memory_bank is None and in_batch"),
    ],
    ("fastclip/losses/memory_bank.py", _MODULES): [
        ("if size < 1 or width < 1:", "if size < 0 or width < 1:"),
        ("(self.position + torch.arange(", "(self.position - torch.arange("),
        ("isinstance(size, int) or len(size)", "isinstance(size, str) or len(size)"),
        ("features.detach()[-size:]", "features.detach()[:size]"),
        ("(self.position + len(newest)) % size)", "(self.position + 1) % size)"),
    ],
    ("fastclip/losses/mp_nce.py", _MODULES): [
        ("if num_domains < 1:", "if num_domains < 0:"),
        ("index[columns, rows] = torch.arange(pairs)", "index[columns, rows] = 0"),
        ("counts[min(p, q)][max(p, q)] += 1", "counts[p][q] += 1"),
        ("(-self.offset * scale)", "(self.offset * scale)"),
        ("clamp_(min=-math.log", "clamp_(max=-math.log"),
        ("total / (present * count)", "total / count"),
    ],
    ("fastclip/losses/non_contrastive.py", _OTHERS): [
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
        ("loss = total / n", "loss = total"),
    ],
    ("fastclip/losses/siglip.py", _MODULES + " -k siglip"): [
        ("else logits + logit_bias", "else logits - logit_bias"),
        ("labels if negative_only else", "labels if not negative_only else"),
    ],
    ("fastclip/losses/sup_con.py", _MODULES + " tests/ops/test_borders.py -k sup_con"): [
        ("labels.repeat_interleave(views)", "labels.repeat(views)"),
        ("torch.arange(samples, device", "torch.ones(samples, dtype=torch.long, device"),
        ('check_positive("temperature", temperature)', "pass"),
    ],
    ("fastclip/losses/clip.py", _MODULES): [
        ("distill = (row + column) / 2", "distill = row + column"),
        ("clip = self.clip_loss_weight * contrastive", "clip = contrastive"),
    ],
    ("fastclip/losses/nt_xent.py", _MODULES): [
        ("scale = 1 / self.temperature", "scale = self.temperature"),
        ("if out0.requires_grad:", "if True:"),
    ],
    ("fastclip/train/accumulate.py", _ACCUMULATE): [
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
    ("fastclip/data/order.py", _ORDER): [
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
    ("fastclip/models/checkpoint.py", _CHECKPOINT): [
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
        ("sorted(found, reverse=True)", "sorted(found)"),
        ('describe(path)["sha256"] ==', 'describe(path)["sha256"] !='),
        ("elif not _is_whole(path):", "elif _is_whole(path):"),
        ("_MANIFEST_KEYS & read_object(beside)", "_MANIFEST_KEYS | read_object(beside)"),
        ("    require_whole(path)\n    try:", "    try:"),
        ("weights_only=True", "weights_only=False"),
        ('if "zero" in content:', "if False:"),
    ],
    ("fastclip/models/checkpoint.py", "tests/models/test_checkpoint_fuzz.py"): [
        ("        require_sums(path)\n", "        pass\n"),
    ],
    ("fastclip/models/checkpoint.py", "tests/models/test_sharded.py"): [
        ("sharded.is_sharded(path) and not trust", "sharded.is_sharded(path) and trust"),
        ("{PARTIAL_SUFFIX, sharded.TEMPORARY_SUFFIX} &", "{PARTIAL_SUFFIX} &"),
        ("not path.is_dir() or sharded", "path.is_dir() and not sharded"),
    ],
}

MUTANTS = [
    Mutant(file, old, new, tests)
    for (file, tests), changes in _BY_FILE.items()
    for old, new in changes
]
