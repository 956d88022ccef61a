"""Two machines, network namespaces with a cable between them: one is lost, the job starts again and ends the same."""

import os
import subprocess
import sys
import time

import pytest

import nnclr
from tests.test_torchrun import ENVIRONMENT, JOB, final

NAMES, ADDRESSES = (f"nnclr-{os.getpid()}-a", f"nnclr-{os.getpid()}-b"), ("10.213.77.1", "10.213.77.2")
EPOCHS = 20  # of 10 steps


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts():
    """Two network namespaces that reach each other and nothing else."""
    made = ip("netns", "add", NAMES[0]) if os.path.exists("/usr/sbin/ip") or os.path.exists("/sbin/ip") else None
    if made is None or made.returncode:
        pytest.skip(f"no network namespaces here: {'no ip command' if made is None else made.stderr.strip()}")
    try:
        commands = [
            f"netns add {NAMES[1]}",
            f"link add veth0 netns {NAMES[0]} type veth peer name veth0 netns {NAMES[1]}",
            *(f"-n {name} addr add {address}/24 dev veth0" for name, address in zip(NAMES, ADDRESSES, strict=True)),
            *(f"-n {name} link set {device} up" for name in NAMES for device in ("lo", "veth0")),
        ]
        for command in commands:
            answer = ip(*command.split())
            assert answer.returncode == 0, (command, answer.stderr)
        yield NAMES
    finally:
        for name in NAMES:
            pids = ip("netns", "pids", name).stdout.split()
            subprocess.run(["kill", "-KILL", *pids], capture_output=True, check=False) if pids else None
            ip("netns", "del", name)


def start(host, run, log):
    """The same command on each machine but for its own address; the first one is where they meet."""
    # Both have the container's host name, by which the launcher would tell who is the host and where rank 0 is.
    address, is_host = ADDRESSES[NAMES.index(host)], host == NAMES[0]
    command = [
        *("ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=job"),
        *(f"--rdzv-endpoint={ADDRESSES[0]}:29400", f"--local-addr={address}", f"--rdzv-conf=is_host={is_host}"),
        *(JOB, run, str(EPOCHS)),
    ]
    # A launcher that was started anew waits for the store's address, which the one that stayed does not tell again.
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "veth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def kill(host):
    """Everything on a machine, at once."""
    pids = ip("netns", "pids", host).stdout.split()
    assert len(pids) >= 2  # the launcher's agent and its worker
    subprocess.run(["kill", "-KILL", *pids], check=True)


def ended(processes, logs, limit):
    until = time.monotonic() + limit
    codes = [process.wait(max(until - time.monotonic(), 1)) for process in processes]
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)


def logged_steps(run):
    return [line["step"] for line in nnclr.Run(run).metrics]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_lost_machine_comes_back_and_the_job_ends_as_if_nothing_had_happened(hosts, tmp_path):
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    ended([start(host, calm, log) for host, log in zip(hosts, logs, strict=True)], logs, 120)

    first, second = (start(host, disturbed, log) for host, log in zip(hosts, logs, strict=True))
    until = time.monotonic() + 60
    # Between checkpoints, after which the processes wait for each other without a connection, and would miss a lost one
    # after 30 seconds only: by then the machine is back and the launcher has ended them.
    while max(logged_steps(disturbed), default=0) < 75 and time.monotonic() < until:
        time.sleep(0.02)
    killed_at = max(logged_steps(disturbed))
    assert 75 <= killed_at < 10 * EPOCHS  # control: it was not over yet
    kill(hosts[1])
    second.wait(10)
    time.sleep(3)  # the machine boots
    second = start(hosts[1], disturbed, logs[1])
    ended([first, second], logs, 240)

    text = logs[0].read_text()
    assert "exitcode  : 85" in text or "exitcode: 85" in text  # what the survivor's process left with
    assert any("resumed" in line and "at step" in line for line in text.splitlines())
    ours, theirs = final(disturbed), final(calm)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert logged_steps(disturbed) == logged_steps(calm)
