"""Programs that try to see or to harm what is outside the sandbox."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from functions import command_of, processes
from locked_up import needs_namespaces, printed, run

from dppo_cli.reward.functions import namespaces, sandbox

pytestmark = needs_namespaces


# What it sees


def test_no_network():
    server = socket.create_server(("127.0.0.1", 0))
    source = f"""
        import socket
        for address in (("127.0.0.1", {server.getsockname()[1]}), ("1.1.1.1", 80)):
            try:
                socket.create_connection(address, timeout=1)
            except OSError as error:
                print(error.strerror)
    """
    with server:
        assert printed(source) == "Network is unreachable\n" * 2


def test_no_socket_of_the_machine(tmp_path):
    source = """
        import socket
        try:
            socket.socket(socket.AF_UNIX).connect("\\0dppo-test")
        except OSError as error:
            print(error.strerror)
    """
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0dppo-test")
        server.listen()
        assert printed(source) == "Connection refused\n"


def test_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "of the user")
    names = ["LANG", "LC_CTYPE", "HOME", "PATH"]
    assert set(printed("import os; print(*os.environ)").split()) <= set(names)
    assert printed("import os; print([f for f in range(3, 500) if os.path.exists(f'/proc/self/fd/{f}')])") == "[]\n"


def test_no_file_of_the_user(tmp_path):
    (tmp_path / "config.yaml").write_text("secret")
    places = [
        str(tmp_path),
        str(tmp_path / "config.yaml"),
        os.getcwd(),
        "/proc",
        "/sys",
        "/home",
        "/var",
        "/etc/passwd",
    ]
    assert printed(f"import os; print([p for p in {places!r} if os.path.exists(p)])") == "[]\n"
    assert printed("import os; print(sorted(os.listdir('/etc')))") == "['ld.so.cache']\n"


def test_nothing_can_be_written_outside_its_folder():
    source = """
        import os, sys
        for path in ("/x", "/etc/x", "/dev/x", "/usr/lib/x", sys.executable, sys.base_prefix + "/lib/x"):
            try:
                open(path, "w")
                print("wrote", path)
            except OSError as error:
                print(error.strerror)
        open("/tmp/of-a-program", "w"), open("x", "w")
        print(os.getcwd())
    """
    assert printed(source) == "Read-only file system\n" * 6 + "/program\n"
    assert not Path("/tmp/of-a-program").exists()


def test_its_input_cannot_be_enlarged():
    source = """
        import os
        try:
            os.write(0, b"x" * 10**6)
        except OSError as error:
            print(error.strerror)
        print(input())
    """
    assert printed(source, stdin=b"hello") == "Operation not permitted\nhello\n"


# Getting out


def test_it_cannot_harm_what_started_it():
    source = """
        import os
        for number in (9, 15, 2, 11, 6, 19):
            os.kill(os.getppid(), number)
        try:
            os.kill(-1, 9)
        except ProcessLookupError:
            print("alone with", os.getppid())
    """
    assert printed(source) == "alone with 1\n"
    assert printed(f"import os\ntry: os.kill({os.getpid()}, 9)\nexcept ProcessLookupError: print('none')") == "none\n"


def test_it_has_no_capability_and_can_get_none():
    source = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        def tried(name, *arguments):
            return getattr(libc, name)(*arguments)
        USER, MOUNTS, NET, PROCESSES = 0x10000000, 0x20000, 0x40000000, 0x20000000
        print([tried("unshare", flags) for flags in (USER, MOUNTS, NET, PROCESSES, USER | MOUNTS)])
        print(tried("mount", b"none", b"/program", b"tmpfs", 0, None), tried("umount2", b"/program", 2))
        print(tried("setuid", 0), tried("chroot", b"/program"), tried("ptrace", 16, 1, 0, 0))
        print(tried("prctl", 38, 0, 0, 0, 0), os.getuid(), [g for g in os.getgroups() if g != 65534])
    """
    assert printed(source) == f"{[-1] * 5}\n-1 -1\n-1 -1 -1\n-1 65534 []\n"


def test_a_setting_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(namespaces, "MOUNT_SETATTR", 100_000)
    with pytest.raises(sandbox.SandboxError, match="mount_setattr: Function not implemented"):
        run("")


def test_it_ends_with_the_process_that_waits_for_it(tmp_path):
    source = """
        from dppo_cli.reward.functions import namespaces, sandbox
        sandbox.run(lambda: sandbox.python("-c", "import time; 'outlives'; time.sleep(600)"),
                    sandbox.Limits(600.0, 2**28, 8, 2**20, 1000))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(source)])

    def inside() -> list[int]:
        return [pid for pid in processes() if b"'outlives'" in command_of(pid) and b"sandbox" not in command_of(pid)]

    try:
        end = time.monotonic() + 30
        while not inside() and time.monotonic() < end:
            time.sleep(0.05)
        assert inside()
    finally:
        process.kill()
        process.wait()
    end = time.monotonic() + 5
    while inside() and time.monotonic() < end:
        time.sleep(0.05)
    assert not inside()
