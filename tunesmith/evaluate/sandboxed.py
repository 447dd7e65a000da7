"""What runs inside: a process that gives up all it does not need, and then runs a program and its tests.

Started by `sandbox.py` as a script, with nothing but the standard library. Standard input has one JSON document. On the
descriptor that it names, `LOCKED` is written when everything is given up, before any line of the program runs, and the
document's token when the tests have ended without an error. What is given up:

- capabilities, and the right to gain any (PR_SET_NO_NEW_PRIVS);
- files: nothing can be written or listed, and only the interpreter's library and shared libraries read (Landlock);
- system calls: only those of a computation that reads files; none for sockets, processes, threads or signals (seccomp);
- processor time, memory, open files (rlimits).
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import types

LOCKED = b"locked\n"

# Landlock, https://docs.kernel.org/userspace-api/landlock.html: the rights that there are, by version.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3
RIGHTS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
RIGHTS_BITS_LATER = 16
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL = 9

# Numbers of the system calls on x86_64 and, where it has them, on aarch64.
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "readv": (19, 65), "writev": (20, 66), "access": (21, None), "select": (23, None), "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "nanosleep": (35, 101), "getpid": (39, 172),
    "exit": (60, 93), "uname": (63, 160), "getdents": (78, None), "getcwd": (79, 17),
    "readlink": (89, None), "gettimeofday": (96, 169), "getrusage": (98, 165), "times": (100, 153), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132),
    "gettid": (186, 178), "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "getdents64": (217, 61), "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "openat": (257, 56), "newfstatat": (262, 79),
    "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "set_robust_list": (273, 99),
    "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
# Those allowed with some arguments alone: numbers, which argument, its values.
ALLOWED_WITH = {
    "prlimit64": ((302, 261), 0, (0,)),  # of this process
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 1030)),  # copies and flags; F_SETOWN would send signals to others
}
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06  # of a classic BPF program
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data
KILL, REFUSE, ALLOW = 0x80000000, 0x00050000 | 38, 0x7FFF0000  # 38: ENOSYS, as on a kernel without the call


def checked(library: ctypes.CDLL, name: str, *arguments: object) -> int:
    """A function of the C library; OSError where it fails."""
    result = library[name](*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return int(result)


def drop_capabilities(library: ctypes.CDLL) -> None:
    """No capability is left, also to root, and no file that is run can give any."""
    zero, long = ctypes.c_ulong(0), ctypes.c_ulong
    checked(library, "prctl", PR_SET_NO_NEW_PRIVS, long(1), zero, zero, zero)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)  # version 3, this process; three sets of two words
    checked(library, "capset", header, nothing)


def restrict_files(library: ctypes.CDLL, *, readable: "list[str]") -> None:
    """Files below `readable` can be read, and nothing else be done with any file that is opened from now on."""
    call, size = ctypes.c_long, ctypes.c_size_t
    version = checked(library, "syscall", call(CREATE_RULESET), None, size(0), ctypes.c_uint32(1))
    handled = (1 << RIGHTS_BITS.get(version, RIGHTS_BITS_LATER)) - 1
    rules = checked(library, "syscall", call(CREATE_RULESET), struct.pack("Q", handled), size(8), ctypes.c_uint32(0))
    for path in readable:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rights = READ_FILE | READ_FOLDER if os.path.isdir(path) else READ_FILE
        rule = struct.pack("=Qi", rights, place)
        checked(library, "syscall", call(ADD_RULE), ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint32(0))
        os.close(place)
    checked(library, "syscall", call(RESTRICT_SELF), ctypes.c_int(rules), ctypes.c_uint32(0))
    os.close(rules)


def filter_program() -> "list[tuple[int, int, int, int]]":
    """(code, jump if equal, jump otherwise, operand): what is not in the list is refused, another machine's calls kill."""
    column, architecture = ARCHITECTURES[platform.machine()]
    program = [(LOAD, 0, 0, ARCHITECTURE_AT), (JUMP_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    program.append((LOAD, 0, 0, NUMBER_AT))
    for numbers in ALLOWED.values():
        number = numbers[column]
        if number is not None:
            program += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for numbers_with, argument, values in ALLOWED_WITH.values():
        program += [(JUMP_EQUAL, 0, 2 * len(values) + 2, numbers_with[column])]
        program += [(LOAD, 0, 0, FIRST_ARGUMENT_AT + 8 * argument)]
        for value in values:
            program += [(JUMP_EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW)]
        program += [(RETURN, 0, 0, REFUSE)]
    return [*program, (RETURN, 0, 0, REFUSE)]


def restrict_calls(library: ctypes.CDLL) -> None:
    """Only the system calls of the list from now on."""
    program = filter_program()
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    zero, long = ctypes.c_ulong(0), ctypes.c_ulong
    checked(library, "prctl", PR_SET_SECCOMP, long(2), header, zero, zero)


def restrict_amounts(*, seconds: int, memory_bytes: int) -> None:
    """Processor time, memory, files."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 1,
        resource.RLIMIT_CORE: 0,
    }
    for name, most in limits.items():
        hard = resource.getrlimit(name)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(name, (most, most))


def main() -> None:
    """Give up everything, run the program, run the tests, and say so."""
    request = json.loads(sys.stdin.buffer.read())
    end, write, run, translate = os._exit, os.write, exec, compile  # as they are now: the program may replace them
    told, token = request["told"], request["token"].encode()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    library = ctypes.CDLL(None, use_errno=True)
    checked(library, "prctl", PR_SET_PDEATHSIG, ctypes.c_ulong(SIGKILL))
    os.chdir("/")
    try:
        drop_capabilities(library)
        restrict_amounts(seconds=request["seconds"], memory_bytes=request["memory_bytes"])
        restrict_files(library, readable=request["readable"])
        restrict_calls(library)
    except (OSError, KeyError) as error:
        write(told, f"refused: {error}".encode())
        end(1)
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    program, tests = request["program"], request["tests"]
    del request, library
    write(told, LOCKED)
    try:
        steps = [translate(program, "<answer>", "exec"), translate(tests, "<tests>", "exec")]
        for step in steps:
            run(step, module.__dict__)
    except BaseException:
        end(1)
    write(told, token)
    end(0)


if __name__ == "__main__":
    main()
