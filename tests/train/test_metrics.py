import errno
import json
import resource
import sys
import types

import jax
import pytest

from trainjax import retries
from trainjax.train import metrics


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, records, **options):
    with metrics.jsonl(path, **options) as sink:
        for record in records:
            sink(record)


def steps(*numbers):
    return [{"step": number, "loss": 1.0 / number} for number in numbers]


class TestJsonl:
    def test_a_record_is_a_line(self, tmp_path):
        write(tmp_path / "m", steps(1, 2, 3))
        assert lines(tmp_path / "m") == steps(1, 2, 3)

    def test_a_line_is_there_as_soon_as_it_was_written(self, tmp_path):
        with metrics.jsonl(tmp_path / "m") as sink:
            sink(steps(1)[0])
            assert lines(tmp_path / "m") == steps(1)

    def test_numbers_come_back_bitwise(self, tmp_path):
        write(tmp_path / "m", [{"step": 1, "loss": 0.1 + 0.2}])
        assert lines(tmp_path / "m")[0]["loss"] == 0.1 + 0.2

    def test_resuming_removes_the_records_after_the_checkpoint(self, tmp_path):
        write(tmp_path / "m", steps(1, 2, 3, 4))
        write(tmp_path / "m", steps(3, 4, 5), after_step=2)
        assert lines(tmp_path / "m") == steps(1, 2, 3, 4, 5)

    def test_an_evaluation_of_a_kept_step_is_kept(self, tmp_path):
        records = [*steps(1, 2), {"step": 2, "eval_loss": 3.0}, *steps(3)]
        write(tmp_path / "m", records)
        write(tmp_path / "m", [], after_step=2)
        assert lines(tmp_path / "m") == records[:3]

    @pytest.mark.parametrize(
        "half", ['{"step": 3, "lo', '{"step"', "3", '{"loss": 1.0}', "\x00\x00"]
    )
    def test_the_half_line_of_a_killed_process_is_removed(self, tmp_path, half):
        write(tmp_path / "m", steps(1, 2))
        with (tmp_path / "m").open("a") as file:
            file.write(half)
        write(tmp_path / "m", steps(3), after_step=2)
        assert lines(tmp_path / "m") == steps(1, 2, 3)

    def test_nothing_else_is_left_in_the_folder(self, tmp_path):
        write(tmp_path / "m", steps(1))
        write(tmp_path / "m", steps(2), after_step=1)
        assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_tensorboard_reads_the_scalars(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    with metrics.tensorboard(tmp_path) as sink:
        sink({"step": 3, "loss": 0.5, "mfu": None})
    (file,) = tmp_path.iterdir()
    events = [event for event in loader.EventFileLoader(str(file)).Load() if event.summary.value]
    assert [(event.step, event.summary.value[0].tag) for event in events] == [(3, "loss")]


def test_a_tensorboard_file_holds_the_scalars_of_each_step(tmp_path):
    """Read without TensorBoard: records framed by their length, with two checksums (TFRecord)."""
    from tensorboardX.proto.event_pb2 import Event

    with metrics.tensorboard(tmp_path) as sink:
        for step in (1, 2):
            sink({"step": step, "loss": 0.5 / step, "mfu": None})
    (file,) = tmp_path.iterdir()
    content, found = file.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[12 + length + 4 :]
    assert found == [(1, "loss", 0.5), (2, "loss", 0.25)]


class TestWandb:
    def test_without_the_package_it_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with (
            pytest.raises(
                ValueError, match="logging to wandb needs the package: pip install wandb"
            ),
            metrics.wandb(project="p"),
        ):
            pass

    def test_records_and_settings_reach_it(self, monkeypatch):
        class Run:
            def __init__(self, **settings):
                self.settings, self.logged, self.ended = settings, [], False

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.ended = True

            def log(self, record, step):
                self.logged.append((step, record))

        runs = []
        package = types.SimpleNamespace(
            init=lambda **settings: runs.append(Run(**settings)) or runs[0]
        )
        monkeypatch.setitem(sys.modules, "wandb", package)
        with metrics.wandb(project="p", name="n") as sink:
            sink({"step": 2, "loss": 0.5})
        assert runs[0].settings == {"project": "p", "name": "n"}
        assert runs[0].logged == [(2, {"step": 2, "loss": 0.5})]
        assert runs[0].ended


class TestProgress:
    RECORD = {"loss": 1.23456, "tokens_per_second": 4321.0, "mfu": 0.42}

    def test_off_a_terminal_the_first_and_the_last_step_are_lines(self, capsys):
        with metrics.progress(50) as sink:
            for step in range(1, 51):
                sink({"step": step, **self.RECORD})
        said = capsys.readouterr()
        assert said.out == ""
        summary = "loss 1.2346  4321 tokens/s  MFU 42%"
        assert said.err.splitlines() == [f"step 1/50  {summary}", f"step 50/50  {summary}"]

    def test_off_a_terminal_ten_seconds_apart_there_is_a_line(self, capsys, monkeypatch):
        clock = iter(range(1000, 2000, 4))
        monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
        with metrics.progress(50) as sink:
            for step in range(1, 9):
                sink({"step": step, **self.RECORD})
        told = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
        assert told == ["1/50", "4/50", "7/50"]

    def test_evaluation_and_an_unknown_mfu_are_told_as_they_are(self, capsys):
        with metrics.progress(1) as sink:
            sink({"step": 1, "loss": 1.0, "mfu": None})
            sink({"step": 1, "eval_loss": 2.0})
        assert capsys.readouterr().err == "step 1/1  loss 1.0000\nstep 1/1  eval loss 2.0000\n"

    def test_on_a_terminal_it_is_a_bar(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        with metrics.progress(50, done=10) as sink:
            sink({"step": 11, **self.RECORD})
        assert "11/50" in capsys.readouterr().err


def test_peak_memory_on_cpu_is_that_of_the_process():
    megabyte = 2**20
    assert 50 * megabyte < metrics.peak_memory_bytes() < 2**40


def test_peak_flops_of_a_cpu_is_measured():
    assert 1e8 < metrics.peak_flops() < 1e15


@pytest.mark.parametrize(
    ("kind", "each"), [("NVIDIA H200", 989e12), ("TPU v5 lite", 197e12), ("TPU v9", None)]
)
def test_peak_flops_of_an_accelerator_is_the_published_one_of_all(monkeypatch, kind, each):
    monkeypatch.setattr(jax, "default_backend", lambda: "accelerator")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)] * 4)
    assert metrics.peak_flops() == (None if each is None else 4 * each)


def test_a_record_is_there_once_though_half_of_it_was_written_at_first(tmp_path, monkeypatch):
    """The file may have 20 bytes, and a moment later as many as it wants."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    back = lambda pause: resource.setrlimit(resource.RLIMIT_FSIZE, limits)  # noqa: E731
    monkeypatch.setattr(retries, "TRANSIENT", {errno.EFBIG})
    monkeypatch.setattr(retries.time, "sleep", back)
    path = tmp_path / "metrics.jsonl"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        write(path, [{"step": 1, "loss": 2.5, "note": "x" * 50}, {"step": 2}])
    finally:
        back(0)
    assert [record["step"] for record in lines(path)] == [1, 2]
