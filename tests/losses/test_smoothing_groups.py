"""Label smoothing with groups, against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastclip.functional import clip_loss


def _definition(x, y, scale, rows, columns, smoothing):
    n, m = len(x), len(y)
    S = scale * x @ y.T
    keep = (rows[:, None] != columns) | torch.eye(n, m, dtype=torch.bool)

    def direction(S, keep):
        loss = []
        for i in range(n):
            logs = S[i][keep[i]].log_softmax(0)
            own = S[i, i] - torch.logsumexp(S[i][keep[i]], 0)
            loss.append(-(1 - smoothing) * own - smoothing * logs.mean())
        return torch.stack(loss)

    return ((direction(S, keep) + direction(S[:, :n].T, keep[:, :n].T)) / 2).mean()


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("one", [True, False])
# the last row's group: of other columns, or of none
@pytest.mark.parametrize("last", [3, 77])
def test_smoothing_is_over_the_candidates_left(backend: str, one: bool, last: int) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if backend == "cpp" else torch.float64
    x, y = (F.normalize(torch.randn(k, 8), dim=1).to(dtype) for k in (7, 9))
    groups = torch.zeros(9, dtype=torch.long) if one else torch.tensor([3, 3, 1, 5, 3, 1, 8, 1, 9])
    got_leaves, want_leaves = (
        [t.to(kind, copy=True).requires_grad_() for t in (x, y, torch.tensor(20.0))]
        for kind in (dtype, torch.float64)
    )
    rows = groups[:7].clone()
    rows[6] = last
    got = clip_loss(
        *got_leaves, label_smoothing=0.2, row_group=rows, column_group=groups, backend=backend
    )
    want = _definition(*want_leaves, rows, groups, 0.2)
    assert got >= -1e-6
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    got.backward()
    want.backward()
    for a, b in zip(got_leaves, want_leaves, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("role", ["excluded", "positive"])
def test_a_scale_of_16_bits_is_taken_as_it_is(role: str) -> None:
    """0.9 times a scale, rounded to 8 bits, would be off by thousandths of the loss."""
    torch.manual_seed(1)
    x, y = (F.normalize(torch.randn(8, 6), dim=1) for _ in range(2))
    options = {"row_group": torch.arange(8) // 2, "column_group": torch.arange(8) // 2}
    options |= {"label_smoothing": 0.1, "group_role": role}
    narrow, wide = (
        clip_loss(x, y, torch.tensor(29.0, dtype=dtype), **options)
        for dtype in (torch.bfloat16, torch.float32)
    )
    torch.testing.assert_close(narrow, wide, rtol=1e-6, atol=1e-6)
