"""sentence-transformers' ranking losses, theirs beside ours; its trainer over two processes."""

import contextlib
import importlib
import itertools
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastclip
from fastclip.ops.dense import switched_off
from fastclip.ops.gemm import count_products
from tests.ops.test_ranking import CHOICES, SUBSETS, name_of, options
from tests.processes import on_ranks

REASON = "sentence-transformers is not installed: its losses are not replaced"
pytest.importorskip("sentence_transformers", minversion="5.4", reason=REASON)
losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
SYMMETRIC = options(("query_to_doc", "doc_to_query"), "per_direction", None)
GATHERED = [
    CHOICES[0],
    SYMMETRIC,
    options(SUBSETS[-1], "joint", None),
    options(SUBSETS[2], "joint", "all_negatives"),
    options(("query_to_doc",), "joint", "in_batch_negatives"),
    options(("query_to_doc",), "joint", "hard_negatives"),
]


class Encoder(nn.Module):
    """The least that the losses ask of a model: words in, an embedding out."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 7, dtype=dtype)
        self.drop = nn.Dropout(0.0)

    def __getitem__(self, index: int) -> nn.Module:
        # its first part is asked whether it can be cut into mini-batches
        return self.words

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        vectors = self.drop(self.words(features["input_ids"]).mean(dim=1))
        return {**features, "sentence_embedding": vectors}


def columns(count: int, rows: int = 6, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 50, (rows, 4), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def made(choice: dict[str, Any], cached: bool, **others: Any) -> nn.Module:
    kind = losses.CachedMultipleNegativesRankingLoss if cached else None
    kind = kind or losses.MultipleNegativesRankingLoss
    return kind(
        Encoder(), scale=9.0, **choice, **({"mini_batch_size": 4} if cached else {}), **others
    )


def step(loss: nn.Module, given: list[dict[str, Tensor]]) -> list[Tensor]:
    """Value and gradient; forward and backward as a trainer calls them."""
    loss.zero_grad()
    value = loss(given, None)
    value.backward()
    return [value.detach(), loss.model.words.weight.grad.clone()]


def check(got: list[Tensor], want: list[Tensor], limit: float = 1e-12) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= limit * max(other.abs().max().item(), 1.0)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_values_and_gradients_are_theirs(blocks: int, cached: bool) -> None:
    """Every direction, partition and hardness, of cosines and of dot products."""
    from sentence_transformers.util import cos_sim, dot_score

    given = columns(1 + blocks)
    for choice, similarity in zip(
        CHOICES, itertools.cycle((cos_sim, cos_sim, dot_score)), strict=False
    ):
        loss = made(choice, cached, similarity_fct=similarity)
        want = step(loss, given)
        with fastclip.patch_sentence_transformers(), count_products() as count:
            got = step(loss, given)
        assert count.calls > 0, name_of(choice)
        check(got, want)
        with torch.no_grad(), fastclip.patch_sentence_transformers():
            check([loss(given, None)], want[:1])


def test_the_symmetric_losses_follow() -> None:
    given = columns(2)
    for name in ("MultipleNegativesSymmetricRankingLoss", "CachedMultipleNegativesSymmetric"):
        kind = getattr(losses, name + "RankingLoss" * name.startswith("Cached"))
        loss = kind(Encoder(), scale=9.0)
        want = step(loss, given)
        with fastclip.patch_sentence_transformers(), count_products() as count:
            check(step(loss, given), want)
        assert count.calls > 0


def test_the_cached_loss_walks_once() -> None:
    """Three products of all rows, however small a mini-batch; float32 on the chunked path."""
    given = columns(2, rows=64)
    loss = losses.CachedMultipleNegativesRankingLoss(Encoder(torch.float32), mini_batch_size=4)
    with fastclip.patch_sentence_transformers(), switched_off(), count_products() as count:
        step(loss, given)
    assert count.products_of(64, 64, 7) == 3


def test_under_autocast_the_cached_gradient_is_as_theirs() -> None:
    """Of bf16 embeddings; the value is float32."""
    found = []
    for handle in (contextlib.nullcontext(), fastclip.patch_sentence_transformers()):
        model = Encoder(torch.float32)
        model.drop = nn.Linear(7, 7)
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
        with handle, torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(columns(2), None)
        value.backward()
        found.append([value.detach().float(), model.words.weight.grad])
    check(found[1], found[0], 0.03)


def test_the_losses_themselves_are_subclasses() -> None:
    import fastclip.integrations.sentence_transformers as ours

    given = columns(3)
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        kind, theirs = getattr(ours, name), getattr(losses, name)
        assert issubclass(kind, theirs) and kind is getattr(ours, name) is not theirs
        loss = kind(Encoder(), scale=9.0, hardness_mode="all_negatives", hardness_strength=3.0)
        with count_products() as count:
            got = step(loss, given)
        assert count.calls > 0 and loss.get_config_dict()["hardness_strength"] == 3.0
        loss.__class__ = theirs
        check(got, step(loss, given))
    with pytest.raises(AttributeError, match="has no attribute 'TripletLoss'"):
        ours.TripletLoss  # noqa: B018


def test_undo_restores_and_twice_is_harmless() -> None:
    kinds = losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss
    methods = kinds[0].compute_loss_from_embeddings, kinds[1].calculate_loss
    first = fastclip.patch_sentence_transformers()
    assert kinds[0].compute_loss_from_embeddings is not methods[0]
    assert kinds[1].calculate_loss is not methods[1]
    fastclip.patch_sentence_transformers().undo()
    assert kinds[1].calculate_loss is not methods[1]
    first.undo()
    assert (kinds[0].compute_loss_from_embeddings, kinds[1].calculate_loss) == methods


def test_another_similarity_keeps_their_code() -> None:
    loss = made(CHOICES[0], True, similarity_fct=lambda a, b: -torch.cdist(a, b))
    want = step(loss, columns(2))
    with fastclip.patch_sentence_transformers(), pytest.warns(UserWarning, match="loss is kept"):
        check(step(loss, columns(2)), want, 0.0)


def test_one_column_has_their_error() -> None:
    loss = made(CHOICES[0], False)
    with fastclip.patch_sentence_transformers(), pytest.raises(ValueError, match="at least 2"):
        loss(columns(1), None)


def test_an_old_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Before(nn.Module):
        def __init__(self, model: nn.Module, scale: float = 20.0) -> None:
            super().__init__()

    monkeypatch.setattr(losses, "MultipleNegativesRankingLoss", Before)
    with pytest.raises(ImportError, match=r"install 5.3 or newer: pip install 'sentence-tr"):
        fastclip.patch_sentence_transformers()


# two processes


def gathered(rank: int) -> list[list[list[Tensor]]]:
    """For each choice and loss, theirs and ours."""
    found = []
    for choice, cached in itertools.product(GATHERED, (False, True)):
        given = columns(3, rows=4, seed=rank)
        loss = made(choice, cached, gather_across_devices=True)
        pair = [step(loss, given)]
        with fastclip.patch_sentence_transformers():
            pair.append(step(loss, given))
        found.append(pair)
    return found


def save_tiny_model(folder: Path) -> None:
    """BERT of one layer with a vocabulary of letters, for `trained`."""
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=13, intermediate_size=32, hidden_dropout_prob=0.0, **sizes)
    BertModel(config).save_pretrained(folder)
    BertTokenizer(str(vocabulary)).save_pretrained(folder)


def trained(rank: int, folder: Path) -> list[Tensor]:
    """Weights after two steps of their trainer, theirs and ours."""
    import datasets
    import sentence_transformers as library
    from sentence_transformers import models as modules

    letters = "abcdefgh"
    rows = {
        name: [f"{letters[(i + shift) % 8]} {letters[i // 2]}" for i in range(8)]
        for name, shift in (("anchor", 0), ("positive", 1), ("negative", 4))
    }
    found = []
    for patched in (False, True):
        words = modules.Transformer(str(folder))
        pooling = modules.Pooling(words.get_embedding_dimension())
        model = library.SentenceTransformer(modules=[words, pooling], device="cpu")
        arguments = library.SentenceTransformerTrainingArguments(
            str(folder / "run"), max_steps=2, per_device_train_batch_size=2, learning_rate=0.1,
            optim="sgd", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        loss = losses.CachedMultipleNegativesRankingLoss(
            model, mini_batch_size=1, gather_across_devices=True
        )
        handle = fastclip.patch_sentence_transformers() if patched else None
        data = datasets.Dataset.from_dict(rows)
        with count_products() as count:
            library.SentenceTransformerTrainer(model, arguments, data, loss=loss).train()
        assert (count.calls > 0) == patched
        if handle is not None:
            handle.undo()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return found


def has_datasets() -> bool:
    from sentence_transformers.util import is_training_available

    return bool(is_training_available())


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    port = (Path(folder) / "port").read_text()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank)}
    os.environ |= {**place, "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TMPDIR": folder}
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"gathered": gathered(rank)}
    if has_datasets():
        found["trained"] = trained(rank, Path(folder))
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(one.getsockname()[1]))
    save_tiny_model(folder)
    on_ranks(work, (str(folder),), ranks=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.dist
def test_two_processes_gather(ranks: list[dict[str, Any]]) -> None:
    """Each process's own value and gradient, plain and cached."""
    for found in ranks:
        for theirs, ours in found["gathered"]:
            check(ours, theirs)
    assert not torch.equal(ranks[0]["gathered"][0][0][0], ranks[1]["gathered"][0][0][0])


@pytest.mark.dist
def test_their_trainer_ends_with_the_same_weights(ranks: list[dict[str, Any]]) -> None:
    if not has_datasets():
        pytest.skip("datasets is not installed: sentence-transformers' trainer was not run")
    for found in ranks:
        theirs, ours = found["trained"]
        assert (ours - theirs).abs().max() <= 1e-5
        assert torch.equal(ours, ranks[0]["trained"][1])
