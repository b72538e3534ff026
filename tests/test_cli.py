import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import tyro

from trainjax import cli

FIXED = [
    "--model",
    "--data",
    "--eval-data",
    "--out",
    "--steps",
    "--batch-size",
    "--max-length",
    "--learning-rate",
    "--accumulate",
    "--peft.rank",
    "--peft.alpha",
    "--dtype",
    "--packing",
    "--seed",
    "--save-every",
    "--resume",
    "--mesh.data",
    "--mesh.fsdp",
    "--mesh.tensor",
]
GIVEN = ["--model", "m", "--data", "d", "--out", "o"]


def run(*args, **options):
    """The command in a process of its own, on a terminal of 80 columns."""
    command = [sys.executable, "-m", "trainjax.cli", *map(str, args)]
    environment = os.environ | {"COLUMNS": "80"}
    settings = {"capture_output": True, "text": True, "env": environment} | options
    return subprocess.run(command, **settings)


@dataclasses.dataclass(frozen=True)
class Inner:
    rank: int = 16
    rslora: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of every kind that jobs have."""

    data: str
    out: Path
    steps: int | None = None
    learning_rate: float = 2e-4
    packing: Literal["best-fit", "none"] = "best-fit"
    dtype: Literal["float32", "bfloat16"] | None = None
    full: bool = False
    stop: tuple[str, ...] = ()
    peft: Inner = Inner()


@dataclasses.dataclass(frozen=True)
class WithWord:
    data: tyro.conf.Positional[str]
    model: str
    rows: int = 4


def parse(*args, config=Config):
    return cli.parse(config, [*args], prog="trainjax job")


def given(*args):
    return parse("--data", "d", "--out", "o", *args)


class TestHelp:
    def test_without_a_job_the_jobs_are_listed(self, capsys):
        for argv in ([], ["--help"], ["-h"]):
            assert cli.main(argv) == 0
            said = capsys.readouterr().out
            for job in ("sft", "inspect", "merge", "fetch"):
                assert f"\n  {job} " in said
            assert max(map(len, said.splitlines())) <= 110

    def test_of_sft_names_and_explains_every_option_within_80_columns(self):
        from trainjax.recipes import sft

        done = run("sft", "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert max(map(len, done.stdout.splitlines())) <= 80
        words = done.stdout.replace(",", " ").split()
        assert [flag for flag in FIXED if flag not in words] == []
        told = done.stdout.replace("│", " ")
        for name, _ in cli._options(sft.Config):
            _, explanation = re.split(rf"(?m)^ +--{re.escape(name)}(?= |,|$)", told)
            explanation = explanation.partition("(")[0].split()
            assert len(explanation) >= 3, name

    def test_the_version_is_that_of_the_package(self, capsys):
        from importlib import metadata

        try:
            version = metadata.version("trainjax")
        except metadata.PackageNotFoundError:
            pytest.skip("the package is not installed here")
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"trainjax {version}\n"


class TestWrongCommand:
    def test_an_unknown_job_suggests_the_nearest(self, capsys):
        assert cli.main(["stf"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: the jobs are ")
        assert said.endswith("there is no 'stf'; did you mean 'sft'?\n")

    def test_a_wrong_option_of_a_job_is_one_line_and_status_2(self, capsys):
        assert cli.main(["sft", *GIVEN, "--steps", "ten"]) == 2
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", "error: --steps is a whole number, not 'ten'\n")

    @pytest.mark.parametrize(
        ("args", "sentence"),
        [
            (["--stps", "3"], "there is no option --stps; did you mean '--steps'?"),
            (["--stps=3"], "there is no option --stps; did you mean '--steps'?"),
            (["--rank", "3"], "there is no option --rank; did you mean '--peft.rank'?"),
            (["--steps", "ten"], "--steps is a whole number, not 'ten'"),
            (["--steps=1.5"], "--steps is a whole number, not '1.5'"),
            (["--steps"], "--steps needs a value: a whole number"),
            (["--steps", "--full"], "--steps needs a value: a whole number"),
            (["--learning-rate", "fast"], "--learning-rate is a number, not 'fast'"),
            (["--learning_rate", "fast"], "--learning-rate is a number, not 'fast'"),
            (["--peft.rank", "many"], "--peft.rank is a whole number, not 'many'"),
            (["--packing", "tight"], "--packing is one of best-fit, none, not 'tight'"),
            (["--dtype", "float16"], "--dtype is one of float32, bfloat16, not 'float16'"),
            (["--full=yes"], "--full takes no value: give --full or --no-full"),
            (["--full", "yes"], "'yes' is not an option; options begin with --"),
            (["stray"], "'stray' is not an option; options begin with --"),
            (["--config"], "--config needs the name of a YAML file"),
            (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read: No such file"),
        ],
        ids=str,
    )
    def test_it_says_what_would_be_right(self, args, sentence):
        with pytest.raises(ValueError) as error:
            given(*args)
        assert str(error.value).startswith(sentence)

    def test_what_is_missing_is_named(self):
        with pytest.raises(
            ValueError, match="trainjax job needs --data, --out; trainjax job --help"
        ):
            parse("--steps", "3")
        with pytest.raises(ValueError, match="trainjax job needs DATA, --model"):
            parse(config=WithWord)


class TestValues:
    @pytest.mark.parametrize(
        ("args", "name", "value"),
        [
            (["--steps", "3"], "steps", 3),
            (["--steps=3"], "steps", 3),
            (["--steps", "None"], "steps", None),
            (["--steps", "3", "--steps", "4"], "steps", 4),
            (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
            (["--learning-rate", "-1"], "learning_rate", -1.0),
            (["--dtype", "bfloat16"], "dtype", "bfloat16"),
            (["--full"], "full", True),
            (["--full", "--no-full"], "full", False),
            (["--peft.rank", "3"], "peft", Inner(rank=3)),
            (["--peft.rslora"], "peft", Inner(rslora=True)),
            (["--peft.rslora", "--peft.no-rslora"], "peft", Inner()),
            (["--stop", "a", "b c", "--full"], "stop", ("a", "b c")),
        ],
        ids=str,
    )
    def test_flags(self, args, name, value):
        assert getattr(given(*args), name) == value

    def test_words(self):
        assert parse("d", "--model", "m", config=WithWord) == WithWord("d", "m")
        assert parse("--model=m", "d", "--rows", "3", config=WithWord) == WithWord("d", "m", 3)


class TestConfigFile:
    @pytest.fixture
    def file(self, tmp_path):
        def write(content, name="settings.yaml"):
            (tmp_path / name).write_text(content)
            return str(tmp_path / name)

        return write

    CONTENT = """
data: d
out: o
steps: 7
learning_rate: 1e-3
dtype: null
full: true
stop: [a, b c]
peft: {rank: 3, rslora: true}
"""

    @pytest.mark.parametrize("joined", [False, True], ids=["--config FILE", "--config=FILE"])
    def test_its_settings_are_taken_and_flags_win(self, file, joined):
        path = file(self.CONTENT)
        args = [f"--config={path}"] if joined else ["--config", path]
        expected = Config(
            "d", Path("o"), 7, 1e-3, full=True, stop=("a", "b c"), peft=Inner(3, True)
        )
        assert parse(*args) == expected
        changed = dataclasses.replace(expected, steps=9, full=False, peft=Inner(3, False))
        flags = ["--steps=9", "--no-full", "--peft.no-rslora"]
        assert parse(*flags, *args) == parse(*args, *flags) == changed

    def test_of_two_the_later_wins(self, file):
        first, second = file(self.CONTENT), file("steps: 8\npeft: {rank: 4}\n", "second.yaml")
        found = parse("--config", first, f"--config={second}")
        assert (found.steps, found.learning_rate, found.peft) == (8, 1e-3, Inner(4, True))

    def test_text_that_looks_like_a_flag_is_text(self, file):
        assert parse("--config", file('data: "--x"\nout: o\n')).data == "--x"

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ("stps: 3", "there is no setting 'stps'; did you mean 'steps'?"),
            ("peft: {rnk: 3}", "there is no setting 'peft.rnk'; did you mean 'peft.rank'?"),
            ("steps: ten", "steps is a whole number, not 'ten'"),
            ("steps: true", "steps is a whole number, not True"),
            ("steps: [1]", r"steps is a whole number, not \[1\]"),
            ("full: 3", "full is true or false, not 3"),
            ("packing: tight", "packing is one of best-fit, none, not 'tight'"),
            ("steps: [", "is not valid YAML: .* line 1"),
            ("3", "holds no settings"),
            ("", "holds no settings"),
        ],
    )
    def test_what_is_wrong_is_named_with_the_file(self, file, content, sentence):
        with pytest.raises(ValueError, match=f"settings.yaml:? {sentence}"):
            parse("--config", file(content))

    def test_a_file_that_cannot_be_read(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be read: Is a directory"):
            parse("--config", str(tmp_path))
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="binary is not valid YAML"):
            parse("--config", str(tmp_path / "binary"))


class TestOutcome:
    def test_an_error_of_a_job_is_one_line_and_status_1(self, tmp_path):
        done = run("sft", "--model", "m", "--data", "nowhere.jsonl", "--out", tmp_path / "o")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "error: there is no file 'nowhere.jsonl'\n"

    def test_the_traceback_is_there_for_who_wants_it(self, tmp_path, monkeypatch):
        monkeypatch.setenv(cli.DEBUG, "1")
        with pytest.raises(ValueError, match=r"there is no file 'nowhere.jsonl'"):
            cli.main(["sft", "--model=m", "--data=nowhere.jsonl", f"--out={tmp_path / 'o'}"])

    @pytest.mark.parametrize("args", [["--help"], ["sft", "--help"]], ids=str)
    def test_a_reader_that_has_gone_is_no_news(self, args):
        reading, writing = os.pipe()
        os.close(reading)
        done = run(*args, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        assert (done.returncode, done.stderr) == (1, "")

    def test_an_interrupt_is_one_word_and_status_130(self, tmp_path):
        fifo = tmp_path / "settings.yaml"
        os.mkfifo(fifo)  # nobody writes: the job waits for its settings
        # What a shell starts with `&` hears no interrupts, these tests perhaps among it.
        hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        start = f"{hear}; import sys; from trainjax.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", start, "sft", "--config", str(fifo)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        with fifo.open("w"):  # opens once the job reads
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60)[1] == "error: interrupted\n"
        assert process.returncode == 130


class TestHome:
    """`~` is the home folder wherever a path may stand, as the shell writes it only before a word."""

    @pytest.fixture(autouse=True)
    def home(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/ada")

    @pytest.mark.parametrize(
        ("text", "path"),
        [
            ("~/x", "/home/ada/x"),
            ("~", "/home/ada"),
            ("hf:~/set/main:train[:10%]", "hf:/home/ada/set/main:train[:10%]"),
            ("sums=~/a.jsonl", "sums=/home/ada/a.jsonl"),
            ("a/~/b", "a/~/b"),
            ("run~1", "run~1"),
            ("~no-such-user/x", "~no-such-user/x"),
        ],
    )
    def test_at_the_beginning_of_a_path_or_after_a_name(self, text, path):
        assert parse("--data", text, "--out", "o").data == path

    def test_in_flags_files_and_groups(self, tmp_path):
        from trainjax.recipes import sft

        file = tmp_path / "run.yaml"
        file.write_text("out: ~/runs/mine\nmodel: ~/tiny\nschedule:\n  settings: [log=~/m.jsonl]\n")
        config = parse(f"--config={file}", "--data=~/rows.jsonl", config=sft.Config)
        assert config.out == Path("/home/ada/runs/mine")
        assert (config.model, config.data) == ("/home/ada/tiny", "/home/ada/rows.jsonl")
        assert config.schedule.settings == ("log=/home/ada/m.jsonl",)

    def test_not_in_what_a_model_reads(self):
        from trainjax.recipes import generate

        words = ["--model", "m", "--prompt", "~/x is what?", "--stop", "~", "--system", "~"]
        config = parse(*words, config=generate.Config)
        assert (config.prompt, config.stop, config.system) == ("~/x is what?", ("~",), "~")


def test_a_script_that_completes_words_in_a_shell_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--tyro-print-completion", "bash")
    assert not ended.value.code
    assert "--learning-rate" in capsys.readouterr().out
