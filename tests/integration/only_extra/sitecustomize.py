"""Makes a Python process, and those it starts, see only what one extra of pyproject.toml installs.

Put this directory on PYTHONPATH and the extra's name into ENGINEHOUSE_ONLY, behind commas others that it has beside.
Modules of all other distributions, and the packages of the other services, are as if they were not there.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import sys

SERVICES = {"builder": "builder_svc", "executor": "executor_svc", "gateway": "gateway"}


def distributions(extra: str) -> set[str]:
    """Names of what `pip install enginehouse[extra]` installs, normalized."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: set[str] = set()
    todo = [("enginehouse", extra)]
    seen = set(todo)
    while todo:
        name, wanted = todo.pop()
        found.add(canonicalize_name(name))
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": wanted}):
                continue
            for part in (requirement.extras or {""}) | {""}:
                if (requirement.name, part) not in seen:
                    seen.add((requirement.name, part))
                    todo.append((requirement.name, part))
    return found


def hide(extra: str, *more: str) -> None:
    from packaging.utils import canonicalize_name

    mine = distributions(extra).union(*(distributions(one) for one in more))
    modules = importlib.metadata.packages_distributions()
    hidden = {module for module, owners in modules.items() if not mine & {canonicalize_name(owner) for owner in owners}}
    others = {package for name, package in SERVICES.items() if name != extra} | {"enginehouse"}

    class OnlyExtra(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
            return None if fullname.partition(".")[0] in hidden else super().find_spec(fullname, path, target)

    class NotOurs(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
            if fullname.partition(".")[0] in others:
                raise ModuleNotFoundError(f"{fullname} is not part of extra {extra}", name=fullname)

    for loaded in [name for name in sys.modules if name.partition(".")[0] == "packaging"]:
        del sys.modules[loaded]
    sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = OnlyExtra
    sys.meta_path.insert(0, NotOurs())


if os.environ.get("ENGINEHOUSE_ONLY"):
    hide(*os.environ["ENGINEHOUSE_ONLY"].split(","))
