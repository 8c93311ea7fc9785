"""The tables of docs/models.md, made of the families' pages and of the cases that tests hold against their references.

PYTHONPATH=. python tests/unit/models_page.py writes them into the page; `test_models_page.py` holds that they are up to date.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf_models
import test_families
import test_families_experts
import test_families_gpt
import test_families_wide
import test_family_qwen
import test_quantized
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from builder_svc.models.families import families

PAGE = Path(__file__).parents[2] / "docs/models.md"


def tables() -> dict[str, str]:
    """Name of a marked place in the page -> the Markdown that belongs there."""
    return {"families": family_table(), "quantization": quantization_table()}


def family_table() -> str:
    """A row a page of families: architectures, class, GGUF, and the configurations that equal their reference."""
    cases = configurations()
    gguf: dict[str, list[str]] = {}
    for arch, class_name, _ in gguf_models.MODELS.values():
        ending = "Model" if class_name.endswith("LMHead") else "ForCausalLM"
        gguf.setdefault(class_name + ending, []).append(arch)
    rows = []
    for page in sorted(set(families().values()), key=lambda page: page.__doc__ or ""):
        names = page.ARCHITECTURES
        archs = dict.fromkeys(arch for name in names for arch in gguf.get(name, []))
        rows.append(
            (
                (page.__doc__ or "").partition(":")[0].rstrip("."),
                lines(names),
                f"`{page.CLASS_NAME}`",
                lines(archs) or "-",
                ", ".join(case for name in names for case in cases.get(name, [])),
            )
        )
    return table(("family", "`architectures`", "class", "GGUF", "configurations tested"), rows)


def configurations() -> dict[str, list[str]]:
    """Architecture -> the names of its cases."""
    found: dict[str, list[str]] = {"QWenLMHeadModel": list(test_family_qwen.CASES)}
    for module in (test_families, test_families_gpt, test_families_wide, test_families_experts):
        cases: Mapping[str, tuple[str, Any]] = module.CASES
        for name, (model_type, _) in cases.items():
            found.setdefault(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], []).append(name)
    return found


def quantization_table() -> str:
    """A row a case of a quantized checkpoint: how it comes, and what the engine holds."""
    rows = []
    for name, case in test_quantized.CASES.items():
        method = case.config.get("quant_method", "modelopt")
        stored = case.config.get("format") or case.config.get("checkpoint_format") or ""
        rows.append((f"`{method}`" + (f", {stored}" if stored else ""), name, case.form))
    return table(("method", "case tested", "in the engine"), rows)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def lines(names: Iterable[str]) -> str:
    return "<br>".join(f"`{name}`" for name in names)


def with_tables(text: str) -> str:
    """The page with the tables in their places."""
    for name, made in tables().items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = place.subn(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{PAGE} has {count} places for {name!r}")
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
