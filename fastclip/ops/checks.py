"""What every operator asks of its inputs, and how it reads autocast."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from fastclip.ops.gemm import accumulator_dtype

GROUP_ROLES = ("excluded", "positive")
GroupRole = Literal["excluded", "positive"]


def compute_dtype_of(features: Tensor, precision: str) -> torch.dtype:
    """The dtype that features are rounded to: autocast's where it is on, else their own."""
    if precision not in ("auto", "input"):
        raise ValueError(f"precision is {precision!r}; use 'auto' or 'input'")
    # autocast itself leaves float64 alone
    if precision == "input" or features.dtype == torch.float64:
        return features.dtype
    if autocast_enabled(features.device):
        return torch.get_autocast_dtype(features.device.type)
    return features.dtype


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on; meta tensors, which have shapes alone, know none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, where the device has it."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def as_scalar(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """A number or one-element tensor as a tensor on the features' device."""
    if not isinstance(value, Tensor):
        check_number(name, value)
        # filled on the device: a copy from the host would wait
        return torch.full((), value, dtype=accumulator_dtype(like.dtype), device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; give a 0-d or (1,) tensor")
    return on_device(name, value, like)


def as_table(name: str, value: Tensor | float, domains: int, like: Tensor) -> Tensor:
    """A (P, P) table, its entry (a, b) read with a <= b, made symmetric; a number fills it."""
    if not isinstance(value, Tensor):
        check_number(name, value)
        return torch.full(
            (domains, domains), value, dtype=accumulator_dtype(like.dtype), device=like.device
        )
    if value.numel() == 1:
        value = widened(on_device(name, value, like), like)
        return value.reshape(1, 1).expand(domains, domains)
    if value.ndim != 2 or value.shape[0] != value.shape[1] or value.shape[0] < domains:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; give a number or (P, P) for P = {domains} "
            "domains"
        )
    upper = widened(on_device(name, value, like), like).triu()
    return upper + upper.triu(1).T


def widened(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the accumulator's dtype at least: its gradient is then summed in it.

    In 16 bits the sum over all pairs would be lost, and a rounding in float32 shows in float64.
    """
    return value.to(torch.promote_types(value.dtype, accumulator_dtype(like.dtype)))


def on_device(name: str, value: Tensor, like: Tensor) -> Tensor:
    """`value` where the features are; as in torch's arithmetic a 0-d CPU tensor goes anywhere."""
    if type(value).__name__ == "DTensor":
        raise ValueError(
            f"{name} is a DTensor; read it inside the model's forward, where FSDP has it whole, "
            "and return it with the features"
        )
    if value.device.type == "cpu" and value.ndim == 0:
        if like.device.type == "cuda" and not value.requires_grad and is_readable(value):
            # a copy from the host would wait for the GPU
            return torch.full((), value.item(), dtype=value.dtype, device=like.device)
        return value.to(like.device)
    if value.device != like.device:
        raise ValueError(
            f"{name} is on {value.device} but the features are on {like.device}; move one of them"
        )
    return value


def check_number(name: str, value: object) -> None:
    """Refuse None, a string, a list or a tuple, where a number or a tensor belongs."""
    if value is None or isinstance(value, (str, list, tuple)):
        raise ValueError(f"{name} is {value!r}; give a number or a tensor")


def check_positive(name: str, value: float) -> None:
    """A number above zero."""
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} is {value}; give a positive number")


def check_tensor(name: str, value: object) -> None:
    """A tensor, where lists and numbers will not do."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: {type(value).__name__}; give a tensor")


def is_readable(value: Tensor) -> bool:
    """Whether a number may be read from a tensor without waiting for a device or in a trace."""
    if torch.compiler.is_compiling() or value.device.type != "cpu":
        return False
    return type(value) in (Tensor, torch.nn.Parameter) and not _is_transformed(value)


def _is_transformed(value: Tensor) -> bool:
    """Whether a transform of torch.func is at work on a tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


def _is_differentiated(value: Tensor) -> bool:
    """Whether torch.func differentiates by a tensor, under any number of its transforms."""
    while _is_transformed(value):
        if torch._C._functorch.is_gradtrackingtensor(value):
            return True
        value = torch._C._functorch.get_unwrapped(value)
    return False


def check_features(name: str, features: Tensor) -> None:
    """(rows, width), floating point, neither empty nor a DTensor, nor sparse."""
    if not isinstance(features, Tensor):
        raise ValueError(f"the {name} are a {type(features).__name__}; give a tensor")
    if type(features).__name__ == "DTensor":
        raise ValueError(f"the {name} are a DTensor; pass its local part (.to_local())")
    if features.ndim != 2:
        raise ValueError(f"the {name} have shape {tuple(features.shape)}; give (rows, width)")
    if features.layout != torch.strided:
        raise ValueError(f"the {name} are sparse; give dense ones (.to_dense())")
    if not features.is_floating_point():
        raise ValueError(f"the {name} are {features.dtype}; give floating point")
    if 0 in features.shape:
        raise ValueError(
            f"the {name} have shape {tuple(features.shape)}; at least one row and one column are "
            "needed"
        )


def check_alike(x: Tensor, y: Tensor, precision: str) -> None:
    """One device, one width and, unless autocast casts both, one dtype."""
    if x.device != y.device:
        raise ValueError(f"the features are on {x.device} and {y.device}; move them to one device")
    # under autocast the towers may end in different dtypes, and both are cast to its own
    cast = precision == "auto" and autocast_enabled(x.device)
    if x.dtype != y.dtype and (not cast or torch.float64 in (x.dtype, y.dtype)):
        raise ValueError(f"the features are {x.dtype} and {y.dtype}; cast them to one dtype")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"the features are {x.shape[1]} and {y.shape[1]} wide; both sides need one width"
        )


def check_ids(name: str, ids: Tensor, rows: int, device: torch.device) -> None:
    """(rows,) integer ids on the features' device."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name} is a {type(ids).__name__}; give a tensor of one id per row")
    if ids.shape != (rows,):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; one id per row, ({rows},)")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {ids.dtype}; give int32 or int64 ids")
    if ids.device != device:
        raise ValueError(f"{name} is on {ids.device}, the features on {device}")


def outside(index: Tensor, count: int) -> int | None:
    """A value that is not in [0, count), if there is one and it can be read without waiting."""
    if not index.numel() or not is_readable(index):
        return None
    least, most = (int(end) for end in index.aminmax())
    if least < 0:
        return least
    return most if most >= count else None


def check_index(name: str, index: Tensor, columns: int) -> None:
    """Refuse numbers of columns that there are not, where they can be read without waiting."""
    wrong = outside(index, columns)
    if wrong is not None:
        raise ValueError(
            f"{name} has {wrong}; give one of 0 to {columns - 1} for each row, and leave out rows "
            "without a positive"
        )


def check_group_role(role: str) -> None:
    """Groups have a role that the losses know.

    Raises:
        ValueError: another one.
    """
    if role not in GROUP_ROLES:
        raise ValueError(f"group_role is {role!r}; use one of {', '.join(GROUP_ROLES)}")


def check_groups(
    role: str, ids: dict[str, tuple[Tensor | None, int]], features: Tensor, refused: str = ""
) -> bool:
    """Groups that fit the features, all or none; whether they are positives.

    Args:
        role: the `group_role` of a loss.
        ids: by their names, each with the number of its rows.
        features: whose device they are on.
        refused: why the loss has no groups of positives, if so.

    Raises:
        ValueError: as above, or the loss has no such role.
    """
    check_group_role(role)
    if role == "positive" and refused:
        raise ValueError(f"group_role is 'positive'; use 'excluded': {refused}")
    given = {name: group for name, (group, _) in ids.items() if group is not None}
    if given and len(given) < len(ids):
        raise ValueError(f"give both {' and '.join(ids)}, or neither")
    if not given and role == "positive":
        raise ValueError(
            f"group_role is 'positive', but there are no groups; give {', '.join(ids)}"
        )
    for name, group in given.items():
        check_ids(name, group, ids[name][1], features.device)
    return bool(given) and role == "positive"


def anchor_weights(weights: Tensor | None, features: Tensor, blocks: int = 1) -> Tensor | None:
    """Weights of anchors, one a row of each of so many blocks of features, in the losses' dtype.

    A negative one is refused; on a GPU, which is not waited for, it is NaN.

    Raises:
        ValueError: their number, dtype or device does not fit, or one is negative.
    """
    if weights is None:
        return None
    check_tensor("weights", weights)
    anchors = blocks * features.shape[0]
    if weights.shape != (anchors,):
        raise ValueError(f"weights have shape {tuple(weights.shape)}; one an anchor, ({anchors},)")
    if not weights.is_floating_point():
        raise ValueError(f"weights are {weights.dtype}; give floating point")
    if weights.device != features.device:
        raise ValueError(f"weights are on {weights.device}, the features on {features.device}")
    if is_readable(weights) and (weights < 0).any():
        raise ValueError(f"the least of the weights is {weights.min().item()}; give none below 0")
    wide = weights.to(accumulator_dtype(features.dtype))
    # a device is not waited for
    return wide if is_readable(weights) else torch.where(wide >= 0, wide, torch.nan)


def check_biases(
    x: Tensor,
    y: Tensor,
    column_statistics: bool,
    row_bias: Tensor | None,
    column_bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Biases of rows and columns that fit the features; returned as they are."""
    for name, bias, side in (("row_bias", row_bias, x), ("column_bias", column_bias, y)):
        if bias is None:
            continue
        check_tensor(name, bias)
        rows = side.shape[0]
        if bias.shape != (rows,):
            raise ValueError(f"{name} has shape {tuple(bias.shape)}; one a row, ({rows},)")
        if not bias.is_floating_point():
            raise ValueError(f"{name} is {bias.dtype}; give floating point")
        if bias.device != side.device:
            raise ValueError(f"{name} is on {bias.device}, the features on {side.device}")
    if row_bias is not None and not column_statistics:
        raise ValueError("row_bias is added among the rows of a column; ask for column_statistics")
    return row_bias, column_bias


def chunk_argument(chunk_bytes: int | None) -> int:
    """`chunk_bytes` as the operators take it: 0 for the default."""
    if isinstance(chunk_bytes, float) or (chunk_bytes is not None and chunk_bytes < 1):
        raise ValueError(
            f"chunk_bytes is {chunk_bytes}; give a whole, positive number of bytes or None"
        )
    return chunk_bytes or 0


def check_keep_bytes(keep_bytes: int | None) -> None:
    """Refuse a budget that is negative or not whole."""
    if isinstance(keep_bytes, float) or (keep_bytes is not None and keep_bytes < 0):
        raise ValueError(
            f"keep_bytes is {keep_bytes}; give a whole number of bytes, 0 to keep nothing, or None"
        )


def refuse_transforms(*inputs: Tensor) -> None:
    """Raise under forward-mode AD and torch.func's gradients.

    A custom op would silently give a zero tangent, or fail without saying why.
    """
    if torch.compiler.is_compiling():
        return
    for value in inputs:
        if torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                "fastclip's fused operators have no forward-mode derivative; "
                "use backend='reference' for it"
            )
        if _is_differentiated(value):
            raise RuntimeError(
                "fastclip's fused operators are not for torch.func's grad, vjp and jacobians; use "
                "backend='reference' with these, or torch.autograd"
            )


def check_pair(x: Tensor, y: Tensor, precision: str) -> None:
    """Both sides' features, for every operator with two."""
    check_features("first features", x)
    check_features("second features", y)
    check_alike(x, y, precision)


def check_positives(
    x: Tensor,
    y: Tensor,
    column_statistics: bool,
    positive_index: Tensor | None,
    row_group: Tensor | None,
    column_group: Tensor | None,
    first_negative: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Positives and groups that fit the features; returned as the operators take them."""
    n, m = x.shape[0], y.shape[0]
    if positive_index is None and m < n:
        raise ValueError(
            f"{n} rows but only {m} columns; row i needs column i as its positive, further "
            "columns are hard negatives"
        )
    if not 0 <= first_negative <= m:
        raise ValueError(f"negatives begin at column {first_negative} of {m}")
    if first_negative and column_statistics:
        raise ValueError("first_negative is for rows alone: no column_statistics")
    if positive_index is not None:
        if column_statistics or row_group is not None or column_group is not None:
            raise ValueError("positive_index is for rows alone: no column_statistics, no groups")
        check_ids("positive_index", positive_index, n, x.device)
        check_index("positive_index", positive_index, m)
        positive_index = positive_index.contiguous().long()
    if (row_group is None) != (column_group is None):
        raise ValueError("give both row_group and column_group, or neither")
    if row_group is None or column_group is None:
        return positive_index, None, None
    check_ids("row_group", row_group, n, x.device)
    check_ids("column_group", column_group, m, x.device)
    dtype = torch.promote_types(row_group.dtype, column_group.dtype)
    return positive_index, row_group.to(dtype).contiguous(), column_group.to(dtype).contiguous()


def check_blocks(features: list[Tensor], domains: list[int]) -> None:
    """Refuse blocks of different shapes, devices or dtypes, or without a domain each."""
    if len(features) != len(domains):
        raise ValueError(f"{len(features)} blocks but {len(domains)} domains; give one a block")
    if len(features) < 2:
        raise ValueError(f"{len(features)} block; an anchor's positives are in other blocks")
    if min(domains) < 0:
        raise ValueError(f"domains are {domains}; number them from 0")
    for index, block in enumerate(features):
        check_features(f"features of block {index}", block)
        if block.shape != features[0].shape or block.device != features[0].device:
            raise ValueError(
                f"block {index} is {tuple(block.shape)} on {block.device}, block 0 "
                f"{tuple(features[0].shape)} on {features[0].device}; all blocks need one shape "
                "and device"
            )
    if len({block.dtype for block in features}) > 1:
        autocast = autocast_enabled(features[0].device)
        if not autocast or any(block.dtype == torch.float64 for block in features):
            kinds = sorted({str(block.dtype) for block in features})
            raise ValueError(f"the blocks are {' and '.join(kinds)}; cast them to one dtype")


def inverse(temperature: Tensor | float, features: Tensor) -> Tensor | float:
    """1 / temperature, as wide as the features; of one that is not positive an error, or NaN."""
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        return 1 / temperature
    if temperature.numel() != 1:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)}; give a 0-d or (1,) tensor"
        )
    temperature = on_device("temperature", temperature, features)
    # 16 bits would round the inverse, and its gradient, -1/T^2, would overflow in them
    wide = widened(temperature, features)
    if is_readable(temperature):
        if temperature.item() <= 0:
            raise ValueError(f"temperature is {temperature.item()}; give a positive number")
        return 1 / wide
    # a device is not waited for: the loss is NaN
    return 1 / torch.where(wide > 0, wide, torch.nan)


def checked_sizes(sizes: Sequence[int] | None, world_size: int) -> tuple[int, ...] | None:
    """One number of rows a process, or None."""
    if sizes is None:
        return None
    if len(sizes) != world_size or min(sizes) < 1:
        raise ValueError(
            f"sizes are {tuple(sizes)} with world_size={world_size}; give every process's rows, "
            "each at least 1"
        )
    return tuple(sizes)
