"""Completion, as a shell does it: bash runs the script, and click's own protocol for zsh and fish."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import standin
from click.testing import CliRunner

from engine import names, registry
from engine.backends import open_store
from enginehouse.cli import main
from enginehouse.home import Home

# what bash does at a Tab: the words, the number of the one that is being typed, then the function of the script
TAB = """
eval "$(enginehouse completion bash)"
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_enginehouse_completion enginehouse
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    store = open_store(Home(folder).store)
    for name in ("demo", "dense", "gone"):
        standin.publish(store, name)
    registry.set_name(store, "other", registry.resolve(store, "demo").engine_id)
    names.remove_name(store, "gone")
    return folder


@pytest.fixture
def environment(home: Path, tmp_path: Path) -> dict[str, str]:
    """With `enginehouse` on the path, as an installation has it."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "enginehouse"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom enginehouse.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ENGINEHOUSE_")}
    path = os.pathsep.join((str(tmp_path / "bin"), os.environ["PATH"]))
    return kept | {"ENGINEHOUSE_HOME": str(home), "PATH": path}


def complete(words: str, incomplete: str = "", *, home: Path) -> list[str]:
    """What is offered, in click's protocol for fish: a line of "type,value[tab help]" each."""
    asked = {
        "_ENGINEHOUSE_COMPLETE": "fish_complete",
        "COMP_WORDS": f"enginehouse {words} {incomplete}".strip(),
        "COMP_CWORD": incomplete,
        "ENGINEHOUSE_HOME": str(home),
    }
    result = CliRunner().invoke(main, [], env=asked, prog_name="enginehouse")
    assert result.stderr == ""
    return [line.partition(",")[2].partition("\t")[0] for line in result.stdout.splitlines() if line]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_commands_options_and_names(environment: dict[str, str]) -> None:
    def tab(*words: str) -> list[str]:
        done = subprocess.run(
            ["bash", "--norc", "-c", TAB, "bash", *words], env=environment, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout.split()

    assert tab("enginehouse", "be") == ["bench"]
    assert tab("enginehouse", "generate", "x", "--model", "de") == ["demo", "dense"]


def test_names_and_ids_of_the_store(home: Path, tmp_path: Path) -> None:
    store = open_store(Home(home).store)
    engine = registry.resolve(store, "demo").engine_id
    assert complete("generate x --model", home=home) == ["demo", "dense", "other"]
    assert complete("chat --model", "o", home=home) == ["other"]
    assert complete("models rm", "d", home=home) == ["demo", "dense"]
    assert complete("engines inspect", engine[:5], home=home) == [engine[:12]]
    assert complete("engines inspect", engine[:20], home=home) == [engine]
    assert set(complete("load", home=home)) >= {"demo", "dense", "other", engine[:12]}
    assert complete("plan --gpu", "RTX", home=home) == ["RTX-4090", "RTX-5090", "RTX-3090"]
    elsewhere = open_store(str(tmp_path / "elsewhere store"))
    standin.publish(elsewhere, "far")
    for url in (str(tmp_path / "elsewhere store"), elsewhere.url):
        assert complete(f"models --store '{url}' rm", home=home) == ["far"]
        assert complete(f"engines rm --store '{url}'", "f", home=home) == ["far"]


def test_nothing_is_said_where_nothing_is_known(home: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert complete("generate x --model", home=nowhere) == []
    assert not nowhere.exists()
    assert complete("models rm --store s3://bucket/prefix", home=home) == []
    assert complete("models rm --store 's3:///?'", home=home) == []
    (home / "cluster.json").write_text("{")
    record = next((home / "store" / "models" / "dense").glob("*.json"))
    record.write_text("damaged")
    assert complete("generate x --model", home=home) == ["demo", "other"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0 and f"_ENGINEHOUSE_COMPLETE={shell}_complete" in result.stdout
    if program := shutil.which(shell):
        checked = subprocess.run([program, "-n"], input=result.stdout, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_a_tab_is_quick(environment: dict[str, str]) -> None:
    """In the processor's time, since other tests run beside this one; and it brings none of the heavy packages."""
    asked = environment | {
        "_ENGINEHOUSE_COMPLETE": "bash_complete",
        "COMP_WORDS": "enginehouse load ",
        "COMP_CWORD": "2",
    }
    code = (
        "import sys, time; began = time.process_time()\n"
        "try:\n    from enginehouse.cli import main; main(prog_name='enginehouse')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'grpc', 'rich', 'transformers', 'asyncio'} & set(sys.modules)\n"
        "print(time.process_time() - began, heavy or '', file=sys.stderr)"
    )
    best = 10.0
    for _ in range(3):
        wall = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True)
        assert "plain,demo" in done.stdout, done.stderr
        seconds, _, heavy = done.stderr.strip().partition(" ")
        assert heavy == ""
        best = min(best, float(seconds), time.perf_counter() - wall)
    assert best < 0.5
