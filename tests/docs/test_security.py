"""What SECURITY.md says, sentence by sentence, and the tests that hold it."""

import ast
import re
from functools import cache

import pytest

from tests.test_repo_shape import ROOT

HOSTILE = "data/test_hostile.py"
REMOTE = "data/test_remote.py"
CHECKPOINT = "train/test_checkpoint.py"
FUZZ = "models/test_checkpoint_fuzz.py::test_no_damaged_checkpoint_loads_as_another"
DESCRIPTION = "models/test_description.py"

# the beginning of a sentence, or of a line of the table, and what would fail if it were not so
HELD = {
    "checkpoints of fastclip's": [f"{CHECKPOINT}::test_a_malicious_file_does_not_run"],
    "model descriptions": [
        f"{DESCRIPTION}::test_no_description_makes_a_tokenizer_run_code",
        f"{DESCRIPTION}::test_unknown_keys_and_forms_are_refused",
    ],
    "`.safetensors`": ["models/test_hub.py::test_a_pickle_under_the_name_of_safetensors"],
    "`config.json` of a language model": [
        "models/test_hub.py::test_a_language_model_beside_the_description_names_no_code"
    ],
    "checkpoints of DeepSpeed's": ["models/test_sharded.py::test_nothing_runs_unasked"],
    "checkpoints of FSDP2's": [
        "models/test_distributed_checkpoint.py::test_a_description_runs_nothing",
        "models/test_distributed_checkpoint.py::test_what_torch_would_unpickle_is_refused",
    ],
    "data named by a command": [
        f"{REMOTE}::test_commands_are_refused",
        f"{REMOTE}::test_nothing_of_the_data_starts_a_program",
    ],
    "`hf-hub:` models": [
        f"{DESCRIPTION}::test_a_hub_description_is_checked_alike",
        f"{DESCRIPTION}::test_code_beside_a_named_tokenizer_or_tower_is_refused_unasked",
    ],
    "features that `fastclip search` has kept": [
        "cli/test_search.py::test_damaged_features_are_computed_again"
    ],
    "`--config` files, and": [
        "test_bounded.py::test_yaml_that_is_refused",
        "train/test_inherited.py::test_trust_and_place_are_not_inherited",
    ],
    "A checkpoint with a manifest": [
        f"{CHECKPOINT}::test_what_differs_from_its_manifest_is_refused_by_path",
        FUZZ,
    ],
    "Without one, a `.pt` file's own checksums": [FUZZ],
    "A `.pt` file that names a DeepSpeed folder": [
        f"{CHECKPOINT}::test_a_file_names_no_folder_to_unpickle"
    ],
    "A folder that is FSDP2's by its files": [
        "models/test_distributed_checkpoint.py::test_no_folder_is_trusted_by_half"
    ],
    "No file is written through a link": [
        "test_atomic.py::test_no_file_is_written_through_a_link",
        "test_atomic.py::test_texts_and_checkpoints",
        "test_atomic.py::test_nothing_in_the_package_writes_otherwise",
    ],
    "Only where a flag names the very file": [
        "test_atomic.py::test_a_link_under_a_name_that_the_user_gave_is_followed"
    ],
    "Links to folders are followed": ["test_atomic.py::test_a_folder_may_be_a_link"],
    "The cache of shards is made with mode 0700": [
        "test_atomic.py::test_locks_and_the_cache_folder"
    ],
    "DeepSpeed's recovery scripts": [
        "train/test_zero.py::test_stage_equals_data_parallel_and_resumes"
    ],
    "**Tars are indexed, never unpacked.**": [f"{HOSTILE}::test_tars"],
    "Names in them are labels": [f"{HOSTILE}::test_tars"],
    "Links, devices and other special members": [
        "data/test_shards.py::test_incomplete_and_special_members"
    ],
    "Headers that claim sizes": [f"{HOSTILE}::test_tars", "data/test_fuzz.py::test_damaged_tars"],
    "Time and memory grow with the members": [f"{HOSTILE}::test_tars"],
    "**Compressed tars are refused**": ["data/test_shards.py::test_files_that_are_no_tars"],
    "**Images** are JPEG, PNG or WebP": [f"{HOSTILE}::test_pictures"],
    "Their header is read first": [
        f"{HOSTILE}::test_pictures",
        f"{HOSTILE}::test_pictures_take_little_memory",
    ],
    "**Descriptions, manifests and annotations**": [
        "test_bounded.py::test_json_that_is_refused",
        "test_bounded.py::test_every_reader_names_the_file",
    ],
    "**Texts** over 1 MiB": ["data/test_shards.py::test_unreadable_samples"],
    "Of a long text, a tokenizer": [
        "data/test_tokens.py::test_a_word_of_a_mebibyte_stalls_nothing",
        "data/test_tokens.py::test_long_texts_have_the_tokens_they_had",
    ],
    "**Remote shards** are written": [
        f"{REMOTE}::test_a_download_that_was_killed_is_cleared_away",
        f"{REMOTE}::test_other_files_are_never_deleted",
        "data/test_http.py::test_servers",
    ],
    "Links and pipes in the cache": [
        f"{REMOTE}::test_what_somebody_put_into_the_cache_is_not_read"
    ],
    "Over HTTP, no more is taken": [
        "data/test_http.py::test_servers",
        "data/test_http.py::test_a_redirect_is_followed_without_the_secret",
        "data/test_http.py::test_a_redirect_leads_to_http_alone",
    ],
    "**Pipes and devices**": [
        "data/test_shards.py::test_a_pipe_in_the_place_of_a_shard_is_not_waited_for",
        "data/test_tables.py::test_special_files_are_no_images",
    ],
    "**Names from data**": [
        "test_printable.py::test_printable",
        "test_printable.py::test_names_in_data_reach_no_terminal_raw",
    ],
    "**Tables** are refused": ["data/test_hostile_tables.py::test_tables"],
    "A damaged sample is replaced": [
        "data/test_loader.py::test_unreadable_samples_are_replaced_and_reported"
    ],
    "`fastclip check-data` finds these": [
        "data/test_check.py::test_every_hostile_tar_is_counted_exactly"
    ],
    "The limits are listed": ["docs/test_tables.py::test_limits_of_data"],
}


def sentences() -> list[str]:
    """Of the sections that promise something: sentences, items and lines of tables."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    kept = text.split("## What can run code")[1].split("## What is not promised")[0]
    found = []
    # the rest of the heading, the head of the table and its rule go
    for part in re.split(r"\n(?=\n|- |\| )", kept.partition("| --- |")[2].partition("\n")[2]):
        line = " ".join(part.split()).removeprefix("- ").removeprefix("| ")
        if line.startswith("## ") or not line:
            continue
        ends = r"(?<=\.) (?=[A-Z`*])|(?<=\.\*\*) " if not part.startswith("| ") else r"$^"
        found += [sentence for sentence in re.split(ends, line) if sentence]
    return [sentence for sentence in found if "see below" not in sentence]


@cache
def functions_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_sentence_is_held() -> None:
    assert len(sentences()) >= len(HELD)
    for sentence in sentences():
        assert sum(sentence.startswith(start) for start in HELD) == 1, sentence
    for start in HELD:
        assert any(sentence.startswith(start) for sentence in sentences()), start


@pytest.mark.parametrize("start", HELD)
def test_what_holds_it_is_there(start: str) -> None:
    assert HELD[start]
    for name in HELD[start]:
        file, _, function = name.partition("::")
        assert function in functions_in(file), name
