"""Write the memory table of docs/training.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scanloom.training.memory import state_memory

DOCUMENT = Path(__file__).with_name("training.md")
BEGIN, END = "<!-- computed by docs/training_memory.py -->\n", "<!-- end of what is computed -->\n"
MODELS = {"SD 2.1, 0.866": 0.866e9, "SDXL, 2.6": 2.6e9, "SD3 medium, 2.0": 2.0e9}
OFFLOADED = {"offload_optimizer": True}
SETTINGS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("zero_stage: 0", 1, {"zero_stage": 0}),
    ("zero_stage: 1, offload_optimizer", 1, {"zero_stage": 1} | OFFLOADED),
    ("zero_stage: 3, both offloads", 1, {"zero_stage": 3, "offload_parameters": True} | OFFLOADED),
    ("zero_stage: 0", 8, {"zero_stage": 0}),
    ("zero_stage: 1", 8, {"zero_stage": 1}),
    ("zero_stage: 2", 8, {"zero_stage": 2}),
    ("zero_stage: 2, offload_optimizer", 8, {"zero_stage": 2} | OFFLOADED),
    ("zero_stage: 3", 8, {"zero_stage": 3}),
    ("zero_stage: 3, offload_optimizer", 8, {"zero_stage": 3} | OFFLOADED),
    ("zero_stage: 3, both offloads", 8, {"zero_stage": 3, "offload_parameters": True} | OFFLOADED),
)


def memory_table() -> str:
    """GB on each GPU, and of host memory for each GPU where some is used, when every weight is trained in bf16."""
    heads = "".join(f" {name} billion |" for name in MODELS)
    lines = [f"| GPUs | setting |{heads}", "|---:|---|" + "---:|" * len(MODELS)]
    for setting, workers, options in SETTINGS:
        cells = []
        for parameters in MODELS.values():
            held = state_memory(parameters, parameters, workers=workers, **options)
            cells.append(f"{held.device / 1e9:.1f}" + (f" + host {held.host / 1e9:.1f}" if held.host else ""))
        lines.append(f"| {workers} | `{setting}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def document() -> str:
    """The document with the table as it is now computed."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + memory_table() + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
