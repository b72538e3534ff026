"""Makes `jobset.json` from JobSet's custom resource definition: what the API server checks, without prose.

git clone --branch v0.12.0 https://github.com/kubernetes-sigs/jobset
python tests/kits/jobset_schema.py jobset/config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

SOURCE = {
    "source": "https://github.com/kubernetes-sigs/jobset/blob/v0.12.0/config/components/crd/bases",
    "file": "jobset.x-k8s.io_jobsets.yaml",
    "version": "v0.12.0",
    "licence": "Apache-2.0, The Kubernetes Authors",
    "changes": "descriptions left out, converted to JSON",
}


def without_descriptions(node: Any) -> Any:
    """The schema without its texts; a property may be called `description`, and stays."""
    if isinstance(node, dict):
        kept = {k: v for k, v in node.items() if k != "description" or not isinstance(v, str)}
        return {name: without_descriptions(value) for name, value in kept.items()}
    return [without_descriptions(value) for value in node] if isinstance(node, list) else node


if __name__ == "__main__":
    definition = yaml.safe_load(Path(sys.argv[1]).read_text())
    made = SOURCE | {"definition": without_descriptions(definition)}
    Path(__file__).with_name("jobset.json").write_text(
        json.dumps(made, separators=(",", ":")) + "\n"
    )
