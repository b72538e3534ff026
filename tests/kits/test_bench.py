"""The GPU benchmark: its formulas, its budget of time, what a failure leaves, its reader of profiles."""

import dataclasses
import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainjax.models import llama
from trainjax.models._model import abstract_params
from trainjax.nn import Decoder
from trainjax.tree import count

HERE = Path(__file__).parent
GPU = HERE.parents[1] / "gpu"
sys.path.append(str(GPU))  # the scripts there import one another as a script's neighbours

import bench  # noqa: E402
import bench_cases  # noqa: E402
import bench_report  # noqa: E402
import bench_trace  # noqa: E402
from bench_cases import MODELS, PROMPT, Case  # noqa: E402

H100 = {
    "platform": "gpu",
    "device": "NVIDIA H100 80GB HBM3",
    "published_flops": 989e12,
    "measured_flops": 700e12,
    "measured_bandwidth": 3.0e12,
}
CPU = H100 | {"platform": "cpu", "device": "cpu", "published_flops": None}


def num_weights(model: str) -> int:
    return count(abstract_params(Decoder(llama.config(MODELS[model]))))


@pytest.mark.parametrize(
    ("model", "weights"),  # as the model cards and the files on the hub have them
    [("135m", 134_515_008), ("1b", 1_235_814_400), ("8b", 8_030_261_248)],
)
def test_architectures_have_as_many_weights_as_published(model, weights):
    assert num_weights(model) == weights


# --- formulas -------------------------------------------------------------------------------------


def test_lora_needs_four_flops_a_frozen_weight_and_full_training_six():
    matrices = 32 * (
        2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    )  # of Llama 3.1 8B's layers
    settings = {"context": 0.0, "targets": 0.0, "adapter_size": 0}
    lora, full = (Case("8b", method, 4096, 1) for method in ("lora", "full"))
    assert bench_cases.needed_flops(lora, **settings) == 4 * matrices
    assert bench_cases.needed_flops(full, **settings) == 6 * matrices


def test_pairs_add_a_forward_pass_of_the_reference():
    case = Case("1b", "dpo", 2048, 1)

    def reference(context: float) -> float:
        settings = {"context": context, "targets": 1.0, "adapter_size": 7}
        alone, both = (bench_cases.needed_flops(case, **settings, pairs=p) for p in (False, True))
        return both - alone

    matrices = 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192) + 2048 * 128256
    assert reference(0.0) == 2 * matrices
    assert reference(100.0) - reference(0.0) == pytest.approx(4 * 16 * 2048 * 100)


@pytest.mark.parametrize("model", ["tiny", "135m", "1b", "8b"])
def test_a_decoded_token_reads_every_weight_but_an_untied_table_of_embeddings(model):
    c = MODELS[model]
    unread = 0 if c["tie_word_embeddings"] else c["vocab_size"] * c["hidden_size"]
    place = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]
    read = bench_cases.decode_bytes(Case(model, "generate", 100, 1))
    assert read == 2 * (num_weights(model) - unread + place * (PROMPT + 50))


def test_mfu_is_of_the_published_peak_or_of_what_was_measured():
    figures = {"tokens_per_second": 1e4, "flops_per_token": 3e10}
    assert bench_report.with_rates(figures, H100)["mfu"] == pytest.approx(3e14 / 989e12)
    assert bench_report.with_rates(figures, CPU)["mfu"] == pytest.approx(3e14 / 700e12)


def test_generation_is_of_the_published_bandwidth_or_of_what_was_measured():
    figures = {"tokens_per_second": 100.0, "bytes_per_token": 1.6e10}
    assert bench_report.with_rates(figures, H100)["bandwidth_share"] == pytest.approx(1.6 / 3.35)
    assert bench_report.with_rates(figures, CPU)["bandwidth_share"] == pytest.approx(1.6 / 3.0)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [Case("tiny", "lora", 512, 4), Case("8b", "lora", 4096, 2)])
def test_rows_are_packed_and_all_but_first_tokens_are_trained_on(case):
    batch = bench_cases.batch(case)
    real = batch["segments"] > 0
    assert batch["tokens"].shape == (case.rows, case.length)
    assert batch["segments"].max() > 1
    assert real.mean() > 0.9
    np.testing.assert_array_equal(batch["weights"] > 0, real & (batch["positions"] > 0))
    assert batch["weights"].sum() == pytest.approx(1)


def test_pairs_share_their_prompt_and_compare_completions():
    batch = bench_cases.batch(Case("tiny", "dpo", 512, 2))
    assert batch["groups"].sum() == pytest.approx(1)
    for row in range(2):
        for group in range(int((batch["groups"][row] > 0).sum())):
            chosen, rejected = (batch["completions"][row] == 2 * group + n for n in (1, 2))
            assert chosen.sum() == rejected.sum() > 0
            seen = {int(s) for s in batch["prefixes"][row][chosen | rejected]}
            assert len(seen) == 1  # one prompt for both
            assert (batch["segments"][row] == seen.pop()).sum() == 2 * (chosen.sum() + 1)


# --- the budget of time ---------------------------------------------------------------------------


class Clock:
    """A clock that a run of a case moves on."""

    def __init__(self, takes: float) -> None:
        self.time, self.takes, self.limits = 0.0, takes, []

    def run(self, case: str, limit: float) -> dict:
        self.limits.append(limit)
        self.time += min(self.takes, limit)
        return {"status": "done", "figures": {"tokens_per_second": 1.0}}


def test_cases_that_no_longer_fit_are_named_and_shorter_ones_go_on():
    long, short = Case("tiny", "lora", 512, 1, seconds=50), Case("tiny", "full", 512, 1, seconds=10)
    clock = Clock(takes=45)
    cases = [long, dataclasses.replace(long, rows=2), dataclasses.replace(long, rows=3), short]
    found = list(bench.results(cases, clock.run, 110, lambda: clock.time))
    assert [r["status"] for r in found] == ["done", "done", "not run", "done"]
    assert found[2]["why"] == "out of time: 20 s were left, it takes about 50"
    assert [r["name"] for r in found] == [case.name for case in cases]


def test_pairs_on_the_other_side_need_trl(monkeypatch):
    there = {"torch", "transformers", "peft"}
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name: name if name in there else None
    )
    assert bench.lacking(Case("1b", "dpo", 2048, 8, side="torch")) == ["trl"]
    assert bench.lacking(Case("8b", "lora", 4096, 2, side="torch")) == []


def test_no_case_runs_past_the_deadline():
    clock = Clock(takes=10**6)
    cases = [Case("tiny", "lora", 512, rows, seconds=50) for rows in (1, 2, 3, 4)]
    list(bench.results(cases, clock.run, 200, lambda: clock.time))
    assert clock.limits == [130, 70]
    assert clock.time == 200


def test_the_other_side_is_named_where_its_packages_are_missing(monkeypatch):
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name: None if name == "peft" else name
    )
    clock = Clock(takes=1)
    cases = [Case("tiny", "lora", 512, 1, side="torch"), Case("tiny", "lora", 512, 1)]
    found = list(bench.results(cases, clock.run, 100, lambda: clock.time))
    assert [(r["status"], r.get("why")) for r in found] == [
        ("not run", "peft cannot be imported"),
        ("done", None),
    ]


@pytest.mark.parametrize("cases", [bench_cases.GPU, bench_cases.CPU])
def test_every_case_has_a_name_of_its_own_and_one_is_profiled(cases):
    assert len({case.name for case in cases}) == len(cases)
    assert sum(case.profile for case in cases) == 1


def test_a_name_that_no_case_has_is_told():
    with pytest.raises(SystemExit, match="--only qlra: no case has that in its name; there are"):
        bench.chosen(bench_cases.CPU, ["qlra"], None)
    with pytest.raises(SystemExit, match="--profile tiny: it is none of the cases"):
        bench.chosen(bench_cases.CPU, None, "tiny")


# --- a case in a process of its own ---------------------------------------------------------------

CHILD = """
import json, pathlib, sys, time
case, result = sys.argv[sys.argv.index("--case") + 1], sys.argv[sys.argv.index("--result") + 1]
if case == "fails":
    print("begun", flush=True)
    raise MemoryError("17 GB were asked for")
if case == "hangs":
    time.sleep(60)
pathlib.Path(result).write_text(json.dumps({"tokens_per_second": 3.0}))
"""


def test_a_case_that_fails_or_hangs_leaves_its_reason_and_the_next_one_runs(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    run = bench.Runner(tmp_path, script)
    failed = run("fails", 60)
    assert (failed["status"], failed["why"]) == ("failed", "MemoryError: 17 GB were asked for")
    assert failed["log"][0] == "begun"
    assert run("hangs", 0.5) == {"status": "stopped", "why": "it took more than 0 s"}
    assert run("works", 60) == {"status": "done", "figures": {"tokens_per_second": 3.0}}


# --- aims and the page ----------------------------------------------------------------------------


def result(case: Case, **figures: float) -> dict:
    return {"name": case.name, **dataclasses.asdict(case), "status": "done", **figures}


OURS, THEIRS = Case("8b", "lora", 4096, 2), Case("8b", "lora", 4096, 2, side="torch")
MEASURED = [
    result(
        OURS,
        tokens_per_second=13000,
        mfu=0.44,
        peak_memory_bytes=45e9,
        dispatch_seconds=4e-4,
        compile_seconds=30.0,
    ),
    result(
        dataclasses.replace(OURS, remat="full"),
        tokens_per_second=10000,
        mfu=0.34,
        peak_memory_bytes=25e9,
        dispatch_seconds=2e-3,
        compile_seconds=30.0,
    ),
    result(THEIRS, tokens_per_second=9000, mfu=0.3, peak_memory_bytes=60e9, compile_seconds=0.0),
    result(
        Case("8b", "generate", 512, 1),
        tokens_per_second=140.0,
        bandwidth_share=0.67,
        peak_memory_bytes=17e9,
        compile_seconds=9.0,
    ),
]


def test_aims_are_judged_by_the_fastest_of_each_side():
    found = bench_report.aims(MEASURED, H100)
    assert [a["verdict"] for a in found] == ["missed", "met", "met", "met", "met"]
    values = [a["measured"] for a in found]
    assert values == pytest.approx([0.44, 13 / 9, 45 / 60, 0.67, 0.4])


def test_no_aim_is_judged_on_a_cpu_or_without_the_other_side():
    assert {a["verdict"] for a in bench_report.aims(MEASURED, CPU)} == {"not measured"}
    alone = [r for r in MEASURED if r["side"] == "trainjax"]
    verdicts = [a["verdict"] for a in bench_report.aims(alone, H100)]
    assert verdicts == ["missed", "not measured", "not measured", "met", "met"]


def report(probe: dict, cases: list) -> dict:
    return {
        "command": "python gpu/bench.py",
        "date": "2026-11-22",
        "seconds": 61.0,
        "minutes": 9.0,
        "machine": {
            "processor": "one",
            "cores": 2,
            "memory_gb": 24.0,
            "python": "3.12",
            "load": 0.1,
        },
        "versions": {"jax": "0.11.2", "trl": None},
        "probe": probe,
        "cases": cases,
        "aims": bench_report.aims(cases, probe),
        "costs": None,
    }


def page(probe: dict, cases: list) -> str:
    return bench_report.page(report(probe, cases))


def test_the_page_says_first_that_there_was_no_gpu():
    assert page(CPU, []).splitlines()[2].startswith("**No GPU was to be had.**")
    assert "No GPU" not in page(H100, MEASURED)


def test_a_refused_profile_is_told_on_the_page():
    told = bench_report.page(
        {**report(H100, MEASURED), "costs": {"case": OURS.name, "why": "CUPTI is not permitted"}}
    )
    assert "There is no profile: CUPTI is not permitted" in told


def test_the_page_names_what_was_not_measured_and_why():
    missing = result(Case("1b", "full", 4096, 4)) | {"status": "not run", "why": "out of time: 3 s"}
    assert "| 1b-full-4x4096-trainjax-projections | not run: out of time: 3 s |" in page(
        H100, [*MEASURED, missing]
    )


# --- profiles -------------------------------------------------------------------------------------


def test_costs_of_a_cpu_trace_leave_out_what_runs_inside_them():
    """Two runs of a scan over three layers, recorded with JAX 0.10.2."""
    trace = json.loads((HERE / "cpu.trace.json").read_text())
    costs = {cost.name: cost for cost in bench_trace.top_costs(trace, {"wrapped_tanh": "tanh"})}
    assert max(costs, key=lambda name: costs[name].seconds) == "ynn_fusion"  # the product
    assert (costs["ynn_fusion"].runs, costs["while.5"].runs) == (6, 2)
    assert costs["while.5"].seconds < 10e-6  # its 310 microseconds are its body's
    assert costs["wrapped_tanh"].source == "tanh"
    assert sum(cost.share for cost in costs.values()) == pytest.approx(1)


def test_costs_of_a_gpu_trace_are_those_of_its_streams():
    names = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        {
            "ph": "M",
            "pid": 1,
            "tid": 1,
            "name": "thread_name",
            "args": {"name": "Stream #13(Compute)"},
        },
        {"ph": "M", "pid": 1, "tid": 2, "name": "thread_name", "args": {"name": "XLA Modules"}},
        {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
    ]

    def span(pid: int, tid: int, start: float, took: float, name: str, op: str) -> dict:
        where = {"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": took}
        return where | {"name": name, "args": {"hlo_op": op}}

    spans = [
        span(1, 1, 0, 30, "nvjet_128x256", "gemm.1"),
        span(1, 1, 30, 10, "loop_add_fusion", "loop_add_fusion"),
        span(1, 1, 40, 20, "nvjet_128x256", "gemm.1"),
        span(1, 2, 0, 60, "jit_step", "jit_step"),
        span(2, 1, 0, 500, "while", "while"),
    ]
    found = bench_trace.top_costs({"traceEvents": names + spans})
    assert [(c.name, c.kernel, c.runs) for c in found] == [
        ("gemm.1", "nvjet_128x256", 2),
        ("loop_add_fusion", "", 1),
    ]
    assert found[0].share == pytest.approx(50 / 60)


def test_operations_are_traced_to_the_model_through_the_programs_text(tmp_path):
    (tmp_path / "module_0001.jit_step.after_optimizations.txt").write_text(
        '  %dot.7 = f32[8,8]{1,0} dot(%a, %b), metadata={op_name="jit(step)/jvp(Decoder)/layers/while/'
        'body/mlp/up/dot_general" source_file="x.py"}\n'
        "  ROOT %copy.2 = f32[8]{0} copy(%c)\n"
    )
    assert bench_trace.sources_of(tmp_path) == {"dot.7": "jvp(Decoder)/layers/mlp/up/dot_general"}


def test_the_example_of_a_shortened_source_holds():
    assert doctest.testmod(bench_trace) == (0, 1)


def test_a_folder_without_a_trace_is_told(tmp_path):
    with pytest.raises(ValueError, match="the profiler wrote no trace into"):
        bench_trace.read(tmp_path)


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_a_gpu_the_script_measures_small_models_and_writes_both_files(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    profile = "tiny-lora-4x512-trainjax-projections"
    command = [sys.executable, str(GPU / "bench.py"), "--out", str(tmp_path), "--only", "trainjax"]
    command += ["--profile", profile, "--minutes", "20"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    methods = {(r["model"], r["method"]) for r in report["cases"] if r["status"] == "done"}
    assert methods == {
        *(("tiny", method) for method in ("lora", "qlora", "full", "dpo", "generate")),
        ("135m", "lora"),
    }
    for case in report["cases"]:
        assert case["tokens_per_second"] > 0
        assert case["peak_memory_bytes"] > 0
        if "loss" in case:  # the same batch each time
            assert case["loss"][-1] < case["loss"][0]
    assert report["costs"]["case"] == profile
    assert len(report["costs"]["top"]) == 10
    assert any("Decoder" in cost["source"] for cost in report["costs"]["top"])
    text = (tmp_path / "bench.md").read_text()
    assert "**No GPU was to be had.**" in text
    assert f"## Where the time of `{profile}` goes" in text


def test_the_bundle_leaves_a_folder_alone_that_is_none(tmp_path):
    (tmp_path / "mine").write_text("x")
    done = subprocess.run([GPU / "bundle.sh", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path} holds something that is no bundle; name another folder\n",
    )
    assert (tmp_path / "mine").read_text() == "x"
