"""Files that fail while a model runs: an error that names the block and the file, for good, and no hang."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastload
from fastload.errors import BlockError
from tests.cold import wait_for_no_threads
from tests.streaming.stacks import BLOCK_BYTES, Stack, on_meta, output


@pytest.fixture
def path(stack_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(stack_file, tmp_path))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def check(caught: pytest.ExceptionInfo[BlockError], path: Path) -> None:
    assert caught.value.file == str(path)
    assert caught.value.key
    assert f"file:     {path}" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as in the files", "cast"])
def test_lazy_blocks_of_a_file_that_was_cut(path: Path, dtype: torch.dtype) -> None:
    model = on_meta()
    fastload.load_model(model, path, lazy=True, dtype=dtype)
    cut(path)
    for _ in range(2):
        with pytest.raises(BlockError) as caught:
            output(model)
        check(caught, path)
        with pytest.raises(BlockError) as caught:
            fastload.wait(model)
        check(caught, path)


def test_what_goes_wrong_in_the_background_is_raised_by_wait_and_forward(path: Path) -> None:
    model = on_meta()
    fastload.load_model(model, path, lazy=True, dtype=torch.bfloat16)
    cut(path)
    # Begun by hand, as a file that is cut in the middle of a page that is being read would end the process.
    deferred = next(iter(model._forward_pre_hooks.values())).func.__self__  # type: ignore[attr-defined]
    deferred.bring_in_background()
    wait_for_no_threads()
    for use in (fastload.wait, output):
        with pytest.raises(BlockError) as caught:
            use(model)
        check(caught, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as in the files", "cast"])
def test_passing_blocks_of_a_file_that_was_cut_between_forwards(
    stack_file: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    # What is in no block stays, and lies in another file.
    tensors = load_file(stack_file)
    shards = {key: "blocks.safetensors" if key.startswith("blocks.") else "rest.safetensors" for key in tensors}
    for shard in set(shards.values()):
        save_file({key: tensors[key] for key in tensors if shards[key] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    path = tmp_path / "blocks.safetensors"
    # In a process of its own: what touched pages behind the end of the file would kill it.
    script = f"""
        import os
        import torch
        import fastload
        from fastload.errors import BlockError
        from tests.streaming.stacks import BLOCK_BYTES, on_meta, output

        models = [on_meta(), on_meta()]
        for model, path in zip(models, [{str(tmp_path)!r}, {str(stack_file)!r}]):
            fastload.load_model(model, path, memory_budget=26_000 + 3 * BLOCK_BYTES * {dtype.itemsize} // 4,
                                dtype={dtype})
        before = [output(model) for model in models]
        assert torch.equal(*before)
        os.truncate({str(path)!r}, os.path.getsize({str(path)!r}) // 2)
        for _ in range(2):
            try:
                output(models[0])
            except BlockError as error:
                assert error.file == {str(path)!r} and error.key.startswith("blocks."), error
            else:
                raise SystemExit("no error")
            assert torch.equal(output(models[1]), before[1])
        print("alive")
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "alive\n"), ran.stderr


def test_what_stays_of_a_file_that_was_cut_between_forwards(stack_file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(stack_file, tmp_path))
    model = on_meta()
    fastload.load_model(model, path, memory_budget=26_000 + 3 * BLOCK_BYTES)
    output(model)
    cut(path)
    for _ in range(2):
        with pytest.raises(BlockError) as caught:
            output(model)
        check(caught, path)


@pytest.mark.parametrize("becomes", ["nothing", "a directory", "another file"])
def test_a_file_whose_name_is_lost_is_read_on(path: Path, becomes: str) -> None:
    model: Stack = on_meta()
    fastload.load_model(model, path, memory_budget=26_000 + 3 * BLOCK_BYTES)
    expected = output(model)
    path.unlink()
    if becomes == "a directory":
        path.mkdir()
    elif becomes == "another file":
        path.write_bytes(b"of another length")
    for _ in range(2):
        assert torch.equal(output(model), expected)
