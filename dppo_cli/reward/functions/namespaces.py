"""The processes of the sandbox: what they give up, what they see, and their limits. Linux only. Imports no torch."""

import ctypes
import fcntl
import json
import os
import platform
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 0x1000, 0x4000, 0x40000, 2
MS_NOSUID, MS_NODEV = 2, 4
AT_FDCWD, AT_RECURSIVE, RDONLY_NOSUID_NODEV, MOUNT_SETATTR = -100, 0x8000, 1 | 2 | 4, 442
PDEATHSIG, DUMPABLE, NO_NEW_PRIVS = 1, 4, 38
KEYCTL = {"x86_64": 250, "aarch64": 219}
HOME = "/program"
PYTHON = str(Path(sys.executable).resolve())
NOBODY = 65534
"""The user and group inside; and outside, where the caller is root."""
DEVICES = ("null", "zero", "full", "random", "urandom")
LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Limits:
    """Bytes: `memory` of all processes together, `disk` of /program, `output` on standard output, and on error."""

    seconds: float
    memory: int
    processes: int
    disk: int
    output: int


Fds = tuple[int, int, int, int, int]
"""Standard input, output and errors of the job; what is said of it; what closes when it starts a program, or ends."""


def start(job: Callable[[], None], limits: Limits, seen: Sequence[str], fds: Fds) -> NoReturn:
    said, forked = fds[3:]
    try:
        _prctl(PDEATHSIG, signal.SIGKILL)
        process = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
        _write(process, "oom_score_adj", "1000")  # Where memory runs out, the kernel ends these processes first.
        if os.geteuid() == 0:
            _call("unshare", NEWNS)
            _make_root(seen, limits.disk)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            _prctl(DUMPABLE, 1)
            _become_nobody(process, NEWUSER)
        else:
            _become_nobody(process, NEWUSER | NEWNS)
            _make_root(seen, limits.disk)
        _call("unshare", NEWPID | NEWNET | NEWIPC | NEWUTS)
        _prctl(PDEATHSIG, signal.SIGKILL)
        init = os.fork()
        if init == 0:
            _init(job, limits, fds)
        os.close(forked)
        _say(said, init=init)
        os.waitpid(init, 0)
    except BaseException as error:
        _say(said, error=str(error))
    os._exit(0)


def _become_nobody(process: int, flags: int) -> None:
    user, group = os.geteuid(), os.getegid()
    _call("unshare", flags)
    for name, line in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        _write(process, name, line)


def _write(folder: int, name: str, line: str) -> None:
    fd = os.open(name, os.O_WRONLY, dir_fd=folder)
    os.write(fd, line.encode())
    os.close(fd)


def _make_root(seen: Sequence[str], disk: int) -> None:
    """Give this mount namespace a root that holds nothing but /box, and in it what is seen."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    # Opened before /tmp is covered, where some may be.
    sources = [(path, os.open(path, os.O_PATH)) for path in dict.fromkeys(seen) if os.path.exists(path)]
    devices = [(f"/dev/{name}", os.open(f"/dev/{name}", os.O_PATH)) for name in DEVICES]
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID, "mode=755,size=1m,nr_inodes=1000")
    box = Path("/tmp/box")
    for path, source in [*sources, *devices]:
        target = box / path.lstrip("/")
        if any(Path(other) in Path(path).parents for other, _ in sources):
            continue  # There already.
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.islink(path):
            target.symlink_to(os.readlink(path))
        else:
            if os.path.isdir(f"/proc/self/fd/{source}"):
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.touch()
            _mount(f"/proc/self/fd/{source}", str(target), None, MS_BIND | MS_REC)
            if not path.startswith("/dev/"):
                _set_read_only(str(target), AT_RECURSIVE)
    (box / HOME[1:]).mkdir()
    owner = f"mode=700,uid={NOBODY},gid={NOBODY}"
    _mount("tmpfs", str(box / HOME[1:]), "tmpfs", MS_NOSUID | MS_NODEV, f"{owner},size={disk},nr_inodes=4096")
    for name in ("tmp", "dev/shm"):
        with suppress(FileExistsError):  # A folder that is seen is below it.
            (box / name).symlink_to(HOME)
    Path("/tmp/old").mkdir()
    _call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    _call("umount2", b"/old", MNT_DETACH)
    _set_read_only("/", 0)


def _init(job: Callable[[], None], limits: Limits, fds: Fds) -> NoReturn:
    """Process 1 inside: waits for the job, and for what it leaves behind."""
    said, forked = fds[3:]
    try:
        _prctl(PDEATHSIG, signal.SIGKILL)
        _prctl(DUMPABLE, 0)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(
                number, signal.SIG_DFL
            )  # The kernel keeps such signals from process 1; handlers would see them.
        os.chroot("/box")
        os.chdir(HOME)
        inside = os.fork()
        if inside == 0:
            _inside(job, limits, fds)
        os.close(forked)
        while (ended := os.wait())[0] != inside:
            pass
        _say(said, status=os.waitstatus_to_exitcode(ended[1]))
    except BaseException as error:
        _say(said, error=str(error))
    os._exit(0)


def _inside(job: Callable[[], None], limits: Limits, fds: Fds) -> NoReturn:
    given, out, err, said, forked = fds
    try:
        os.setsid()
        os.environ.clear()
        for source, target in ((given, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        # Both may be among the numbers that they get.
        said, forked = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 5) for fd in (said, forked))
        os.dup2(said, 3, inheritable=False)
        os.dup2(forked, 4, inheritable=False)
        os.closerange(5, 2**20)
        said = 3
        _limit(limits)
        if platform.machine() in KEYCTL:
            LIBC.syscall(KEYCTL[platform.machine()], 1, None, 0, 0, 0)  # A session keyring of its own, and empty.
        _call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        _prctl(NO_NEW_PRIVS, 1)
        fcntl.fcntl(said, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    except BaseException as error:
        _say(said, error=str(error))
        os._exit(1)
    try:
        os.close(said)
        job()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os._exit(0)


def _limit(limits: Limits) -> None:
    for name, value in (
        ("DATA", limits.memory),
        ("AS", limits.memory + 2**30),
        ("CPU", int(limits.seconds) + 1),
        ("FSIZE", limits.disk),
        ("NPROC", limits.processes + 2),  # the two above it count
        ("NOFILE", 256),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    with suppress(OSError):
        os.nice(5)


def _say(said: int, **message: Any) -> None:
    os.write(said, json.dumps(message).encode() + b"\n")


# System calls


def _call(name: str, *arguments: Any) -> None:
    if getattr(LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, value, 0, 0, 0)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def _set_read_only(path: str, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(RDONLY_NOSUID_NODEV, 0, 0, 0)
    if LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, ctypes.sizeof(attributes)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount_setattr: {os.strerror(number)}")
