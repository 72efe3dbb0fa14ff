#!/usr/bin/env python3
"""A real Slurm cluster on this machine: every node is a set of Linux namespaces.

Each node has its own network, process, mount and host name, its own /tmp and /dev/shm, and a real
slurmd; the real slurmctld and munged run beside them. Nothing outside `--dir` is written, and two
clusters with different folders run side by side. Needs root and, on Debian, the packages
slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge iproute2.

  slurm/sim/cluster.py start --nodes 4     and then: eval "$(slurm/sim/cluster.py env)"
  slurm/sim/cluster.py off node2           cut a node's power; `on` boots it again
  slurm/sim/cluster.py cut node2           cut its network; `mend` mends it
  slurm/sim/cluster.py controller stop     stop slurmctld; `controller start` starts it
  slurm/sim/cluster.py stop
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

DEFAULT_FOLDER = Path.home() / ".mvlm-slurm-sim"
PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge iproute2"
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
_CPUS = 4
_COMMAND_SECONDS = 30.0
# A Unix socket's path is at most 107 characters.
_LONGEST_FOLDER = 80

_CONFIGURATION = """\
ClusterName={name}
SlurmctldHost={host}({gateway})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/spool/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={slurmd_timeout}
MessageTimeout=5
TCPTimeout=1
KillWait=20
BatchStartTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


class ClusterError(Exception):
    """The cluster cannot do what was asked; the message says why and what to do."""


class Cluster:
    """One cluster, known by its folder; what it is lies in `cluster.json` there."""

    def __init__(self, folder: Path) -> None:
        """The cluster of that folder, running or not."""
        self.folder = folder.absolute()
        if len(str(self.folder)) > _LONGEST_FOLDER:
            raise ClusterError(
                f"--dir {self.folder}: {len(str(self.folder))} characters, and Unix sockets lie "
                f"in it; choose a path of at most {_LONGEST_FOLDER}"
            )

    # What it is

    @property
    def nodes(self) -> list[str]:
        """Names of all nodes, powered or not."""
        return [f"node{number + 1}" for number in range(int(self._facts["nodes"]))]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that Slurm's commands need to speak to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    @property
    def _facts(self) -> dict[str, object]:
        try:
            found: dict[str, object] = json.loads((self.folder / "cluster.json").read_text())
        except FileNotFoundError:
            raise ClusterError(
                f"--dir {self.folder} holds no running cluster; start one: cluster.py start"
            ) from None
        return found

    def _address(self, node: str) -> str:
        return f"{self._facts['subnet']}.{self._number(node)}"

    def _number(self, node: str) -> int:
        if node not in self.nodes:
            raise ClusterError(f"{node!r} is no node; expected one of {', '.join(self.nodes)}")
        return self.nodes.index(node) + 1

    def _link(self, node: str) -> str:
        return f"{self._facts['tag']}n{self._number(node)}"

    # The whole

    def start(self, nodes: int, keep: Sequence[Path], slurmd_timeout: int = 6) -> None:
        """Start everything and wait until all nodes are idle.

        Args:
            nodes: how many.
            keep: folders that every node sees although they lie in /tmp or /dev/shm, of which
                each node has its own.
            slurmd_timeout: seconds of silence after which Slurm takes a node for down.
        """
        _check_machine()
        if (self.folder / "cluster.json").exists():
            raise ClusterError(f"--dir {self.folder}: a cluster runs there; stop it first")
        for name in ("state", "spool", "log", "munge", "shared"):
            if name in ("state", "spool", "log"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for path in (self.folder, self.folder / "munge"):
            path.chmod(0o755)
        with _MachineWideLock():
            subnet, tag = _free_subnet()
            facts = {
                "nodes": nodes,
                "subnet": subnet,
                "tag": tag,
                "keep": [str(path.absolute()) for path in [*keep, self.folder]],
            }
            (self.folder / "cluster.json").write_text(json.dumps(facts))
            bridge = f"{tag}br"
            _run("ip", "link", "add", bridge, "type", "bridge")
        try:
            _run("ip", "address", "add", f"{subnet}.254/24", "dev", bridge)
            _run("ip", "link", "set", bridge, "up")
            self._write_configuration(slurmd_timeout)
            self._start_munge()
            self.start_controller(clean=True)
            for node in self.nodes:
                self.on(node)
            self._await(lambda: len(self.states("idle")) == nodes, 60, "nodes to be idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of the cluster and take its network down; whatever state it is in."""
        facts = self._facts
        for node in self.nodes:
            self._kill(self.folder / "spool" / f"{node}.unshare")
        self._kill(self.folder / "slurmctld.pid")
        self._kill(self.folder / "munge" / "pid")
        for node in self.nodes:
            self._forget_network(node)
        _run("ip", "link", "delete", f"{facts['tag']}br", check=False)
        (self.folder / "cluster.json").unlink()

    def states(self, wanted: str = "") -> list[str]:
        """Names of nodes, all or those in a state, as Slurm has it."""
        chosen = ["-t", wanted] if wanted else []
        found = self.slurm("sinfo", "-h", "-N", *chosen, "-o", "%N", check=False)
        # A node is listed once for each partition.
        return sorted(set(found.split()))

    def slurm(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands against this cluster; its output."""
        return _run(*command, check=check, environment=self.environment)

    # The controller

    def start_controller(self, clean: bool = False) -> None:
        """Start slurmctld.

        Args:
            clean: without the jobs that an earlier one knew.
        """
        _run("slurmctld", *(["-i", "-c"] if clean else []), environment=self.environment)
        self._await(lambda: "UP" in self.slurm("scontrol", "ping", check=False), 20, "slurmctld")

    def stop_controller(self) -> None:
        """End slurmctld; jobs that run go on."""
        self._kill(self.folder / "slurmctld.pid")

    # One node

    def on(self, node: str) -> None:
        """Boot a node."""
        facts, link, number = self._facts, self._link(node), self._number(node)
        self._kill(self.folder / "spool" / f"{node}.unshare")
        self._forget_network(node)
        _run("ip", "netns", "add", link)
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", link)
        _run("ip", "link", "set", link, "master", f"{facts['tag']}br", "up")
        _run("ip", "-n", link, "link", "set", "lo", "up")
        _run("ip", "-n", link, "address", "add", f"{self._address(node)}/24", "dev", "eth0")
        # Always the same hardware address: peers remember it across a reboot.
        octets = [int(part) for part in self._address(node).split(".")]
        hardware = "02:00:" + ":".join(f"{octet:02x}" for octet in octets)
        _run("ip", "-n", link, "link", "set", "eth0", "address", hardware, "up")
        spool = self.folder / "spool" / node
        spool.mkdir(exist_ok=True)
        for stale in spool.glob("cred_state*"):
            stale.unlink()
        script = self._boot_script(node)
        namespaces = ["--pid", "--fork", "--kill-child=KILL", "--mount", "--mount-proc", "--uts"]
        with open(self.folder / "log" / f"{node}.out", "ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", link, "unshare", *namespaces, "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | self.environment,
            )
        (self.folder / "spool" / f"{node}.unshare").write_text(str(process.pid))
        assert number > 0

    def off(self, node: str) -> None:
        """Cut a node's power: every process of it is killed at once."""
        self._number(node)
        self._kill(self.folder / "spool" / f"{node}.unshare", signal.SIGKILL)

    def cut(self, node: str) -> None:
        """Cut a node's network; its processes go on."""
        _run("ip", "link", "set", self._link(node), "down")

    def mend(self, node: str) -> None:
        """Mend a node's network."""
        _run("ip", "link", "set", self._link(node), "up")

    def mend_all(self) -> None:
        """End all jobs, and bring every node and the controller back."""
        if "UP" not in self.slurm("scontrol", "ping", check=False):
            self.start_controller()
        self.slurm("scancel", "--user=root", check=False)
        for node in self.nodes:
            self.mend(node)
            pid_file = self.folder / "spool" / f"{node}.unshare"
            if not pid_file.exists():
                self.on(node)
        self._await(lambda: not self.slurm("squeue", "-h").strip(), 60, "jobs to end")
        bad = set(self.nodes) - set(self.states("idle"))
        for node in bad:
            self.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        self._await(
            lambda: len(self.states("idle")) == len(self.nodes), 60, "nodes to be idle again"
        )

    def run_in(self, node: str, *command: str, check: bool = True) -> str:
        """Run a command inside a node; its output."""
        outer = (self.folder / "spool" / f"{node}.unshare").read_text()
        inner = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        if not inner:
            raise ClusterError(f"{node} is off")
        entered = ["nsenter", "--target", inner[0], "--all", *command]
        return _run(*entered, check=check, environment=self.environment)

    # How

    def _boot_script(self, node: str) -> str:
        """What a node's first process does, inside its namespaces."""
        private = "/dev/shm/tmp"
        lines = [
            "set -e",
            f"hostname {node}",
            f"mount --bind {shlex.quote(str(self.folder / 'hosts'))} /etc/hosts",
        ]
        kept = [str(path) for path in self._facts["keep"]]  # type: ignore[attr-defined]
        shared = [path for path in kept if path.startswith(("/tmp/", "/dev/shm/"))]
        # What must stay visible is held open under another name while /tmp is replaced.
        held = f"/run/mvlm-sim-{self._facts['tag']}"
        lines += [f"mkdir -p {held}", f"mount -t tmpfs tmpfs {held}"]
        for number, path in enumerate(shared):
            lines += [
                f"mkdir {held}/{number}",
                f"mount --rbind {shlex.quote(path)} {held}/{number}",
            ]
        lines += [
            "mount -t tmpfs -o size=2g tmpfs /dev/shm",
            f"mkdir -m 1777 {private}",
            f"mount --bind {private} /tmp",
        ]
        for number, path in enumerate(shared):
            quoted = shlex.quote(path)
            lines += [f"mkdir -p {quoted}", f"mount --rbind {held}/{number} {quoted}"]
        # Not exec: the first process of a node must reap, and outlive a slurmd that restarts.
        lines += [
            "set +e",
            f"slurmd -D -N {node} &",
            "trap 'kill $!; wait; exit' TERM",
            "while kill -0 $! 2>/dev/null; do wait; done",
        ]
        return "\n".join(lines)

    def _write_configuration(self, slurmd_timeout: int) -> None:
        host, subnet = socket.gethostname().split(".")[0], self._facts["subnet"]
        text = _CONFIGURATION.format(
            name=self._facts["tag"],
            host=host,
            gateway=f"{subnet}.254",
            port=_free_port(),
            folder=self.folder,
            slurmd_timeout=slurmd_timeout,
        )
        hosts = ["127.0.0.1 localhost", f"{subnet}.254 {host}"]
        for node in self.nodes:
            address = self._address(node)
            text += f"NodeName={node} NodeAddr={address} CPUs={_CPUS} RealMemory=2000\n"
            hosts.append(f"{address} {node}")
        text += "PartitionName=train Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=20\n"
        text += "PartitionName=urgent Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF\n"
        (self.folder / "slurm.conf").write_text(text)
        # Not found out by itself: it would fail without a cgroup file system.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "mpi.conf").write_text("PMIxCliTmpDirBase=/dev/shm\n")
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    def _start_munge(self) -> None:
        home = self.folder / "munge"
        key = home / "key"
        key.unlink(missing_ok=True)
        with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as stream:
            stream.write(secrets.token_bytes(1024))
        _run(
            "munged",
            "--force",
            f"--socket={home / 'socket'}",
            f"--key-file={key}",
            f"--pid-file={home / 'pid'}",
            f"--log-file={home / 'log'}",
            f"--seed-file={home / 'seed'}",
        )

    def _forget_network(self, node: str) -> None:
        link = self._link(node)
        _run("ip", "link", "delete", link, check=False)
        _run("ip", "netns", "delete", link, check=False)

    def _kill(self, pid_file: Path, number: int = signal.SIGTERM) -> None:
        """End the process of a file, if it runs, and wait until it has ended."""
        try:
            pid = int(pid_file.read_text())
        except (FileNotFoundError, ValueError):
            return
        deadline = time.monotonic() + 10
        while _alive(pid):
            os.kill(pid, number)
            if time.monotonic() > deadline - 7:
                number = signal.SIGKILL
            if time.monotonic() > deadline:
                raise ClusterError(f"process {pid} of {pid_file.name} does not end")
            time.sleep(0.05)
        pid_file.unlink(missing_ok=True)

    def _await(self, happened: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"waited {seconds:.0f} s for {what}; look in {self.folder / 'log'}"
                )
            time.sleep(0.1)


def _check_machine() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise ClusterError("a cluster of namespaces needs Linux and root")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    os.environ["PATH"] = path
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        raise ClusterError(
            f"{', '.join(missing)} not found; Debian: apt-get install --no-install-recommends "
            f"{PACKAGES}"
        )


def _free_subnet() -> tuple[str, str]:
    """The first three numbers of a network that no interface here has, and a name for it."""
    taken = _run("ip", "-o", "-4", "address") + _run("ip", "-4", "route", check=False)
    for number in range(213, 255):
        subnet = f"10.77.{number}"
        if f" {subnet}." not in taken:
            return subnet, f"mvs{number}"
    raise ClusterError("no free network among 10.77.213.0 to 10.77.254.0; stop other clusters")


class _MachineWideLock:
    """Two clusters that start at once must not choose the same network."""

    def __enter__(self) -> None:
        self._stream = open("/run/mvlm-slurm-sim.lock", "w")
        fcntl.flock(self._stream, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _alive(pid: int) -> bool:
    """Whether a process runs; what has ended and was not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _run(*command: str, check: bool = True, environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            env=os.environ | (environment or {}),
        )
    except subprocess.TimeoutExpired:
        if not check:
            return ""
        raise ClusterError(
            f"{shlex.join(command)}: no answer in {_COMMAND_SECONDS:.0f} s"
        ) from None
    if check and done.returncode:
        raise ClusterError(f"{shlex.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def main() -> int:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=DEFAULT_FOLDER,
        help="the cluster's folder (default: %(default)s)",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    start = actions.add_parser("start", help="start a cluster")
    start.add_argument("--nodes", type=int, default=4, metavar="N")
    start.add_argument(
        "--keep", type=Path, action="append", default=[], metavar="FOLDER",
        help="a folder under /tmp that nodes share; else each has its own /tmp (may be repeated)",
    )  # fmt: skip
    actions.add_parser("stop", help="end it")
    actions.add_parser("status", help="nodes and jobs")
    actions.add_parser("env", help="print what a shell needs to use it")
    for name, told in (
        ("on", "boot a node"),
        ("off", "cut a node's power"),
        ("cut", "cut a node's network"),
        ("mend", "mend a node's network"),
    ):
        actions.add_parser(name, help=told).add_argument("node")
    controller = actions.add_parser("controller", help="stop or start slurmctld")
    controller.add_argument("do", choices=["stop", "start"])
    inside = actions.add_parser("in", help="run a command inside a node")
    inside.add_argument("node")
    inside.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    try:
        print(_act(Cluster(args.dir), args), end="")
    except ClusterError as error:
        print(f"cluster.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def _act(cluster: Cluster, args: argparse.Namespace) -> str:
    if args.action == "start":
        cluster.start(args.nodes, [Path.cwd(), Path(sys.prefix), *args.keep])
        return f'{args.nodes} nodes are idle; now: eval "$({sys.argv[0]} --dir {args.dir} env)"\n'
    if args.action == "stop":
        cluster.stop()
    elif args.action == "status":
        return cluster.slurm("sinfo", "-N", "-l") + cluster.slurm("squeue", "-l")
    elif args.action == "env":
        return "".join(f"export {k}={shlex.quote(v)}\n" for k, v in cluster.environment.items())
    elif args.action == "controller":
        (cluster.stop_controller if args.do == "stop" else cluster.start_controller)()
    elif args.action == "in":
        return cluster.run_in(args.node, *args.command)
    else:
        getattr(cluster, args.action)(args.node)
    return ""


if __name__ == "__main__":
    sys.exit(main())
