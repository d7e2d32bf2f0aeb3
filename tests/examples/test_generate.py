"""The example that makes a text from a prompt."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastload.examples import generate
from tests.models.generation.causal import save_small
from tests.models.generation.tokenizing import byte_level

COMMAND = [sys.executable, "-m", "fastload.examples.generate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, its tokenizer and a chat template."""
    tokenizer = byte_level()
    folder = save_small(tmp_path_factory.mktemp("llama"), vocab_size=tokenizer.get_vocab_size())
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}")
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    texts = [str(argument) for argument in arguments]
    return subprocess.run([*COMMAND, *texts], capture_output=True, text=True, timeout=120, check=False)


def text_of(out: str) -> str:
    """What was generated, the prompt included: all but the table."""
    return out.partition("\n\n       ")[0]


def test_the_text_and_what_it_took_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([str(folder), "--prompt", "the quick", "--max-new-tokens", "9"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("the quick")
    assert len(text_of(out)) > len("the quick")
    assert re.search(r"^tokens +9$", out, flags=re.MULTILINE)
    for title in ("model loaded after", "first token after", "tokens per second", "private memory", "read from disk"):
        assert re.search(rf"^{title} +\d", out, flags=re.MULTILINE)


def test_the_same_seed_gives_the_same_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for options in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--temperature", "0"]):
        arguments = [str(folder), "--prompt", "dog", "--temperature", "0.9", "--top-k", "40", "--top-p", "0.95"]
        assert generate.main([*arguments, *options]) == 0
        texts.append(text_of(capsys.readouterr().out))
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("way", [["--memory", "auto"], ["--stream"], ["--lazy"], ["--dtype", "float64"]], ids=str)
def test_however_weights_come_the_text_is_the_same(
    folder: Path, way: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder), "--prompt", "the lazy", "--max-new-tokens", "12"]
    assert generate.main(arguments) == 0
    plain = text_of(capsys.readouterr().out)
    assert generate.main([*arguments, *way]) == 0
    assert text_of(capsys.readouterr().out) == plain


def test_a_prompt_can_be_put_into_the_chat_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder), "--max-new-tokens", "12"]
    assert generate.main([*arguments, "--prompt", "stop", "--chat"]) == 0
    chatted = capsys.readouterr().out.removeprefix("stop\n\n")
    assert generate.main([*arguments, "--prompt", "[user] stop "]) == 0
    assert text_of(capsys.readouterr().out).removeprefix("[user] stop ") == text_of(chatted)


def test_what_a_terminal_would_obey_is_not_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([str(folder), "--prompt", "a\x1b[2J\tb", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("a\\x1b[2J\tb")


def test_beside_transformers_the_tokens_are_the_same(folder: Path) -> None:
    done = run(folder, "--prompt", "the quick", "--max-new-tokens", 9, "--temperature", 0.8, "--compare")
    assert done.stderr == ""
    assert done.returncode == 0
    assert "all 9 tokens are the same" in done.stdout
    assert re.search(r"^tokens per second +[\d.]+ +[\d.]+$", done.stdout, flags=re.MULTILINE)
    assert done.stdout.count(text_of(done.stdout)) == 2


def test_a_ctrl_c_ends_it_and_shows_what_there_was(folder: Path) -> None:
    arguments = [str(folder), "--prompt", "the quick", "--max-new-tokens", "1000000"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(40).startswith(b"the quick")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "interrupted"
    assert "Traceback" not in err.decode()
    assert "tokens per second" in out.decode()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert generate.main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


def test_what_cannot_be_done_is_an_error_in_words(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no tokenizer" in refused(capsys, tmp_path, "--prompt", "x")
    assert "has no tokens" in refused(capsys, folder, "--prompt", "")
    assert "temperature" in refused(capsys, folder, "--prompt", "x", "--temperature", -1)
    assert refused(capsys, folder, "--prompt", "x", "--memory", "1kB").startswith("the memory budget is too small")
    assert "dtype" in refused(capsys, folder, "--prompt", "x", "--dtype", "float7")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert "config.json" in refused(capsys, tmp_path, "--prompt", "x")
