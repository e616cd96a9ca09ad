"""Writes docs/api.md, the reference of the public names, from their signatures and docstrings.

    python docs/make_api.py            # writes it
    python docs/make_api.py --check    # status 1 if it is not what would be written

Reads source files only, so it needs neither torch nor what a module imports.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
WIDTH = 96

# A title, what is said of all of it, and the names: "as imported", or "as imported = defined in".
SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Losses as functions",
        "@fastclip.functional",
        (
            "fastclip.functional.clip_loss = fastclip.functional.pairs",
            "fastclip.functional.siglip_loss = fastclip.functional.pairs",
            "fastclip.functional.info_nce_loss = fastclip.functional.pairs",
            "fastclip.functional.mp_nce_loss = fastclip.functional.blocks",
            "fastclip.functional.mil_nce_loss = fastclip.functional.blocks",
            "fastclip.functional.nt_xent_loss = fastclip.functional.blocks",
            "fastclip.functional.sup_con_loss = fastclip.functional.blocks",
            "fastclip.functional.distillation_loss = fastclip.functional.distillation",
            "fastclip.functional.global_contrastive_loss = fastclip.functional.global_contrastive",
            "fastclip.functional.ranking_loss = fastclip.functional.ranking",
            "fastclip.functional.similarity_statistics = fastclip.functional.statistics",
        ),
    ),
    (
        "Losses as modules",
        "",
        (
            "fastclip.ClipLoss = fastclip.losses.clip",
            "fastclip.SigLipLoss = fastclip.losses.siglip",
            "fastclip.CoCaLoss = fastclip.losses.clip",
            "fastclip.DistillClipLoss = fastclip.losses.clip",
            "fastclip.InfoNCELoss = fastclip.losses.info_nce",
            "fastclip.NTXentLoss = fastclip.losses.nt_xent",
            "fastclip.SupConLoss = fastclip.losses.sup_con",
            "fastclip.losses.sup_contrast.SupContrastLoss",
            "fastclip.losses.metric_learning.MetricLearningSupConLoss",
            "fastclip.MPNCELoss = fastclip.losses.mp_nce",
            "fastclip.GlobalContrastiveLoss = fastclip.losses.global_contrastive",
            "fastclip.losses.mp_nce.balanced_pair_weight",
            "fastclip.losses.memory_bank.MemoryBank",
            "fastclip.losses.memory_bank.memory_bank",
            "fastclip.losses.base.Loss",
        ),
    ),
    (
        "Terms beside the contrastive loss",
        "@fastclip.losses.non_contrastive",
        (
            "fastclip.losses.non_contrastive.prediction_loss",
            "fastclip.losses.non_contrastive.cross_correlation_loss",
            "fastclip.losses.non_contrastive.swapped_assignment_loss",
            "fastclip.losses.non_contrastive.prototype_assignment_loss",
            "fastclip.losses.non_contrastive.assignments",
        ),
    ),
    (
        "Attention",
        "",
        (
            "fastclip.functional.attention = fastclip.ops.attention",
            "fastclip.functional.packed_attention = fastclip.ops.attention",
            "fastclip.nn.attention.self_attention",
            "fastclip.nn.attention.cross_attention",
        ),
    ),
    (
        "Under other libraries' models",
        "",
        (
            "fastclip.patch_open_clip = fastclip.integrations.open_clip",
            "fastclip.patch_sentence_transformers = fastclip.integrations.sentence_transformers",
            "fastclip.patch_timm = fastclip.integrations.timm",
            "fastclip.patch_transformers = fastclip.integrations.transformers",
            "fastclip.integrations.patch.PatchHandle",
        ),
    ),
    (
        "Exact accumulation",
        "@fastclip.train.accumulate",
        (
            "fastclip.train.accumulate.accumulate",
            "fastclip.train.accumulate.refuse_batch_norm",
            "fastclip.train.wrapped.accumulate_wrapped",
        ),
    ),
    (
        "Models",
        "",
        (
            "fastclip.load = fastclip.models.build",
            "fastclip.models.open.open_model",
        ),
    ),
    (
        "Features",
        "",
        ("fastclip.evaluate.search.search",),
    ),
    (
        "Heads",
        "",
        (
            "fastclip.nn.heads.GlobalBatchNorm",
            "fastclip.nn.heads.linear_head",
            "fastclip.nn.heads.MLPHead",
            "fastclip.nn.augmentation_encoder.AugmentationEncoder",
            "fastclip.nn.augmentation_encoder.ResidualHead",
        ),
    ),
    (
        "Data",
        "",
        (
            "fastclip.data.sources.open_source",
            "fastclip.data.options.DataOptions",
            "fastclip.data.order.Order",
            "fastclip.data.training_samples.TrainingSamples",
            "fastclip.data.loader.TrainingLoader",
            "fastclip.data.dali.DaliLoader",
            "fastclip.data.augment.Augmentation",
            "fastclip.data.augment.AugmentationParams",
            "fastclip.data.augment.draw_view",
            "fastclip.data.views.render_view",
            "fastclip.data.views.replay",
            "fastclip.data.captions.CaptionSampling",
            "fastclip.data.text_augment.TextAugmentation",
        ),
    ),
)

Definition = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Entry:
    """A public name, and where its definition is."""

    name: str
    module: str

    @classmethod
    def of(cls, text: str) -> "Entry":
        """From an item of `SECTIONS`."""
        name, _, module = text.partition(" = ")
        return cls(name, module or name.rpartition(".")[0])

    @property
    def definition(self) -> Definition:
        """The function or class in its module's source.

        Raises:
            ValueError: there is none of this name.
        """
        wanted = self.name.rpartition(".")[2]
        for node in tree(self.module).body:
            if isinstance(node, Definition) and node.name == wanted:
                return node
        raise ValueError(f"{self.module} defines no {wanted}; amend SECTIONS of {__file__}")


def tree(module: str) -> ast.Module:
    """The source of a module or package."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def entries() -> list[Entry]:
    """All public names, in the order of the page."""
    return [Entry.of(text) for _, _, names in SECTIONS for text in names]


def methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """The public methods of a class that say what they do."""
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
            if ast.get_docstring(member):
                yield member


def constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    """A class's `__init__`, if it has one of its own."""
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return member
    return None


def parameters(node: ast.FunctionDef) -> list[str]:
    """As they are written, with `/` and `*` between them, without self or cls."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    texts = [_parameter(*pair) for pair in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg in ("self", "cls"):
        del texts[0]
    if given.vararg:
        texts.append(f"*{ast.unparse(given.vararg)}")
    elif given.kwonlyargs:
        texts.append("*")
    texts += [_parameter(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        texts.append(f"**{ast.unparse(given.kwarg)}")
    return texts


def fields(node: ast.ClassDef) -> list[str]:
    """A dataclass's, as parameters."""
    members = [member for member in node.body if isinstance(member, ast.AnnAssign)]
    for member in members:
        # of a flag, its default alone; see `fastclip.flags`
        if isinstance(member.value, ast.Call) and ast.unparse(member.value.func) == "flag":
            member.value = member.value.args[0]
    return [ast.unparse(member) for member in members]


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    if default is None:
        return text
    equals = " = " if argument.annotation else "="
    return f"{text}{equals}{ast.unparse(default)}"


def _signature(name: str, texts: list[str], returns: ast.expr | None = None) -> str:
    arrow = f" -> {ast.unparse(returns)}" if returns else ""
    lines = [f"{name}("]
    for text in texts:
        part = f"{text}, " if text is not texts[-1] else text
        if len(lines[-1]) + len(part) > WIDTH:
            lines.append("    ")
        lines[-1] += part
    lines[-1] += f"){arrow}"
    signature = "\n".join(line.rstrip() for line in lines).replace("'", '"')
    return f"```text\n{signature}\n```"


def markdown(docstring: str) -> str:
    """A docstring with its sections as lists, and its examples, which come last, as code."""
    docstring, _, examples = docstring.partition("\nExamples:\n")
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        header = re.fullmatch(r"(Args|Arguments|Returns|Raises|Attributes):(.*)", line)
        if header:
            inside = True
            lines += ["" if lines and lines[-1] else None, f"*{header[1]}:*{header[2]}", ""]
        elif not inside or not line.strip():
            lines.append(line)
        elif re.match(r" {4}\S", line):
            item = re.match(r"    ([\w*]+(?:, [\w*]+)*|[\w ]+):\s+(.*)", line)
            lines.append(f"- `{item[1]}`: {item[2]}" if item else f"- {line.strip()}")
            if not item and len(lines) > 1 and lines[-2] and not lines[-2].startswith("*"):
                # the text of a section without names, continued
                lines[-2:] = [lines[-2], f"  {line.strip()}"]
        elif line.startswith("    "):
            lines.append(f"  {line.strip()}")
        else:
            inside = False
            lines.append(line)
    kept = (line for line in lines if line is not None)
    # outside of indented formulas, what could be taken for a tag
    text = "\n".join(
        x if x.startswith("    ") else re.sub(r"<(?=\w)", "&lt;", x) for x in kept
    ).strip()
    if not examples:
        return text
    return f"{text}\n\n*Examples:*\n\n```pycon\n{textwrap.dedent(examples).strip()}\n```"


def _section_of(entry: Entry) -> Iterator[str]:
    node = entry.definition
    yield f"### {entry.name}"
    if isinstance(node, ast.FunctionDef):
        yield _signature(node.name, parameters(node), node.returns)
        yield markdown(ast.get_docstring(node) or "")
        return
    init = constructor(node)
    yield _signature(node.name, parameters(init) if init else fields(node))
    yield markdown(ast.get_docstring(node) or "")
    for method in methods(node):
        yield f"#### {node.name}.{method.name}"
        if not any(ast.unparse(d) == "property" for d in method.decorator_list):
            yield _signature(method.name, parameters(method), method.returns)
        yield markdown(ast.get_docstring(method) or "")


def page() -> str:
    """The whole of docs/api.md."""
    parts = [
        "# API reference",
        "Generated from the docstrings by `python docs/make_api.py`; do not edit it by hand.",
        "Shapes are written (rows, width); N and M are numbers of rows, D widths.",
    ]
    listing = []
    for title, _, _names in SECTIONS:
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        listing.append(f"- [{title}](#{anchor})")
    parts.append("\n".join(listing))
    for title, intro, names in SECTIONS:
        parts.append(f"## {title}")
        if intro:
            parts.append(markdown(ast.get_docstring(tree(intro.removeprefix("@"))) or ""))
        for text in names:
            parts += _section_of(Entry.of(text))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or with --check compare."""
    text = page()
    if arguments == ["--check"]:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if current != text:
            print(f"{PAGE} is stale: run python docs/make_api.py", file=sys.stderr)
        return int(current != text)
    if arguments:
        print(__doc__)
        return 2
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
