"""Writes the reference of the Python API, docs/api.md, out of its docstrings: python docs/make_api.py FILE."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from griffe import GriffeLoader, Parser
from griffe2md import do_format_signature, prepare_context, prepare_env
from jinja2 import ChoiceLoader, DictLoader, pass_context

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {
    "Generation": "LLM SamplingParams GuidedDecodingParams RequestOutput CompletionOutput TokenLogprobs GenerationResult "
    "GenerationExecutor KvCacheConfig ExecutorStats",
    "Models and engines": "AutoConfig AutoModelForCausalLM CausalLM Mapping PretrainedConfig BuildConfig QuantConfig CalibConfig "
    "QuantAlgo build Engine",
    "Clusters": "BuilderClient ExecutorClient GatewayClient LocalCluster Home",
    "Errors": "EnginehouseError",
}
HEAD = """# API reference

What `enginehouse` exports, and `enginehouse.hlapi`, the older names of TensorRT-LLM. Made from the docstrings by `make docs`.
"""
EXAMPLE = "**{{ section.title }}:**\n\n```pycon\n{{ section.value.contents }}\n```"
PARSER: Any = {"warn_unknown_params": False, "warn_missing_types": False}
WIDE = 1 << 20  # ruff breaks lines, nothing before it
OPTIONS: Any = {
    "show_signature_annotations": True,
    "show_if_no_docstring": False,
    "inherited_members": ["quantize", "plan", "write_quantized"],
}
OPTIONS |= {"members_order": "source", "summary": False, "heading_level": 3, "line_length": WIDE}


@pass_context
def signature(context: Any, name: str, function: Any, *_: Any, **__: Any) -> str:
    """A function as in a stub file, so that ruff can format it; each of its overloads."""
    stubs = []
    for one in function.overloads or [function]:
        for private in [parameter.name for parameter in one.parameters if parameter.name.startswith("_")]:
            del one.parameters[private]
        marks = ["overload"] * bool(function.overloads) + sorted(one.labels & {"classmethod", "staticmethod"})
        stub = "async " * ("async" in one.labels) + f"def {do_format_signature(context, name, one, WIDE)}: ..."
        stubs.append("".join(f"@{mark}\n" for mark in marks) + stub)
    return "\n".join(stubs)


def public() -> dict[str, list[Any]]:
    """What is public, by groups. Raises ValueError unless GROUPS has the names of `__all__`, each once."""
    loader = GriffeLoader(search_paths=[str(ROOT)], docstring_parser=Parser.google, docstring_options=PARSER)
    errors, _, package = (loader.load(name) for name in ("engine.errors", "builder_svc", "enginehouse"))
    names, exports = " ".join(GROUPS.values()).split(), [str(name) for name in package.exports or ()]
    if sorted(names) != sorted(exports):
        raise ValueError(f"GROUPS of docs/make_api.py and __all__ differ: {set(names) ^ set(exports)}")
    groups = {title: [package[name] for name in group.split()] for title, group in GROUPS.items()}
    groups["Errors"] += [error for error in errors.classes.values() if error.name not in names]
    groups["hlapi"] = [one for one in package["hlapi"].classes.values() if one.is_public and not one.is_alias]
    values = ", ".join(f"`{value}`" for value in package["QuantAlgo"].members)
    package["QuantAlgo"].docstring.value += f"\n\nValues: {values}."
    models = ", ".join(f"`{name}`" for name in package.attributes if name.endswith("ForCausalLM"))
    package["CausalLM"].docstring.value += f"\n\nIts classes, one for each kind of model: {models}."
    return groups


def render(groups: dict[str, list[Any]]) -> str:
    """The page, but for the format of its code."""
    env = prepare_env()
    env.loader = ChoiceLoader([DictLoader({"docstring/admonition.md.jinja": EXAMPLE}), env.loader])
    env.filters["format_signature"] = signature
    env.filters["heading"] = lambda title, level: f"{'#' * level} {title.replace('`enginehouse.', '`')}"
    contents, text = "", ""
    anchors: dict[str, str] = {}
    for title, objects in groups.items():
        text += f"## {title}\n\n"
        for obj in objects:
            if obj.is_class and obj.resolved_bases and obj.resolved_bases[0].name.startswith("_"):
                obj.final_target.members["__init__"] = obj.resolved_bases[0].members["__init__"]
            context = prepare_context(obj, OPTIONS | {"show_bases": title == "Errors"})
            text += env.get_template(f"{obj.kind.value}.md.jinja").render(**context)
            anchor = obj.path.removeprefix("enginehouse.").replace(".", "").lower()
            anchors |= {key: anchor for key in (obj.path, obj.canonical_path, obj.name) if key not in anchors}
        contents += f"- {title}: " + ", ".join(f"[`{obj.name}`](#{anchors[obj.path]})" for obj in objects) + "\n"

    def link(found: re.Match[str]) -> str:
        return f"[{found[1]}](#{anchors[found[2]]})" if found[2] in anchors else found[1]

    text = re.sub(r"\[([^][]+)\]\(#([\w.,]+)\)", link, text)
    text = re.sub(r"<code>(.*?)</code>", lambda code: code[0] if "](" in code[1] else f"`{code[1]}`", text)
    return re.sub(r"\n{3,}", "\n\n", f"{HEAD}\n{contents}\n{text}").rstrip() + "\n"


if __name__ == "__main__":
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", "docs/api.md", "-"]
    page = subprocess.run(ruff, input=render(public()), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    page = re.sub(r"(?m)^def ([A-Z]\w*\([^`]*?\)) -> None: \.\.\.$", r"\1", page)  # of classes
    Path(sys.argv[1]).write_text(page, encoding="utf-8")
