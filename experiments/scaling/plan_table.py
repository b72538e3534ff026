"""What `trainjax plan` predicts of full training on 8 to 1024 devices; see README.md.

python experiments/scaling/plan_table.py --out experiments/scaling/plan_table.json
python experiments/scaling/plan_table.py --show experiments/scaling/plan_table.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trainjax.parallel.devices import DEVICES, axis_bandwidth
from trainjax.parallel.roofline import roofline

HERE = Path(__file__).parent
MODELS, COUNTS, KINDS = ("8b", "70b", "405b"), (8, 64, 256, 1024), ("v5p", "h100")
LENGTH = 4096


def planned(model: str, count: int) -> dict[str, Any]:
    """One row of `LENGTH` tokens a device, every weight trained, all devices one axis, fsdp."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        flags = {
            "model": HERE / "models" / f"llama-3.1-{model}",
            "device": "v5p",
            "devices": count,
            "batch-size": count,
            "max-length": LENGTH,
            "remat": "full",
            "json": file.name,
        }
        given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "trainjax.cli", "plan", "--full", *given]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(file.name).read_text())["plans"][0]


def lines(model: str, count: int, plan: dict[str, Any]) -> list[str]:
    """The table's lines: one a kind of device, from the same program."""
    found = []
    traffic = plan["roofline"]["memory"] * DEVICES["v5p"].bandwidth
    for kind in KINDS:
        device = DEVICES[kind]
        times = roofline(
            device, plan["mesh"], flops=plan["flops"], traffic=traffic, sent=plan["sent"]
        )
        links = times.overlapped + times.exposed
        speed = axis_bandwidth(device, plan["mesh"], "fsdp")
        mfu = plan["model_flops"] / (times.step * device.flops * count)
        memory = plan["memory"]["total"]
        cells = [model.upper(), f"{count}", kind, f"{memory / 1e9:.1f}"]
        cells += ["yes" if memory <= device.memory else "no", f"{plan['flops'] / 1e12:.0f}"]
        cells += [f"{sum(plan['sent'].values()) / 1e9:.1f}", f"{speed / 1e9:.0f}"]
        cells += [f"{times.compute:.2f}", f"{links:.2f}", f"{times.compute / links:.2f}"]
        apart = times.compute / (times.compute + links)
        cells += [f"{times.compute / times.step:.0%}", f"{apart:.0%}", f"{mfu:.0%}"]
        found.append(f"| {' | '.join(cells)} |")
    return found


def main() -> None:
    """Runs every setting and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path)
    given = parser.parse_args()
    known = json.loads(given.show.read_text()) if given.show else {}
    for model in MODELS:
        for count in COUNTS:
            name = f"{model} on {count}"
            if given.show is None:
                known[name] = planned(model, count)
                given.out.write_text(json.dumps(known, indent=1) + "\n")
            for line in lines(model, count, known[name]):
                print(line, flush=True)


if __name__ == "__main__":
    main()
