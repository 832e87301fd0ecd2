"""The script that sandbox.py starts. It limits itself, runs the program, and says through a pipe what went wrong.

sandbox.py puts these names in front: PROGRAM, PASSED, SECONDS, MEMORY, NOBODY, SAID. It imports nothing of moerge, and no ctypes.

A pass is a folder of the name PASSED. The audit hook lets nobody make folders but `succeed`, called by `main`, which gets there
only if the program came to its end: no text that a program could find and say stands for a pass.
"""

# mypy: ignore-errors
# ruff: noqa: F821, I001

import builtins
import os
import resource
import sys


STATUS = int(os.environ.pop("STATUS"))
FOLDER = os.open(".", os.O_RDONLY)
READABLE = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path) if path}


def say(text):
    """Tell sandbox.py how it went."""
    os.write(STATUS, text.encode("utf-8", "replace")[:SAID])


def limit():
    """Take away what the program must not have: memory, files, processes, time, root."""
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    if os.geteuid() == 0:  # the kernel does not limit root's processes
        become_nobody()
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))


def become_nobody():
    """Give up root and every capability with it. Folders of Python's that only root may reach are opened before."""
    opened = {path: os.open(path, os.O_RDONLY) for path in sys.path if os.path.isdir(path)}
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    for path, descriptor in opened.items():
        if os.access(path, os.R_OK | os.X_OK):
            os.close(descriptor)
        else:
            move(path, f"/proc/self/fd/{descriptor}")


def move(path, place):
    """Import from another name of a folder, also the rest of packages that are there already."""
    sys.path[:] = [place if entry == path else entry for entry in sys.path]
    for module in list(sys.modules.values()):
        folders = getattr(module, "__path__", None)
        if isinstance(folders, list):
            folders[:] = [place + folder[len(path) :] if folder.startswith(path) else folder for folder in folders]


_REFUSED = frozenset(
    (
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
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "os.chown",
        "os.setxattr",
        "os.removexattr",
        "os.utime",
        "_thread.start_new_thread",
        "sys.settrace",
        "cpython.PyInterpreterState_New",
    )
)
_PREFIXES = (
    "socket.",
    "shutil.",
    "tempfile.",
    "ftplib.",
    "urllib.",
    "http.",
    "smtplib.",
    "ctypes.",
    "gc.",
    "sqlite3.",
    "_winapi.",
)
# what reaches memory or files without an audit event
_MODULES = frozenset(
    (
        "ctypes",
        "_ctypes",
        "cffi",
        "_cffi_backend",
        "_xxsubinterpreters",
        "_interpreters",
        "_sqlite3",
        "_dbm",
        "_gdbm",
        "readline",
    )
)


def make_guard(main_frame):
    """The audit hook. All that it needs are defaults: bound early, and in no cell that a program could write to."""

    def guard(
        event,
        arguments,
        refused=_REFUSED,
        prefixes=_PREFIXES,
        modules=_MODULES,
        readable=tuple(READABLE),
        writing=os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND,
        success=(succeed.__code__, main_frame),
        caller=sys._getframe,
        real=os.path.realpath,
        decode=os.fsdecode,
        denied=PermissionError,
        absent=ImportError,
        number=int,
        separator=os.sep,
    ):
        if event == "os.mkdir":
            frame = caller(1)
            if frame.f_code is not success[0] or frame.f_back is not success[1]:
                raise denied(f"{event} is refused to generated code")
        if event in refused or event.startswith(prefixes):
            raise denied(f"{event} is refused to generated code")
        if event == "import" and arguments[0].rpartition(".")[2] in modules:
            raise absent(f"{arguments[0]} is refused to generated code")
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, number):
                return
            found = real(decode(path))
            if flags & writing or not any(found == root or found.startswith(root + separator) for root in readable):
                raise denied(f"opening {found} is refused to generated code")

    return guard


def attempt(program, leave=os._exit):
    """Run the program; come back only if it does."""
    try:
        code = compile(program, "<generated>", "exec")
        sys.addaudithook(make_guard(sys._getframe(1)))
        exec(code, {"__name__": "__main__", "__builtins__": builtins})
    except BaseException as failure:
        try:
            message = f"raised:{type(failure).__name__}: {failure}"
        except BaseException:
            message = "raised:an error that cannot be shown"
        try:
            say(message)
        finally:
            while True:
                leave(1)


def succeed(make=os.mkdir, passed=PASSED, folder=FOLDER, leave=os._exit):
    """Say that the program passed."""
    make(passed, dir_fd=folder)
    leave(0)


def main(program):
    """Run the program under all limits."""
    try:
        limit()
    except (ValueError, OSError, AttributeError) as failure:
        say(f"no limits:{failure}")
        os._exit(1)
    say("begun:")
    attempt(program)
    succeed()


main(globals().pop("PROGRAM"))
