"""transformers' own checks of loading and saving, without and with fastload: the outcomes must be the same.

`python -m tests.upstream` runs all families, `-k "bert or t5"` some; `--plugin ""` compares transformers with itself,
which shows what is flaky.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.upstream.fetching import cache_folder, fetch_checks
from tests.upstream.outcomes import Outcome, Test, compare, read_outcomes, table

HERE = Path(__file__).parent
CHECKS = HERE / "checks.py"
# More differences than this are no accident, and are reported as they are.
MOST_RERUNS = 20


def main() -> int:
    """Exit status: 0 where no outcome is worse with the plugin, else 1."""
    arguments = _arguments()
    home = fetch_checks(version("transformers"), cache_folder())
    say(f"transformers {version('transformers')}, as it is")
    stock = run(home, "", ["-k", arguments.keyword])
    say(f"with {arguments.plugin or 'nothing (as it is again)'}")
    loaded = run(home, arguments.plugin, ["-k", arguments.keyword])
    found = compare(stock, loaded)
    differences = [d for d in found if len(found) > MOST_RERUNS or differs_alone(d.test, home, arguments.plugin)]
    say(table(stock, differences))
    failing = sorted("::".join(test) for test, outcome in stock.items() if outcome.kind in ("failed", "error"))
    for title, lines in (
        ("worse", [d for d in differences if d.worse]),
        ("otherwise", [d for d in differences if not d.worse]),
        ("differed once, not when run alone", [d for d in found if d not in differences]),
        ("failing without the plugin", failing),
    ):
        if lines:
            say("\n".join([f"{title}:", *(f"  {line}" for line in lines)]))
    return int(any(difference.worse for difference in differences))


def run(home: Path, plugin: str, selection: list[str]) -> dict[Test, Outcome]:
    """Run checks in a process of their own.

    Args:
        home: folder that `fetch_checks` returned.
        plugin: module of a pytest plugin; "" for none.
        selection: arguments of pytest that choose tests.

    Raises:
        SystemExit: the run itself broke down: a crash, or a module that cannot be imported.
    """
    with tempfile.TemporaryDirectory() as scratch:
        junit = Path(scratch, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), f"--junitxml={junit}"]
        command += ["-p", plugin] if plugin else []
        command += selection if CHECKS.name in selection[0] else [*selection, str(CHECKS)]
        # The plugin is imported before pytest knows the paths of its ini file.
        path = os.pathsep.join([str(HERE.parent.parent), str(home), os.environ.get("PYTHONPATH", "")])
        status = subprocess.run(command, env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}).returncode
        if status not in (0, 1) or not junit.exists():
            raise SystemExit(f"pytest broke down with status {status}: {' '.join(command)}")
        return read_outcomes(junit)


def differs_alone(test: Test, home: Path, plugin: str) -> bool:
    """Whether a test comes out otherwise with the plugin when nothing else runs."""
    only = [f"{CHECKS}::{test[0].rpartition('.')[2]}::{test[1]}"]
    return bool(compare(run(home, "", only), run(home, plugin, only)))


def say(text: str) -> None:
    sys.stdout.write(f"\n{text}\n")
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__.partition("\n")[0])
    parser.add_argument("-k", dest="keyword", default="", help="only tests whose names match, as pytest's -k")
    parser.add_argument("--plugin", default="fastload.testing.hf_plugin", help="pytest plugin of the second run")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
