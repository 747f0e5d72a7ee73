"""Write the tables of docs/models.md and docs/saes.md from what the tests find; runs those tests (about a minute)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

DOCS = Path(__file__).parent
FAMILIES, LAYOUTS = "tests/core/model/test_families.py", "tests/core/sae/test_layouts.py"
NAMES = {
    "llava": "LLaVA 1.5",
    "vipllava": "ViP-LLaVA",
    "llava_next_mistral": "LLaVA-NeXT (Mistral)",
    "llava_next_llama3": "LLaVA-NeXT (Llama 3)",
    "llava_onevision": "LLaVA-OneVision",
    "chameleon": "Chameleon, Anole",
    "janus": "Janus",
    "emu3": "Emu3",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL MoE",
    "qwen3_5": "Qwen3.5",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "paligemma": "PaliGemma, PaliGemma 2",
    "idefics2": "Idefics2",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "internvl": "InternVL",
    "pixtral": "Pixtral",
    "mistral3": "Mistral 3",
    "blip2_opt": "BLIP-2 (OPT)",
    "blip2_t5": "BLIP-2 (T5)",
    "instructblip_llama": "InstructBLIP (Vicuna)",
    "instructblip_t5": "InstructBLIP (T5)",
    "florence2": "Florence-2",
    "aya_vision": "Aya Vision",
    "ovis2": "Ovis2",
    "deepseek_vl": "DeepSeek-VL",
    "glm4v": "GLM-4V",
    "clip": "CLIP",
    "siglip": "SigLIP",
    "siglip2": "SigLIP 2",
}


def findings(*tests: str) -> dict[str, dict[str, str]]:
    """Parameter of a test -> what its tests recorded; `failed` where one of them failed."""
    verified: dict[str, dict[str, str]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *tests, f"--junitxml={report}", "-o", "junit_family=xunit1"],
            cwd=DOCS.parent,
            check=False,
        )
        for case in ElementTree.parse(report).iter("testcase"):
            name = case.get("name", "").partition("[")[2].rstrip("]")
            for item in case.iter("property"):
                verified[name][item.get("name", "")] = item.get("value", "")
            if case.find("failure") is not None or case.find("error") is not None:
                verified[name]["failed"] = case.get("name", "")
    return verified


def families_table(verified: dict[str, dict[str, str]]) -> str:
    """One row a family."""
    lines = ["| family | class | truncated − whole | roles | places | batched − alone |", "|---|---|---|---|---|---|"]
    for name, human in NAMES.items():
        row = verified[name]
        if "failed" in row:
            lines.append(f"| {human} | `{row.get('class', '?')}` | **{row['failed']} fails** | | | |")
            continue
        exact = f"{float(row['truncated - whole']):.0e}" if "truncated - whole" in row else "embeddings as the model's"
        roles = f"{row['image tokens']} image tokens" if "image tokens" in row else "two towers"
        places = row.get("boxes", "-")
        lines.append(
            f"| {human} | `{row['class']}` | {exact} | {roles} | {places} | {float(row['batched - alone']):.0e} |"
        )
    return "\n".join(lines).replace("0e+00", "0")


def layouts_table(verified: dict[str, dict[str, str]]) -> str:
    """One row a case of a layout."""
    lines = ["| layout | publisher | case | verified by | result |", "|---|---|---|---|---|"]
    for row in verified.values():
        if "layout" in row:
            result = f"**{row['failed']} fails**" if "failed" in row else "codes and reconstructions equal to 1e-5"
            lines.append(
                f"| `{row['layout']}` | {row['publisher']} | {row['what']} | {row['verified_by']} | {result} |"
            )
    return "\n".join(lines)


def put(page: str, table: str) -> None:
    """Replace what stands between the page's markers."""
    path = DOCS / page
    before, start, rest = path.read_text("utf-8").partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- /table -->")
    path.write_text(before + start + table + "\n" + end + after, "utf-8")


if __name__ == "__main__":
    put("models.md", families_table(findings(FAMILIES)))
    put("saes.md", layouts_table(findings(LAYOUTS)))
