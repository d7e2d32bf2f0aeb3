"""What all commands have in common: exit status, errors, pipes, progress bars."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastload
from fastload.cli import inspecting, main

Command = Callable[..., Any]


def test_the_version_is_the_packages(command: Command) -> None:
    assert command("--version").out == f"fastload {fastload.__version__}\n"


def test_help_names_every_command(command: Command) -> None:
    done = command("--help")
    assert done.status == 0
    for name in ("inspect", "plan", "load", "convert", "verify"):
        assert re.search(rf"^ +{name} ", done.out, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("inspect",),
        ("nonsense", "."),
        ("inspect", ""),
        ("plan", ".", "--dtype", "int8"),
        ("plan", ".", "--dtype", "nonsense"),
        ("convert", ".", "out", "--to", "gguf"),
        ("convert", ".", "out", "--max-shard-size", "many"),
        ("inspect", ".", "--subfolder", "../elsewhere"),
        ("verify", ".", "--variant", "a/b"),
    ],
)
def test_arguments_that_cannot_be_meant_exit_with_2(command: Command, arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert done.status == 2
    assert done.out == ""
    assert done.err


def test_an_error_is_its_message_on_stderr_without_a_traceback(process: Command, tmp_path: Path) -> None:
    done = process("-m", "fastload", "inspect", tmp_path)
    assert done.status == 1
    assert done.out == ""
    assert done.err.startswith("fastload: there are no files here at all\n  file:     ")
    assert "Traceback" not in done.err


@pytest.mark.parametrize("name", ["inspect", "plan", "load"])
def test_every_command_refuses_a_damaged_checkpoint_with_1(command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    done = command(name, tmp_path)
    assert done.status == 1
    assert str(tmp_path / "model.safetensors") in done.err


def test_an_interrupt_ends_quietly_with_130(
    command: Command, monkeypatch: pytest.MonkeyPatch, write_safetensors: Callable[..., Path], tensors: Any
) -> None:
    def interrupt(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspecting, "run", interrupt)
    done = command("inspect", write_safetensors(tensors))
    assert done == (130, "", "")


def test_a_reader_that_stops_reading_is_no_error(tmp_path: Path) -> None:
    # More than a pipe holds, so that the writer is still writing when the reader goes.
    save_file({f"layer.{number}.weight": torch.zeros(1) for number in range(5000)}, tmp_path / "model.safetensors")
    arguments = [sys.executable, "-m", "fastload", "inspect", str(tmp_path), "--json"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        assert writer.stdout.readline() == b"{\n"
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode == 141


def test_no_progress_bar_goes_into_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bert: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("fastload.progress._SHOW_AFTER_S", -1.0)
    assert main(["verify", str(bert)]) == 0
    assert main(["convert", str(bert), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert capsys.readouterr().err == ""


def test_work_of_more_than_a_second_shows_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bert: Path
) -> None:
    monkeypatch.setattr("fastload.progress._SHOW_AFTER_S", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["verify", str(bert)]) == 0
    captured = capsys.readouterr()
    assert "reading" in captured.err
    assert "reading" not in captured.out


def test_the_package_runs_as_a_module(process: Command, bert: Path) -> None:
    done = process("-m", "fastload", "verify", bert)
    assert done.status == 0
    assert done.err == ""
    assert done.out.endswith(f"{bert}: OK\n")
