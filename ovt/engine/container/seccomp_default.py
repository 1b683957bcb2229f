"""The system calls a container gets when nobody says otherwise: pure data and one pure function, no libseccomp.

How a call was sorted, by what the kernel does and not by who uses it:
  - what acts on the caller's own process, memory, files or sockets is allowed;
  - what acts on the machine (its clock, modules, mounts, namespaces, swap, keys without a namespace, raw ports, the
    kernel's own programs and logs) is allowed only together with the capability that the kernel asks for it, and
    answers EPERM otherwise, so that a program sees what an ordinary user sees;
  - what reaches much kernel code that ordinary programs do not need and that gave way often (io_uring, userfaultfd,
    bpf, perf, AF_VSOCK) is treated like that too;
  - every call not named here, so every call younger than this list, answers ENOSYS: C libraries then fall back to
    the older call, which EPERM would keep them from doing.
Without CAP_SYS_ADMIN `clone` may not make namespaces, and `clone3`, which hides its flags behind a pointer where no
filter sees them, answers ENOSYS.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_EPERM, _ENOSYS = 1, 38

_FILES = """
access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 epoll_create epoll_create1
epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 faccessat faccessat2
fadvise64 fadvise64_64 arm_fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32
fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs
fstatfs64 fsync ftruncate ftruncate64 futimesat getcwd getdents getdents64 getxattr getxattrat inotify_add_watch
inotify_init inotify_init1 inotify_rm_watch ioctl io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64
io_setup io_submit lchown lchown32 lgetxattr link linkat listxattr listxattrat llistxattr _llseek lremovexattr lseek
lsetxattr lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat oldfstat oldlstat oldstat open openat
openat2 pipe pipe2 poll ppoll ppoll_time64 pread64 preadv preadv2 pselect6 pselect6_time64 pwrite64 pwritev pwritev2
read readahead readdir readlink readlinkat readv removexattr removexattrat rename renameat renameat2 rmdir select
_newselect sendfile sendfile64 setxattr setxattrat splice stat stat64 statfs statfs64 statx statmount listmount
symlink symlinkat sync sync_file_range sync_file_range2 arm_sync_file_range syncfs tee truncate truncate64 umask
unlink unlinkat utime utimensat utimensat_time64 utimes vmsplice write writev cachestat file_getattr file_setattr
"""

_MEMORY = """
brk get_mempolicy madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap
mmap2 mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_madvise
process_mrelease remap_file_pages set_mempolicy_home_node
"""

_PROCESSES = """
alarm arch_prctl arm_set_tls arm_cacheflush set_tls get_tls cacheflush breakpoint capget capset clock_getres
clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep clock_nanosleep_time64 execve execveat exit
exit_group fork futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake get_robust_list get_thread_area
getcpu getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpgid getpgrp getpid
getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid gettid
gettimeofday getuid getuid32 ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset
landlock_restrict_self lsm_get_self_attr lsm_list_modules lsm_set_self_attr modify_ldt nanosleep nice pause
pidfd_open pidfd_send_signal prctl prlimit64 restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask
rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo
sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler
sched_yield seccomp set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid
setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid
setresuid32 setreuid setreuid32 setrlimit setsid setuid setuid32 sgetmask sigaction sigaltstack signal signalfd
signalfd4 sigpending sigprocmask sigreturn sigsuspend ssetmask swapcontext sysinfo tgkill time timer_create
timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create
timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill ugetrlimit uname uretprobe uprobe
vfork wait4 waitid waitpid ptrace process_vm_readv process_vm_writev kcmp riscv_flush_icache riscv_hwprobe
s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr spu_create spu_run
"""

_COMMUNICATION = """
accept accept4 bind connect getpeername getsockname getsockopt ipc listen mq_getsetattr mq_notify mq_open
mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd recv
recvfrom recvmmsg recvmmsg_time64 recvmsg semctl semget semop semtimedop semtimedop_time64 send sendmmsg sendmsg
sendto setsockopt shmat shmctl shmdt shmget shutdown socketcall socketpair
"""

# capability → the calls that act on what it stands for
_WITH_CAPABILITY: dict[str, str] = {
    "CAP_SYS_ADMIN": """
        fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount open_tree
        open_tree_attr pivot_root quotactl quotactl_fd setdomainname sethostname setns swapoff swapon umount umount2
        unshare vm86 vm86old""",
    "CAP_SYS_BOOT": "reboot kexec_load kexec_file_load",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module init_module finit_module create_module query_module get_kernel_syms",
    "CAP_SYS_NICE": "mbind migrate_pages move_pages set_mempolicy",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "pidfd_getfd",
    "CAP_SYS_RAWIO": "iopl ioperm",
    "CAP_SYS_TIME": "settimeofday stime clock_settime clock_settime64 clock_adjtime clock_adjtime64 adjtimex",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_SYSLOG": "syslog",
    "CAP_BPF": "bpf",
    "CAP_PERFMON": "perf_event_open",
}
# CAP_BPF and CAP_PERFMON were cut out of CAP_SYS_ADMIN in Linux 5.8, which still implies them
_IMPLIED_BY_ADMIN = ("CAP_BPF", "CAP_PERFMON", "CAP_SYSLOG")

# known, and refused with EPERM whatever the capabilities
_NEVER = """
add_key keyctl request_key io_uring_setup io_uring_enter io_uring_register userfaultfd nfsservctl uselib ustat
sysfs _sysctl get_kernel_syms pciconfig_iobase pciconfig_read pciconfig_write
"""

# personality(2): Linux, Linux with 32-bit uname, the query, and each with no address randomisation
_PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)
_AF_VSOCK = 40
_CLONE_NEW_MASK = 0x7E020000  # mount, cgroup, uts, ipc, user, pid, net

_ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
    "riscv64": ["SCMP_ARCH_RISCV64"],
    "ppc64le": ["SCMP_ARCH_PPC64LE"],
    "s390x": ["SCMP_ARCH_S390X", "SCMP_ARCH_S390"],
}


def profile(machine: str, capabilities: Collection[str], more: Collection[str] = ()) -> dict[str, Any]:
    """The OCI `linux.seccomp` object for the architecture `machine` (uname -m) and a bounding set of CAP_* names;
    `more` are calls that are allowed besides."""
    admin = "CAP_SYS_ADMIN" in capabilities
    allowed = set(f"{_FILES} {_MEMORY} {_PROCESSES} {_COMMUNICATION}".split())
    refused = set(_NEVER.split())
    for capability, calls in _WITH_CAPABILITY.items():
        has = capability in capabilities or (admin and capability in _IMPLIED_BY_ADMIN)
        (allowed if has else refused).update(calls.split())
    allowed.update(more)
    refused -= allowed
    rules: list[dict[str, Any]] = [
        _rule(sorted(allowed), "SCMP_ACT_ALLOW"),
        _rule(sorted(refused), "SCMP_ACT_ERRNO", errno=_EPERM),
        *[
            _rule(["personality"], "SCMP_ACT_ALLOW", args=[{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}])
            for value in _PERSONALITIES
        ],
        _rule(["socket"], "SCMP_ACT_ALLOW", args=[{"index": 0, "value": _AF_VSOCK, "op": "SCMP_CMP_NE"}]),
    ]
    if admin:
        rules.append(_rule(["clone", "clone3"], "SCMP_ACT_ALLOW"))
    else:
        flags = 1 if machine == "s390x" else 0  # s390 passes the stack first
        none = {"index": flags, "value": _CLONE_NEW_MASK, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
        rules.append(_rule(["clone"], "SCMP_ACT_ALLOW", args=[none]))
        rules.append(_rule(["clone3"], "SCMP_ACT_ERRNO", errno=_ENOSYS))
    result: dict[str, Any] = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _ENOSYS,
        "syscalls": rules,
    }
    if machine in _ARCHITECTURES:
        result["architectures"] = _ARCHITECTURES[machine]
    return result


def _rule(
    names: list[str], action: str, *, errno: int | None = None, args: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": names, "action": action}
    if errno is not None:
        rule["errnoRet"] = errno
    if args is not None:
        rule["args"] = args
    return rule
