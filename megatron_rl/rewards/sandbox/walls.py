"""The kernel's walls around this process: Landlock for files, seccomp for system calls, rlimits for the rest.

None needs a privilege, none can be taken down again, also not by root. Landlock (landlock(7), Linux 5.13) lets nothing
be opened but what is listed, and that for reading. The seccomp filter (seccomp(2)) knows the system calls that Python
needs: others fail with EPERM, and those that only an attack makes (a socket, a process, another program, a look into
another process) kill the process with SIGSYS, which its parent sees and it cannot hide.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterable

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_RULE_PATH_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by Landlock's version
_NET_RIGHTS, _SCOPES = 3, 3  # bind and connect (version 4); abstract sockets and signals (version 6)

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF instructions
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_CLONE_THREAD = 0x10000
_X32 = 0x40000000
_FCNTL = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: none sends a signal

# name: (number on x86_64, number on aarch64); None where an architecture has no such call.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None),
    "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233),
    "dup": (32, 23), "dup2": (33, None), "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None),
    "setitimer": (38, 103), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "getdents": (78, None),
    "getcwd": (79, 17), "readlink": (89, None), "gettimeofday": (96, 169), "getrlimit": (97, 163),
    "getrusage": (98, 165), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178), "time": (201, None),
    "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96),
    "restart_syscall": (219, 128), "fadvise64": (221, 223), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "openat": (257, 56), "newfstatat": (262, 79),
    "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73),
    "set_robust_list": (273, 99), "dup3": (292, 24), "pipe2": (293, 59), "getrandom": (318, 278), "statx": (332, 291),
    "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
_DEADLY: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "sendto": (44, 206), "recvfrom": (45, 207),
    "sendmsg": (46, 211), "recvmsg": (47, 212), "bind": (49, 200), "listen": (50, 201), "socketpair": (53, 199),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "chroot": (161, 51), "pivot_root": (155, 41), "bpf": (321, 280), "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282), "perf_event_open": (298, 241), "init_module": (175, 105), "finit_module": (313, 273),
    "kexec_load": (246, 104), "reboot": (169, 142), "keyctl": (250, 219), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
}  # fmt: skip
_WITH_RULES = {
    "ioctl": (16, 29), "clone": (56, 220), "kill": (62, 129), "fcntl": (72, 25), "tgkill": (234, 131),
    "prlimit64": (302, 261), "clone3": (435, 435),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above; AUDIT_ARCH_*


class WallError(Exception):
    """A wall that this kernel does not give us."""


def raise_walls(readable: Iterable[str], *, memory: int, cpu_s: int, file_size: int) -> None:
    """Confine this process, which must have one thread, for good. `readable`: files, and folders with all in them."""
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        # At the soft limit of CPU time comes SIGXCPU, which has a name; a second later SIGKILL.
        resource.setrlimit(limit, (value, value + (limit == resource.RLIMIT_CPU)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise WallError(f"no_new_privs ({_why()})")
    _landlock(libc, readable)
    _seccomp(libc)


def _landlock(libc: ctypes.CDLL, readable: Iterable[str]) -> None:
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        raise WallError(f"Landlock ({_why()}): Linux 5.13 or newer, with landlock among the kernel's lsm=")
    handled = _FILE_RIGHTS[max(known for known in _FILE_RIGHTS if known <= version)]
    attributes = [handled] + [_NET_RIGHTS] * (version >= 4) + [_SCOPES] * (version >= 6)
    packed = struct.pack(f"={len(attributes)}Q", *attributes)
    ruleset = libc.syscall(_CREATE_RULESET, packed, len(packed), 0)
    if ruleset < 0:
        raise WallError(f"a Landlock ruleset ({_why()})")
    for path in readable:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # what is not there cannot be read
        rights = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
        if libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, beneath), 0) != 0:
            raise WallError(f"a Landlock rule for {path!r} ({_why()})")
        os.close(beneath)
    if libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
        raise WallError(f"Landlock's restriction ({_why()})")
    os.close(ruleset)


def _seccomp(libc: ctypes.CDLL) -> None:
    code = _filter(platform.machine(), os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0) != 0:
        raise WallError(f"a seccomp filter ({_why()}): CONFIG_SECCOMP_FILTER")


def _filter(machine: str, pid: int) -> bytes:
    """The filter as BPF: instructions of (code, jump if true, jump if false, value)."""
    if machine not in _MACHINES:
        raise WallError(f"a list of system calls for {machine}: there is one for {' and '.join(_MACHINES)}")
    column, arch = _MACHINES[machine]

    def is_call(name: str, body: list[bytes]) -> list[bytes]:
        number = _WITH_RULES[name][column]
        return [_op(_LOAD, 0), _op(_EQUAL, number, 0, len(body)), *body]

    def one_of(values: Iterable[int], argument: int, otherwise: int) -> list[bytes]:
        tests = [part for value in values for part in (_op(_EQUAL, value, 0, 1), _op(_RETURN, _ALLOW))]
        return [_low(argument), *tests, _op(_RETURN, otherwise)]

    no = _ERRNO | errno.EPERM
    code = [_op(_LOAD, 4), _op(_EQUAL, arch, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, 0)]
    code += [_op(_AT_LEAST, _X32, 0, 1), _op(_RETURN, _KILL)]
    for table, action in ((_ALLOWED, _ALLOW), (_DEADLY, _KILL)):
        for numbers in table.values():
            if (number := numbers[column]) is not None:
                code += [_op(_EQUAL, number, 0, 1), _op(_RETURN, action)]
    code += is_call("ioctl", [_op(_RETURN, _ERRNO | errno.ENOTTY)])
    code += is_call("clone3", [_op(_RETURN, _ERRNO | errno.ENOSYS)])  # its flags are out of a filter's sight: use clone
    thread = [_op(_ANY_BIT, _CLONE_THREAD, 0, 1), _op(_RETURN, _ALLOW), _op(_RETURN, _KILL)]
    code += is_call("clone", [_low(0), *thread])
    code += is_call("kill", one_of([pid], 0, _KILL))
    code += is_call("tgkill", one_of([pid], 0, _KILL))
    code += is_call("fcntl", one_of(_FCNTL, 1, no))
    # prlimit64 may ask for our limits, not set any.
    ask = [_op(_RETURN, _ALLOW), _op(_RETURN, no)]
    code += is_call(
        "prlimit64",
        [_low(0), _op(_EQUAL, 0, 0, 5), _low(2), _op(_EQUAL, 0, 0, 3), _op(_LOAD, 36), _op(_EQUAL, 0, 0, 1), *ask],
    )
    return b"".join([*code, _op(_RETURN, no)])


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _low(argument: int) -> bytes:
    """Load the lower half of a system call's argument (struct seccomp_data, little endian)."""
    return _op(_LOAD, 16 + 8 * argument)


def _why() -> str:
    return os.strerror(ctypes.get_errno())
