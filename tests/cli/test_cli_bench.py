"""fastload bench: loads and runs in fresh processes, beside transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastload.cli.measuring import Job, run_job
from fastload.errors import FastloadError
from tests.models.generation.causal import save_small

Command = Callable[..., Any]
STAGES = {"resolve", "open", "skeleton", "plan", "place", "finish"}


def test_the_table_has_both_libraries_side_by_side(command: Command, bert: Path) -> None:
    done = command("bench", bert, "--rounds", 1, "--no-cold")
    assert done.status == 0
    assert f"{bert}: BertModel, " in done.out
    assert re.search(r"fastload +transformers +ratio", done.out)
    for title in (
        "process start to first output",
        "import torch",
        "from_pretrained",
        "first forward",
        "second forward",
    ):
        assert re.search(rf"^ *(a )?{title} +[\d.]+ m?s +[\d.]+ m?s +[\d.]+ x$", done.out, flags=re.MULTILINE)
    for stage in STAGES:
        assert re.search(rf"^ +{stage} +[\d.]+ m?s +$", done.out, flags=re.MULTILINE)
    assert re.search(r"^private memory +[\d.]+ MB +[\d.]+ MB", done.out, flags=re.MULTILINE)
    assert "outputs differ by at most" in done.out
    assert "cold files" not in done.out


def test_a_decoder_is_measured_warm_and_cold(command: Command, tmp_path: Path) -> None:
    folder = save_small(tmp_path / "llama")
    values = command("bench", folder, "--rounds", 1, "--tokens", 5, "--json").values
    assert values["target"] == "LlamaForCausalLM"
    assert values["n_bytes"] == (folder / "model.safetensors").stat().st_size
    assert values["largest_difference"] < 1e-4 < values["largest_output"]
    kinds = [(row["state"], row["library"]) for row in values["rows"]]
    warm = [("warm", "fastload"), ("warm", "transformers")]
    # A file system in memory has no cold files, and the note says so.
    assert kinds in (warm + [("cold", library) for _, library in warm], warm)
    assert bool(values["notes"]) == (kinds == warm)
    for row in values["rows"]:
        medians = row["medians"]
        assert (medians["stages_ms"] is not None) == (row["library"] == "fastload")
        assert medians["private_bytes"] > 0
        spans = ("torch_s", "library_s", "load_s", "forward_s")
        assert sum(medians[span] for span in spans) == pytest.approx(medians["at_output"])
        assert len(row["rounds"]) == 1
    assert set(values["rows"][0]["medians"]["stages_ms"]) == STAGES


def test_a_checkpoint_that_does_not_load_is_an_error_that_says_why(command: Command, bert: Path) -> None:
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    done = command("bench", bert, "--rounds", 1)
    assert done.status == 1
    assert "fastload did not come to an end" in done.err
    assert "model.safetensors" in done.err


def test_numbers_that_cannot_be_meant_are_refused(command: Command, bert: Path) -> None:
    for arguments in (("--rounds", "0"), ("--tokens", "-1"), ("--rounds", "many")):
        assert command("bench", bert, *arguments).status == 2


def test_a_folder_that_is_not_there(command: Command, tmp_path: Path) -> None:
    assert command("bench", tmp_path / "nowhere").status == 1


def test_a_job_can_generate(tmp_path: Path) -> None:
    folder = save_small(tmp_path)
    job = Job(
        library="fastload",
        auto_class="AutoModelForCausalLM",
        folder=str(folder),
        tokens=(5, 6, 7),
        generate_options={"max_new_tokens": 4},
    )
    result = run_job(job)
    assert len(result["output"]) == len(result["at_tokens"]) == 4
    moments = [result["at_torch"], result["at_library"], result["at_model"], *result["at_tokens"]]
    assert moments == sorted(moments)


def test_what_went_wrong_in_the_process_is_in_the_error(tmp_path: Path) -> None:
    job = Job(library="no_such_library", auto_class="AutoModel", folder=str(tmp_path), tokens=(1,))
    with pytest.raises(FastloadError, match="No module named 'no_such_library'"):
        run_job(job)
