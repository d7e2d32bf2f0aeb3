"""transformers' own checks, out of its source distribution."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

__all__ = ["PACKAGE", "cache_folder", "fetch_checks"]

PACKAGE = "transformers_tests"


def cache_folder() -> Path:
    """Where fetched checks are kept between runs, outside this repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastload-tests"


def fetch_checks(version: str, cache: Path) -> Path:
    """A folder to import `transformers_tests` from: what the source distribution of this version has of tests.

    Raises:
        subprocess.CalledProcessError: pip finds no such distribution.
    """
    home = cache / f"transformers-{version}"
    if not home.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _download(version, Path(scratch))
            (archive,) = Path(scratch).glob("*.tar.gz")
            fresh = Path(scratch, "fresh")
            _unpack_tests(archive, fresh / PACKAGE)
            shutil.move(fresh, home)
    return home


def _download(version: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--no-binary", "transformers", "--dest", str(folder), f"transformers=={version}"], check=True
    )


def _unpack_tests(archive: Path, package: Path) -> None:
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    with tarfile.open(archive) as distribution:
        for member in distribution.getmembers():
            parts = Path(member.name).parts
            content = distribution.extractfile(member) if parts[1:2] == ("tests",) and len(parts) == 3 else None
            if content is not None:
                (package / parts[2]).write_bytes(content.read())
    _complete(package, package / "test_modeling_common.py")


def _complete(package: Path, module: Path) -> None:
    """Put empty classes in the place of what a module inherits from and the distribution lacks.

    These are checks of generating and exporting, which are no concern here.
    """
    for node in ast.walk(ast.parse(module.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level != 1 or node.module is None:
            continue
        neighbour = package.joinpath(*node.module.split(".")).with_suffix(".py")
        if not neighbour.exists():
            neighbour.parent.mkdir(parents=True, exist_ok=True)
            (neighbour.parent / "__init__.py").touch()
            neighbour.write_text("".join(f"class {alias.name}:\n    pass\n\n\n" for alias in node.names))
