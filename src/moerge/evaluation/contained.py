"""The script that sandbox.py starts. It limits itself, runs the program, and says through a pipe how that went.

sandbox.py puts these names in front: PROGRAM, TOKEN, SECONDS, MEMORY, NOBODY, SAID. It imports nothing of moerge.
"""

# mypy: ignore-errors
# ruff: noqa: F821, I001

import builtins
import ctypes
import os
import resource
import sys


STATUS = int(os.environ.pop("STATUS"))
READABLE = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path) if path}
FOLDERS = {path for path in READABLE if os.path.isdir(path)}


def say(text):
    """Tell sandbox.py how it went."""
    os.write(STATUS, text.encode("utf-8", "replace")[:SAID])


def limit():
    """Take away what the program must not have: memory, files, processes, time, root."""
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 32,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    if os.geteuid() == 0:  # the kernel does not limit root's processes
        become_nobody()
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))


def become_nobody():
    """Give up root, but for the right to read Python's own files where nobody else may."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    kept = 0 if all(os.access(path, os.R_OK | os.X_OK) for path in FOLDERS) else 1 << 2
    header, capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(kept, kept)  # 2: CAP_DAC_READ_SEARCH
    if libc.capset(header, capabilities):
        raise OSError(ctypes.get_errno(), "cannot give up root")


def make_guard():
    """The audit hook. Everything it needs is bound here, so that the program cannot change it."""
    refused = (
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.exec",
        "os.spawn",
        "os.system",
        "subprocess.Popen",
        "pty.spawn",
        "os.kill",
        "os.killpg",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.mkdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "os.chown",
        "os.setxattr",
        "os.removexattr",
        "os.utime",
        "os.mkfifo",
        "os.mknod",
        "_thread.start_new_thread",
    )
    prefixes = ("socket.", "shutil.", "tempfile.", "ftplib.", "urllib.", "http.", "smtplib.", "_winapi.", "_posixsubprocess.")
    readable = tuple(READABLE)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    real, decode, error, number, separator = os.path.realpath, os.fsdecode, PermissionError, int, os.sep

    def guard(event, arguments):
        if event in refused or event.startswith(prefixes):
            raise error(f"{event} is refused to generated code")
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, number):
                return
            found = real(decode(path))
            if flags & writing or not any(found == root or found.startswith(root + separator) for root in readable):
                raise error(f"opening {found} is refused to generated code")

    return guard


def main(program, token):
    """Run the program under all limits; `token` is what is said if it ends as it should."""
    try:
        limit()
    except (ValueError, OSError) as failure:
        say(f"no limits:{failure}")
        os._exit(1)
    try:
        code = compile(program, "<generated>", "exec")
        sys.addaudithook(make_guard())
        exec(code, {"__name__": "__main__", "__builtins__": builtins})
    except BaseException as failure:
        try:
            message = f"raised:{type(failure).__name__}: {failure}"
        except BaseException:
            message = "raised:an error that cannot be shown"
        say(message)
        os._exit(1)
    say(token)
    os._exit(0)


main(globals().pop("PROGRAM"), globals().pop("TOKEN"))
