"""Modules against the libraries whose places they take, and the identities between losses."""

import inspect

import lightly.loss
import open_clip
import pytest
import pytorch_metric_learning.losses as pml
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip.functional import info_nce_loss, mp_nce_loss, nt_xent_loss, sup_con_loss
from fastclip.losses.mp_nce import balanced_pair_weight
from fastclip.ops.distillation import distillation
from tests.ops.cases import unit, views


def with_gradients(loss_function, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    losses = loss_function(*leaves)
    losses = losses if isinstance(losses, tuple) else (losses,)
    loss = sum((i + 1) * value for i, value in enumerate(losses))
    return [*(value.detach() for value in losses), *torch.autograd.grad(loss, leaves)]


def assert_equal(got: list[Tensor], want: list[Tensor], bound: float = 1e-12) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).norm() <= bound * max(theirs.norm().item(), 1.0)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("name", ["SigLipLoss", "CoCaLoss", "DistillClipLoss"])
def test_signatures_are_open_clips(name: str) -> None:
    for method in ("__init__", "forward", "get_logits", "get_ground_truth"):
        theirs = inspect.signature(getattr(getattr(open_clip.loss, name), method)).parameters
        ours = inspect.signature(getattr(getattr(fastclip, name), method)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert [p.default for p in ours.values()][: len(theirs)] == [
            p.default for p in theirs.values()
        ]


@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (1.0, 0.5), (60.0, -20.0)])
@pytest.mark.parametrize("n", [1, 2, 65])
def test_siglip_is_open_clips(n: int, scale: float, bias: float) -> None:
    inputs = (*views(2, n, 24, n, 0.3), scalar(scale), scalar(bias))
    ours, theirs = fastclip.SigLipLoss(), open_clip.loss.SigLipLoss()
    assert_equal(with_gradients(ours, *inputs), with_gradients(theirs, *inputs))
    x, y, s, b = inputs
    assert torch.equal(ours(x, y, s, b, output_dict=True)["contrastive_loss"], ours(*inputs))
    assert_equal([ours.get_logits(*inputs)], [theirs.get_logits(*inputs)])
    for negative_only in (False, True):
        arguments = (x.device, x.dtype, n, negative_only)
        assert torch.equal(ours.get_ground_truth(*arguments), theirs.get_ground_truth(*arguments))
    assert_equal(
        with_gradients(lambda x, y, s: ours(x, y, s, None), x, y, s),
        with_gradients(lambda x, y, s: theirs(x, y, s, None), x, y, s),
    )


def test_siglip_refuses_an_unknown_exchange() -> None:
    with pytest.raises(ValueError, match="dist_impl is 'ring'"):
        fastclip.SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="chunk_size is -1"):
        fastclip.SigLipLoss(chunk_size=-1)
    assert fastclip.SigLipLoss(False, 0, 1, None, 512).chunk_size == 512
    assert fastclip.SigLipLoss().dist_impl == "gather"


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_coca_is_open_clips(weight: float) -> None:
    x, y = views(2, 6, 8, 1, 0.3)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 11, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 11, (6, 5), generator=generator)
    ours = fastclip.CoCaLoss(2.0, weight, pad_id=3)
    theirs = open_clip.CoCaLoss(2.0, weight, pad_id=3)
    arguments = (x, y, logits, labels, scalar(9.0))
    for got, want in zip(ours(*arguments), theirs(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got = ours(*arguments, output_dict=True)
    assert set(got) == set(theirs(*arguments, output_dict=True))


@pytest.mark.parametrize("chunk_bytes", [None, 8 * 9 * 4, 1])
@pytest.mark.parametrize("n", [1, 9])
def test_distillation_is_open_clips(n: int, chunk_bytes: int | None) -> None:
    x, y = views(2, n, 8, 1, 0.3)
    teacher = (*views(2, n, 5, 11, 0.5), scalar(20.0))
    results = [
        with_gradients(lambda x, y, s, loss=loss: loss(x, y, s, *teacher), x, y, scalar(8.0))
        for loss in (
            fastclip.DistillClipLoss(chunk_bytes=chunk_bytes),
            open_clip.loss.DistillClipLoss(),
            fastclip.DistillClipLoss(backend="reference"),
        )
    ]
    assert_equal(results[0], results[1])
    assert_equal(results[2], results[1])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_distillation_gradcheck(n: int, backend: str) -> None:
    teacher = (*views(2, n, 4, 11, 0.5), scalar(6.0))

    def run(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        options = {"backend": backend, "chunk_bytes": 8 * n * 2}
        return distillation(x, y, scale, *teacher, **options)

    student = [t.clone().requires_grad_() for t in (*views(2, n, 3, 1, 0.3), scalar(4.0))]
    assert torch.autograd.gradcheck(run, student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_distillation_under_autocast_loses_only_float32s_rounding(
    scale: float, dtype: torch.dtype
) -> None:
    """Against float64 of the features as bf16 holds them, the teacher's too."""
    student = [t.to(dtype) for t in views(2, 200, 32, 1, 0.3)]
    teacher = [t.to(dtype) for t in views(2, 200, 24, 11, 0.5)]

    def run(x: Tensor, y: Tensor, u: Tensor, v: Tensor, backend: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        row, column = distillation(*leaves, scale, u, v, 30.0, backend=backend)
        loss = (row + column).mean()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    rounded = [t.bfloat16().double() for t in (*student, *teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        got = run(*student, *teacher, "torch")
    relative = 16 * torch.finfo(torch.float32).eps * scale
    for mine, want in zip(got, run(*rounded, "reference"), strict=True):
        last = torch.finfo(mine.dtype).eps / 2
        assert (mine.double() - want).norm() <= (relative + last) * want.norm()


def test_distillation_says_what_it_does_not_train() -> None:
    x, y = views(2, 4, 8, 1, 0.3)
    teacher = (x.clone().requires_grad_(), y, scalar(9.0))
    with pytest.raises(ValueError, match=r"torch\.no_grad\(\)"):
        fastclip.DistillClipLoss()(x, y, scalar(9.0), *teacher)
    with pytest.raises(ValueError, match=r"\[4, 4, 3, 3\] rows"):
        fastclip.DistillClipLoss()(x, y, scalar(9.0), x[:3], y[:3], scalar(9.0))
    _, distill = fastclip.DistillClipLoss(backend="reference")(x, y, scalar(9.0), *teacher)
    assert torch.autograd.grad(distill, teacher[0])[0].abs().sum() > 0


def test_distillation_products_and_saved_memory() -> None:
    from fastclip.ops import dense
    from fastclip.ops.gemm import count_products

    x, y = (t.float().requires_grad_() for t in views(2, 512, 8, 1, 0.3))
    teacher = [t.float() for t in views(2, 512, 8, 5, 0.3)]
    saved: list[int] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ),
        count_products() as count,
        dense.switched_off(),
    ):
        loss = fastclip.DistillClipLoss(keep_bytes=0)
        _, distill = loss(x, y, scalar(9.0), *teacher, scalar(9.0))
        distill.backward()
    assert max(saved) <= 512 * 8
    # the contrastive forward's one, then six of the distillation's
    assert count.products_of(512, 512, 8) == 7


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("n", [2, 33])
def test_nt_xent_is_lightlys(n: int, temperature: float) -> None:
    inputs = [3 * t for t in views(2, n, 16, n, 0.3)]
    ours = fastclip.NTXentLoss(temperature)
    theirs = lightly.loss.NTXentLoss(temperature)
    assert_equal(with_gradients(ours, *inputs), with_gradients(theirs, *inputs))


def test_nt_xent_with_a_memory_bank_is_lightlys() -> None:
    """Step by step, the queue included; lightly restarts at the queue's end, which 3 x 6 < 20."""
    ours = fastclip.NTXentLoss(0.2, memory_bank_size=(20, 8))
    theirs = lightly.loss.NTXentLoss(0.2, memory_bank_size=(20, 8))
    theirs.memory_bank.bank.copy_(ours.memory_bank.bank)
    for step in range(3):
        inputs = [t.float() for t in views(2, 6, 8, step, 0.4)]
        got, want = with_gradients(ours, *inputs), with_gradients(theirs, *inputs)
        assert_equal(got, want, 1e-6)
        torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)
    before = ours.memory_bank.bank.clone()
    ours(*inputs)
    # without gradient nothing goes into the bank
    assert torch.equal(ours.memory_bank.bank, before)


def test_the_bank_wraps_and_is_saved() -> None:
    loss = fastclip.InfoNCELoss(0.1, memory_bank_size=(5, 3))
    rows = unit(8, 3, 1).float()
    loss(rows[:3], rows[:3])
    loss(rows[3:7], rows[3:7])
    # seven rows in a queue of five: the last five are there, the oldest two gone
    kept = {tuple(row.tolist()) for row in loss.memory_bank.bank}
    assert kept == {tuple(row.tolist()) for row in rows[2:7]}
    other = fastclip.InfoNCELoss(0.1, memory_bank_size=(5, 3))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(rows[:2], rows[:2]), loss(rows[:2], rows[:2]))
    loss(rows, rows)
    assert {tuple(row.tolist()) for row in loss.memory_bank.bank} == {
        tuple(row.tolist()) for row in rows[-5:]
    }


def test_evaluation_leaves_the_bank() -> None:
    loss = fastclip.InfoNCELoss(0.1, memory_bank_size=(5, 3)).eval()
    before = loss.memory_bank.bank.clone()
    loss(unit(2, 3, 1).float(), unit(2, 3, 2).float())
    assert torch.equal(loss.memory_bank.bank, before)


def test_info_nce_is_cross_entropy() -> None:
    query, keys = unit(12, 8, 1), unit(15, 8, 2)
    index = torch.tensor([14, 0, 0, 3, 3, 3, 9, 1, 2, 5, 6, 7])
    got = with_gradients(
        lambda q, k: fastclip.InfoNCELoss(0.1)(q, k, positive_index=index), query, keys
    )
    want = with_gradients(lambda q, k: F.cross_entropy(q @ k.T / 0.1, index), query, keys)
    assert_equal(got, want)


@pytest.mark.parametrize("temperature", [0.07, 0.3])
def test_sup_con_is_pytorch_metric_learnings(temperature: float) -> None:
    z = unit(40, 8, 1)
    labels = torch.arange(40) // 3
    ours = fastclip.SupConLoss(temperature)
    # theirs normalizes inside
    got = with_gradients(lambda z: ours(F.normalize(z, dim=-1), labels), z)
    theirs = pml.SupConLoss(temperature)
    # the last anchor has no positive, and neither of the two counts it
    want = with_gradients(lambda z: theirs(z, labels), z)
    assert_equal(got, want)


def test_sup_con_takes_views() -> None:
    z = unit(24, 8, 1)
    loss = fastclip.SupConLoss(0.2)
    labels = torch.arange(12)
    flat = loss(z, labels.repeat_interleave(2))
    torch.testing.assert_close(loss(z.view(12, 2, 8), labels), flat)
    torch.testing.assert_close(loss(z.view(12, 2, 8)), flat)
    pairs = z.view(12, 2, 8)
    torch.testing.assert_close(flat, fastclip.functional.nt_xent_loss(*pairs.unbind(1), 0.2))
    with pytest.raises(ValueError, match="without labels"):
        loss(z)


def test_no_positive_anywhere_is_zero() -> None:
    z = unit(6, 4, 1).requires_grad_()
    loss = sup_con_loss(z, torch.arange(6), 0.1)
    loss.backward()
    assert loss.item() == 0 and torch.count_nonzero(z.grad) == 0


def test_two_blocks_of_one_domain_are_nt_xent() -> None:
    x, y = views(2, 17, 8, 1, 0.4)
    got = with_gradients(lambda x, y: mp_nce_loss([x, y], [0, 0], 5.0), x, y)
    want = with_gradients(lambda x, y: nt_xent_loss(x, y, 0.2), x, y)
    assert_equal(got, want)


def test_mp_nce_with_one_positive_is_info_nce_among_all_rows() -> None:
    """Each anchor of two blocks against every other row as key."""
    x, y = views(2, 9, 8, 1, 0.4)
    z = torch.cat([x, y])
    anchors = mp_nce_loss([x, y], [0, 1], 6.0, reduction="none")
    for i in range(18):
        keys = torch.cat([z[:i], z[i + 1 :]])
        partner = (i + 9) % 18
        index = torch.tensor([partner - (partner > i)])
        want = info_nce_loss(z[i : i + 1], keys, 6.0, index)
        torch.testing.assert_close(anchors[i], want, rtol=1e-12, atol=1e-13)


def test_mp_nce_module_holds_the_papers_similarity() -> None:
    """s = (cos - offset) / temperature of each domain pair."""
    module = fastclip.MPNCELoss(2).double()
    with torch.no_grad():
        module.log_temperature.copy_(torch.tensor([0.1, 0.2, 0.4]).log())
        module.offset.copy_(torch.tensor([0.3, -0.2, 0.1]))
    blocks = views(3, 7, 8, 1, 0.4)
    temperature = torch.tensor([[0.1, 0.2], [0.2, 0.4]], dtype=torch.float64)
    offset = torch.tensor([[0.3, -0.2], [-0.2, 0.1]], dtype=torch.float64)
    want = mp_nce_loss(blocks, [0, 0, 1], 1 / temperature, -offset / temperature)
    got = module(blocks, [0, 0, 1])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    got.backward()
    # one text block: no pair of texts was compared but as negatives
    assert module.log_temperature.grad.abs().min() > 0
    assert module.offset.grad.abs().min() > 0
    with torch.no_grad():
        module.log_temperature.fill_(-9.0)
    module.clamp_scale_()
    torch.testing.assert_close(torch.exp(-module.log_temperature).max().item(), 100.0)
    assert set(module.state_dict()) == {"log_temperature", "offset"}


def test_balanced_weights_give_each_domain_pair_one_share() -> None:
    domains = [0, 0, 0, 1, 1]
    table = balanced_pair_weight(domains, 3)
    pairs = [(p, q) for i, p in enumerate(domains) for q in domains[i + 1 :]]
    shares = {(p, q): sum(table[p][q] for pair in pairs if pair == (p, q)) for p, q in set(pairs)}
    assert len(set(round(share, 12) for share in shares.values())) == 1
    assert sum(table[p][q] for p, q in pairs) == pytest.approx(len(pairs))
    # a table is read with p <= q, whatever the order of the blocks
    assert balanced_pair_weight([1, 0, 0, 1, 0], 3) == table
    blocks = views(5, 6, 8, 1, 0.4)
    weight = torch.tensor(table, dtype=torch.float64)
    got = fastclip.MPNCELoss(3, pair_weight="balanced").double()(blocks, domains)
    want = mp_nce_loss(blocks, domains, 1 / 0.07, pair_weight=weight)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_accuracy_counts_anchors_above_every_negative() -> None:
    x, y = views(2, 50, 6, 1, 0.5)
    S = x @ y.T
    metrics: dict[str, Tensor] = {}
    fastclip.functional.clip_loss(x, y, 9.0, metrics=metrics)
    arange = torch.arange(50)
    assert metrics["image_to_text_accuracy"] == (S.argmax(1) == arange).double().mean()
    assert metrics["text_to_image_accuracy"] == (S.argmax(0) == arange).double().mean()
    for backend in ("torch", "reference"):
        for reduction in ("mean", "none"):
            options = {"backend": backend, "reduction": reduction}
            info_nce_loss(x, y, 9.0, metrics=metrics, **options)
            assert metrics["accuracy"] == metrics["image_to_text_accuracy"]
            nt_xent_loss(x, y, 0.1, metrics=metrics, **options)
            z = torch.cat([x, y])
            T = (z @ z.T).fill_diagonal_(-2)
            partner = (torch.arange(100) + 50) % 100
            assert metrics["accuracy"] == (T.argmax(1) == partner).double().mean()
    # a tie is not a hit
    same = x[:1].expand(4, 6)
    fastclip.functional.clip_loss(same, same, 9.0, metrics=metrics)
    assert metrics["image_to_text_accuracy"] == 0


BLOCK, OTHER = torch.ones(4, 3), torch.ones(4, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mp_nce_loss([BLOCK], [0], 1.0), "1 block; an anchor's positives"),
        (lambda: mp_nce_loss([BLOCK, BLOCK], [0], 1.0), "2 blocks but 1 domains"),
        (lambda: mp_nce_loss([BLOCK, OTHER], [0, 1], 1.0), r"block 1 is \(4, 5\)"),
        (lambda: mp_nce_loss([BLOCK, BLOCK], [0, -1], 1.0), "number them from 0"),
        (lambda: mp_nce_loss([BLOCK, BLOCK.double()], [0, 0], 1.0), "cast them to one dtype"),
        (lambda: mp_nce_loss([BLOCK, BLOCK], [0, 2], torch.ones(2, 2)), "P = 3 domains"),
        (lambda: nt_xent_loss(BLOCK, BLOCK, 0.0), "temperature is 0.0"),
        (lambda: nt_xent_loss(BLOCK, BLOCK, torch.ones(2)), r"temperature has shape \(2,\)"),
        (lambda: sup_con_loss(BLOCK, torch.arange(3), 0.1), r"labels has shape \(3,\)"),
        (lambda: sup_con_loss(BLOCK, torch.ones(4), 0.1), "labels is torch.float32"),
        (lambda: info_nce_loss(BLOCK, BLOCK[:2], 1.0), "4 queries but only 2 keys"),
        (lambda: info_nce_loss(BLOCK, BLOCK, 1.0, in_batch=False), "give a bank"),
        (lambda: info_nce_loss(BLOCK, BLOCK, 1.0, bank=OTHER), r"the bank is \(4, 5\)"),
        (lambda: info_nce_loss(BLOCK, BLOCK, 1.0, torch.arange(3)), r"positive_index has shape"),
        (lambda: fastclip.functional.siglip_loss(BLOCK, BLOCK[:3], 1.0), "4 images and 3 texts"),
        (lambda: fastclip.NTXentLoss(-1.0), "temperature is -1.0"),
        (lambda: fastclip.NTXentLoss(0.1, 32), "memory_bank_size is 32"),
        (
            lambda: fastclip.functional.nt_xent_loss(BLOCK, BLOCK, 0.1, dist="star"),
            "use 'gather', 'ring'",
        ),
        (
            lambda: fastclip.functional.siglip_loss(BLOCK, BLOCK, 1.0, dist="ring"),
            "init_process_group",
        ),
        (lambda: fastclip.functional.siglip_loss(BLOCK, BLOCK, 1.0, sizes=(4,)), "give dist"),
        (lambda: fastclip.InfoNCELoss(0.1, in_batch=False), "give memory_bank_size"),
        (lambda: fastclip.InfoNCELoss(0.1, (0, 3)), "0 x 3"),
        (lambda: fastclip.MPNCELoss(0), "num_domains is 0"),
        (lambda: fastclip.MPNCELoss(2, pair_weight="even"), "pair_weight is 'even'"),
    ],
)
def test_bad_input_is_reported(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_blocks_of_different_dtypes_under_autocast() -> None:
    x, y = (t.float() for t in views(2, 9, 8, 1, 0.4))
    leaves = [x.requires_grad_(), y.bfloat16().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = mp_nce_loss(leaves, [0, 1], 9.0)
    gradients = torch.autograd.grad(loss, leaves)
    assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16]


def test_the_text_of_a_loss_names_what_is_not_the_default() -> None:
    class Own(fastclip.ClipLoss):
        def __init__(self, *arguments, margin: float = 0.0, **options) -> None:
            super().__init__(*arguments, **options)
            self.margin = margin

    assert repr(fastclip.ClipLoss()) == "ClipLoss()"
    distributed = fastclip.ClipLoss(True, True, rank=3, world_size=8)
    for setting in ("local_loss=True", "gather_with_grad=True", "rank=3", "world_size=8"):
        assert setting in repr(distributed)
    assert repr(Own(label_smoothing=0.1, margin=2.0)) == "Own(label_smoothing=0.1, margin=2.0)"
    # what is kept among the options, and what has no default
    assert repr(fastclip.SupConLoss(0.2, backend="torch")) == (
        "SupConLoss(temperature=0.2, backend='torch')"
    )
    assert "num_samples=10," in repr(fastclip.GlobalContrastiveLoss(10))
    assert "MemoryBank(size=4, width=2)" in repr(fastclip.NTXentLoss(memory_bank_size=(4, 2)))


def test_weights_of_pairs_may_be_lists() -> None:
    features = [unit(6, 5, seed) for seed in range(2)]
    lists = [[1.0, 3.0], [0.0, 0.5]]
    found = fastclip.MPNCELoss(pair_weight=lists)(features, [0, 1])
    want = fastclip.MPNCELoss(pair_weight=torch.tensor(lists))(features, [0, 1])
    assert found == want != fastclip.MPNCELoss()(features, [0, 1])
    with pytest.raises(ValueError, match=r"pair_weight is \(2,\); give \(2, 2\)"):
        fastclip.MPNCELoss(pair_weight=[1.0, 2.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"domains are \[0, 2\]; give 0 to 1"):
        fastclip.MPNCELoss(pair_weight="balanced")(features, [0, 2])


def test_settings_that_exclude_each_other_are_refused_when_a_loss_is_made() -> None:
    with pytest.raises(ValueError, match="needs memory_bank_size=0"):
        fastclip.NTXentLoss(memory_bank_size=(8, 4), group_role="positive")
    with pytest.raises(ValueError, match="leave out dist or the bank"):
        fastclip.InfoNCELoss(memory_bank_size=(8, 4), dist="gather")
    with pytest.raises(ValueError, match="needs gather_with_grad=True"):
        fastclip.ClipLoss(local_loss=True, world_size=2, group_role="positive")


def test_gamma_is_shown_as_it_was_given() -> None:
    loss = fastclip.GlobalContrastiveLoss(100, "v1", gamma=0.5, gamma_epochs=4)
    assert loss.current_gamma == 1.0
    assert repr(loss) == (
        "GlobalContrastiveLoss(num_samples=100, variant='v1', gamma=0.5, gamma_epochs=4)"
    )


@pytest.mark.parametrize("options", [{}, {"chunk_bytes": 1 << 10}, {"reduction": "none"}])
def test_a_row_of_a_bank_is_no_positive(options: dict) -> None:
    query, keys, bank = (unit(4, 5, seed) for seed in range(3))
    index = torch.tensor([0, 1, 2, 3])
    assert info_nce_loss(query, keys, 9.0, index, bank=bank, **options).isfinite().all()
    with pytest.raises(ValueError, match="positive_index has 4; give one of 0 to 3"):
        info_nce_loss(query, keys, 9.0, index + 1, bank=bank, **options)
