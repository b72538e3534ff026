"""From figures to a page: MFU, the share of the bandwidth limit, the aims, tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "B200": 8.0e12, "A100": 2.039e12}
"""Bytes/s of a chip's memory by its maker's data sheet (SXM parts; A100 of 80 GB), by a part of its name."""

HEADLINE = ("8b", "lora", 4096)

TORCHTUNE = """\
| model | method | on | peak memory | tokens/s |
|---|---|---|---:|---:|
| Llama 3.1 8B | full | 1x 4090 | 18.9 GiB | 1650 |
| Llama 3.1 8B | full | 1x A6000 | 37.4 GiB | 2579 |
| Llama 3.1 8B | LoRA | 1x 4090 | 16.2 GiB | 3083 |
| Llama 3.1 8B | LoRA | 1x A6000 | 30.3 GiB | 4699 |
| Llama 3.1 8B | QLoRA | 1x 4090 | 7.4 GiB | 2413 |

Batch size 2, packed to 2048, torch.compile on, over an epoch; other chips than this page's. Source: README of
pytorch/torchtune, "Memory and training speed", at commit 0031bfb080bd."""

Result = Mapping[str, Any]


def with_rates(result: Result, probe: Mapping[str, Any]) -> dict[str, Any]:
    """A case's figures with its MFU, or of generation its share of what the memory's bandwidth allows.

    `MFU = tokens/s * flops_per_token / peak`; `share = tokens/s * bytes_per_token / bandwidth`.

    Args:
        result: `tokens_per_second` and `flops_per_token` or `bytes_per_token`.
        probe: the device. Of a chip that has none published its measured rates are the limits.
    """
    rate = result["tokens_per_second"]
    if "flops_per_token" in result:
        peak = probe["published_flops"] or probe["measured_flops"]
        return {**result, "mfu": rate * result["flops_per_token"] / peak}
    share = rate * result["bytes_per_token"] / bandwidth(probe)
    return {**result, "bandwidth_share": share}


def bandwidth(probe: Mapping[str, Any]) -> float:
    """Bytes/s of the device's memory: published, or as measured where that is not known here."""
    published = (value for name, value in BANDWIDTH.items() if name in probe["device"])
    return next(published, probe["measured_bandwidth"])


def aims(results: Sequence[Result], probe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each aim with the figure that it is judged by: met, missed, or not measured.

    Of each side its fastest setting counts, for memory too.
    """
    done = [r for r in results if r["status"] == "done"] if probe.get("platform") == "gpu" else []
    headline = [r for r in done if (r["model"], r["method"], r["length"]) == HEADLINE]
    ours, theirs = (
        max(
            (r for r in headline if (r["side"] == "trainjax") == own),
            key=lambda r: r["tokens_per_second"],
            default=None,
        )
        for own in (True, False)
    )
    decoding = [
        r for r in done if (r["method"], r["model"], r["side"]) == ("generate", "8b", "trainjax")
    ]
    found = [
        ("8B LoRA bf16, packed 4096: MFU", 0.5, ours and ours["mfu"], "at least"),
        (
            "8B LoRA: tokens/s, times the other side's",
            1.3,
            ours and theirs and ours["tokens_per_second"] / theirs["tokens_per_second"],
            "at least",
        ),
        (
            "8B LoRA: peak memory, times the other side's",
            1.0,
            ours and theirs and ours["peak_memory_bytes"] / theirs["peak_memory_bytes"],
            "at most",
        ),
        (
            "8B generation, batch 1: share of the bandwidth limit",
            0.6,
            decoding[0]["bandwidth_share"] if decoding else None,
            "at least",
        ),
        (
            "8B LoRA: host time to dispatch a step, ms",
            1.0,
            ours and ours["dispatch_seconds"] * 1e3,
            "at most",
        ),
    ]
    return [
        {"aim": aim, "bound": f"{how} {bound:g}", "measured": value, "verdict": verdict}
        for aim, bound, value, how in found
        for verdict in [_verdict(value, bound, how)]
    ]


def _verdict(value: float | None, bound: float, how: str) -> str:
    if value is None:
        return "not measured"
    return "met" if (value >= bound if how == "at least" else value <= bound) else "missed"


def page(report: Mapping[str, Any]) -> str:
    """The whole page, in Markdown."""
    probe, results = report["probe"], report["cases"]
    parts = [
        "# Speed and memory on one accelerator",
        _opening(probe),
        f"```\n{report['command']}\n```",
        _machine(report),
        "## Aims",
        _table(
            ["aim", "asked", "measured", "verdict"],
            [[a["aim"], a["bound"], _number(a["measured"]), a["verdict"]] for a in report["aims"]],
        ),
        "## Training",
        _training([r for r in results if r["status"] == "done" and r["method"] != "generate"]),
        _TRAINING_NOTES,
        "## Generation",
        _generation([r for r in results if r["status"] == "done" and r["method"] == "generate"]),
        _GENERATION_NOTES,
    ]
    if report.get("costs"):
        parts += [f"## Where the time of `{report['costs']['case']}` goes", _costs(report["costs"])]
    missing = [r for r in results if r["status"] != "done"]
    if missing:
        parts += [
            "## Not measured",
            _table(["case", "why"], [[r["name"], f"{r['status']}: {r['why']}"] for r in missing]),
        ]
    parts += ["## What torchtune publishes", TORCHTUNE]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(probe: Mapping[str, Any]) -> str:
    if probe.get("platform") == "gpu":
        return f"Measured on one {probe['device']}."
    return (
        "**No GPU was to be had.** This is a run on a CPU, of small models and a few steps: it shows that "
        "each path runs, no aim is judged by it, and its figures say nothing about a GPU."
    )


def _machine(report: Mapping[str, Any]) -> str:
    probe, machine = report["probe"], report["machine"]
    lines = [
        f"{report['date']}, {report['seconds']:.0f} s in all (at most {report['minutes']:g} minutes)."
    ]
    host = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB"
    lines += [f"Machine: {host}, load {machine['load']:.1f} at the start."]
    if "measured_flops" in probe:
        published = probe["published_flops"]
        peak = f"{published / 1e12:.0f} TFLOP/s published, " if published else ""
        product, copy = probe["measured_flops"] / 1e12, probe["measured_bandwidth"] / 1e12
        limit = bandwidth(probe) / 1e12
        lines += [
            f"Device: {probe['device']}; {peak}{product:.3g} TFLOP/s in a large bf16 product.",
            f"Its memory: {limit:.3g} TB/s taken as the limit, {copy:.3g} in a copy.",
        ]
    named = (f"{name} {version}" for name, version in report["versions"].items() if version)
    lines += [f"Python {machine['python']}, {', '.join(named)}."]
    return "\n".join(lines)


def _training(results: Sequence[Result]) -> str:
    header = ["model", "method", "side", "rows x length", "kept", "tokens/s", "MFU", "peak, GB"]
    header += ["compile, s", "dispatch, ms"]
    return _table(
        header,
        [
            [
                *(r["model"], r["method"], _side(r), f"{r['rows']} x {r['length']}"),
                _KEPT[r["remat"]] + (", compiled" if r["compiled"] else ""),
                f"{r['tokens_per_second']:.4g}" + _pairs(r),
                f"{r['mfu']:.1%}",
                f"{r['peak_memory_bytes'] / 1e9:.2f}",
                _compile(r),
                f"{r['dispatch_seconds'] * 1e3:.2f}" if "dispatch_seconds" in r else "",
            ]
            for r in results
        ],
    )


_KEPT = {"projections": "products", "full": "layers' inputs", "none": "all"}

_TRAINING_NOTES = """\
Random weights, bf16 compute; LoRA of rank 16 on all linear layers over a frozen bf16 base (QLoRA: NF4 with
scales in eight bits), full training with float32 masters; AdamW, clipping at norm 1; medians of steps after
two. Tokens are real ones, and all but the first of an example are trained on (of pairs the completions).

*MFU* = tokens/s x FLOPs a token / peak. With N weights in the layers' matrices, H in the head, A in the
adapter, t the share of tokens trained on and c the mean number of tokens attended to, a token needs
`4 N + 4 t H + 6 A + 12 layers heads head_dim c` with frozen weights and
`6 N + 6 t H + 12 layers heads head_dim c` in full training: LoRA makes no gradient of N, and c is half an
example's length, causal attention being half of a square. DPO adds the reference's forward pass. What is
recomputed does not count. The peak is the published dense bf16 one, or on a CPU what a large product reaches.

*kept*: what the backward pass finds stored; with *layers' inputs* (gradient checkpointing) it runs each layer
again. *peak*: of the device's allocator (of the process on a CPU). *compile*: the first step less a median
one. *dispatch*: host time until the call of a step returns, the device being idle.

The other side: transformers' Llama with sdpa attention, bf16 autocast, an adapter in float32, fused AdamW, in
TRL's SFTTrainer where TRL can be imported (else a plain loop). Its rows are one text each, so it needs no
mask and separates no examples, which is in its favour; ours are packed with examples of a median of 300
tokens, or an eighth of a row. TRL's DPOTrainer pads each completion with a prompt of its own; its tokens are
counted as ours are, a prompt once. QLoRA has no other side here: it would need bitsandbytes."""

_GENERATION_NOTES = """\
Greedy, a prompt of 64 tokens, prefill included. The limit is the memory's bandwidth over the bytes that a
token needs: all weights in bf16 but the table of embeddings, and the mean length of the cache."""


def _pairs(result: Result) -> str:
    if "pairs_per_step" not in result:
        return ""
    return f" ({result['pairs_per_step'] / result['seconds_per_step']:.3g} pairs/s)"


def _compile(result: Result) -> str:
    compiles = result["side"] == "trainjax" or result["compiled"]
    return f"{result['compile_seconds']:.1f}" if compiles else ""


def _side(result: Result) -> str:
    return result.get("implementation", result["side"])


def _generation(results: Sequence[Result]) -> str:
    header = ["model", "side", "rows", "new tokens", "tokens/s", "share of limit", "peak, GB"]
    return _table(
        [*header, "compile, s"],
        [
            [
                *(r["model"], _side(r), str(r["rows"]), str(r["length"])),
                f"{r['tokens_per_second']:.4g}",
                f"{r['bandwidth_share']:.1%}",
                f"{r['peak_memory_bytes'] / 1e9:.2f}",
                _compile(r),
            ]
            for r in results
        ],
    )


def _costs(costs: Mapping[str, Any]) -> str:
    if "why" in costs:
        return f"There is no profile: {costs['why']}"
    return _table(
        ["operation", "kernel", "of the model's", "ms a step", "share", "runs a step"],
        [
            [
                *(f"`{c['name']}`", f"`{c['kernel']}`" if c["kernel"] else "", c["source"]),
                f"{c['seconds'] * 1e3 / costs['steps']:.2f}",
                f"{c['share']:.1%}",
                f"{c['runs'] / costs['steps']:g}",
            ]
            for c in costs["top"]
        ],
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "Nothing was measured."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
