"""The system calls that an answer may not make, as a seccomp filter (classic BPF).

Namespaces and resource limits carry the isolation. The filter closes what they leave open: processes besides
the one (the limits on memory and CPU time hold per process), memory that no limit counts, sockets of families
that have no namespace (vsock), and parts of the kernel that a Python program does not need.
"""

import errno
import struct

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
# Numbers on (x86_64, aarch64); None: does not exist there.
_DENIED: dict[str, tuple[int, int | None]] = {
    # processes; new threads are told apart below
    "fork": (57, None),
    "vfork": (58, None),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # sockets (socketpair stays: asyncio needs it)
    "socket": (41, 198),
    # memory that counts neither as address space nor as scratch
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # keys of the user's session
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # where kernels had holes, and Python has no use for
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "personality": (135, 92),
    "vmsplice": (278, 75),
    "modify_ldt": (154, None),
}
_CLONE = (56, 220)
_CLONE3 = 435
_PRLIMIT64 = (302, 261)
_NEWEST = 450  # set_mempolicy_home_node; newer calls, and those of the x32 ABI, do not exist in the sandbox
_CLONE_THREAD = 0x10000

_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data; the low half of the first argument
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000


def _do(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def seccomp_filter(machine: str) -> bytes:
    """The filter for `machine` (a key of AUDIT_ARCH), 8 bytes an instruction."""
    column = list(AUDIT_ARCH).index(machine)
    refuse = _do(_RETURN, _FAIL | errno.EPERM)
    absent = _do(_RETURN, _FAIL | errno.ENOSYS)
    program = [
        _do(_LOAD, _ARCH_AT),
        _do(_EQUAL, AUDIT_ARCH[machine], 1, 0),
        _do(_RETURN, _KILL),
        _do(_LOAD, _NUMBER_AT),
        _do(_GREATER, _NEWEST, 0, 1),
        absent,
        # The flags of clone3 are out of a filter's reach; without it, the C library uses clone.
        _do(_EQUAL, _CLONE3, 0, 1),
        absent,
    ]
    for numbers in _DENIED.values():
        if (number := numbers[column]) is not None:
            program += [_do(_EQUAL, number, 0, 1), refuse]
    program += [
        _do(_EQUAL, _CLONE[column], 0, 4),
        _do(_LOAD, _ARGUMENT_AT),
        _do(_ANY_BIT, _CLONE_THREAD, 1, 0),
        refuse,
        _do(_RETURN, _ALLOW),
        # Its own limits only: the supervisor may have the same user id.
        _do(_EQUAL, _PRLIMIT64[column], 0, 3),
        _do(_LOAD, _ARGUMENT_AT),
        _do(_EQUAL, 0, 1, 0),
        refuse,
        _do(_RETURN, _ALLOW),
    ]
    return b"".join(program)
