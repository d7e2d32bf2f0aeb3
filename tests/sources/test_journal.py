from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastload.errors import FormatError
from fastload.sources.journal import JOURNAL_NAME, Journal, apply_view, encode_journal, read_journal, view_folder
from fastload.sources.local import find_weights
from fastload.sources.resolve import locate_config
from tests.sources.checkpoints import CONFIG, safetensors_bytes, sharded, write

OLD = {"model.safetensors": safetensors_bytes("old"), "config.json": b'{"old": 1}'}
NEW = {**sharded(), "config.json": CONFIG}
JOURNAL = Journal({name: f".tmp-{i}" for i, name in enumerate(NEW)}, ("model.safetensors",))


def killed_after(folder: Path, n_renames: int, n_deletes: int = 0) -> Path:
    """A folder whose old checkpoint was being replaced by the new one when the save was killed."""
    write(folder, OLD)
    write(folder, {JOURNAL.renames[name]: content for name, content in NEW.items()})
    (folder / JOURNAL_NAME).write_text(encode_journal(JOURNAL))
    for final, temporary in list(JOURNAL.renames.items())[:n_renames]:
        (folder / temporary).replace(folder / final)
    for name in JOURNAL.superseded[:n_deletes]:
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize(("n_renames", "n_deletes"), [*((n, 0) for n in range(len(NEW) + 1)), (len(NEW), 1)])
def test_killed_save_is_seen_as_the_new_checkpoint(tmp_path: Path, n_renames: int, n_deletes: int) -> None:
    folder = killed_after(tmp_path, n_renames, n_deletes)
    files = find_weights(folder)
    assert files.weight_map is not None
    for key, path in files.weight_map.items():
        assert Path(path).read_bytes() == safetensors_bytes(key)
    assert len(files.weights) == 3
    assert files.format == "safetensors"
    assert files.notes == ()
    assert Path(locate_config(folder)).read_bytes() == CONFIG


def test_folder_without_journal_is_seen_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    assert read_journal(tmp_path) is None
    assert view_folder(tmp_path).names() == set(OLD)
    assert apply_view(tmp_path, "config.json") == str(tmp_path / "config.json")


def test_temporaries_of_a_save_that_wrote_no_journal_are_not_seen(tmp_path: Path) -> None:
    killed_after(tmp_path, 0)
    (tmp_path / JOURNAL_NAME).unlink()
    assert find_weights(tmp_path).weights == (str(tmp_path / "model.safetensors"),)


def test_view_names_the_files_of_the_new_checkpoint_only(tmp_path: Path) -> None:
    assert view_folder(killed_after(tmp_path, 2)).names() == set(NEW)


def test_weights_file_and_index_are_found_by_their_final_name(tmp_path: Path) -> None:
    killed_after(tmp_path, 0)
    shard = "model-00001-of-00003.safetensors"
    assert Path(find_weights(tmp_path / shard).weights[0]).read_bytes() == NEW[shard]
    assert len(find_weights(tmp_path / "model.safetensors.index.json").weights) == 3


def test_file_that_keeps_its_name_is_seen_in_its_new_version(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": b"old", ".new": safetensors_bytes()})
    (tmp_path / JOURNAL_NAME).write_text(encode_journal(Journal({"model.safetensors": ".new"})))
    assert find_weights(tmp_path).weights == (str(tmp_path / ".new"),)


def test_empty_journal_is_a_copy_that_was_not_begun(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).touch()
    assert read_journal(tmp_path) is None


def test_journal_reads_back(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_text(encode_journal(JOURNAL))
    assert read_journal(tmp_path) == JOURNAL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        ({"renames": {}}, "is damaged"),
        ({"version": 2, "renames": {}}, "another version of fastload"),
        ({"version": 1}, "is damaged"),
        ({"version": 1, "renames": []}, "is damaged"),
        ({"version": 1, "renames": {}, "superseded": {}}, "is damaged"),
        ({"version": 1, "renames": {"a": 1}}, "plain names"),
        ({"version": 1, "renames": {"a": "../b"}}, "plain names"),
        ({"version": 1, "renames": {"a": "/b"}}, "plain names"),
        ({"version": 1, "renames": {"../a": "b"}}, "plain names"),
        ({"version": 1, "renames": {"a": "b\\c"}}, "plain names"),
        ({"version": 1, "renames": {"a": "\0"}}, "plain names"),
        ({"version": 1, "renames": {"a": "\ud800"}}, "plain names"),
        ({"version": 1, "renames": {"a": JOURNAL_NAME}}, "plain names"),
        ({"version": 1, "renames": {}, "superseded": [".."]}, "plain names"),
        ({"version": 1, "renames": {"a": "t", "b": "t"}}, "one that stands for two"),
    ],
)
def test_damaged_journal_is_rejected(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(FormatError, match=message) as caught:
        read_journal(tmp_path)
    assert caught.value.file == str(path)
    assert caught.value.fix
