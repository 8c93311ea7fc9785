"""Every public name has an example in its docstring, and all of them run, as somebody would type them."""

import asyncio
import doctest
import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import enginehouse
from enginehouse import Home, LocalCluster, hlapi

ROOT = Path(__file__).parents[2]
HLAPI = [name for name, value in vars(hlapi).items() if inspect.isclass(value) and value.__module__ == hlapi.__name__]
PUBLIC = {
    **{name: getattr(enginehouse, name) for name in enginehouse.__all__},
    **{f"hlapi.{name}": getattr(hlapi, name) for name in HLAPI},
    "PluginConfig": type(enginehouse.BuildConfig().plugin_config),
}
ADDRESSES = {"127.0.0.1:8400": "gateway", "127.0.0.1:8401": "builder", "127.0.0.1:8411": "executor"}


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of our own that has examples/, where engines are built once for all."""
    folder, before = tmp_path_factory.mktemp("docstrings"), Path.cwd()
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINEHOUSE_HOME", str(folder / "home"))
        os.chdir(folder)
        yield folder
        os.chdir(before)


def examples(public: object) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(recurse=False)
    return [test for test in finder.find(public, globs={}) if test.examples]


def run(test: doctest.DocTest) -> None:
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def addresses(test: doctest.DocTest) -> set[str]:
    return {address for address in ADDRESSES if test.docstring and address in test.docstring}


@pytest.mark.parametrize("name", PUBLIC)
def test_has_an_example_which_runs(name: str) -> None:
    tests = examples(PUBLIC[name])
    assert tests, f"{name} has no example"
    for test in tests:
        if not addresses(test):
            run(test)


def test_the_classes_of_models_have_the_example_of_their_base() -> None:
    for name in enginehouse.__dir__():
        if name.endswith("ForCausalLM"):
            assert ">>>" in str(getattr(enginehouse, name).__doc__)


async def test_examples_that_ask_a_cluster(here: Path) -> None:
    """Theirs is at the default ports, ours is not."""
    async with LocalCluster(Home.find(here / "cluster")) as cluster:
        store = Home.find(here / "cluster").store
        engine = enginehouse.build(ROOT / "examples" / "demo-model", store=store)
        engine.push(store, "demo")
        async with enginehouse.ExecutorClient(cluster.executors[0]) as executor:
            async for _ in executor.load("demo"):
                pass
        where = dict(zip(ADDRESSES, (cluster.gateway, cluster.builder, cluster.executors[0]), strict=True))
        count = 0
        for public in PUBLIC.values():
            for test in examples(public):
                for address in addresses(test):
                    for example in test.examples:
                        example.source = example.source.replace(address, where[address])
                    await asyncio.to_thread(run, test)
                    count += 1
        assert count == len(ADDRESSES)
