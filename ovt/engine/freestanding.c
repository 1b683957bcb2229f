/* The part of a libc that supervisor.c uses, one system call per function, to be included and not compiled alone.
 *
 * Declarations and constants are the C library's headers; none of its code is linked. A static glibc program maps
 * 700 KiB to wait in poll(2), this one 30. It is not for general use: errno is one variable (no threads), strings are
 * handled byte by byte, and only what is called is here. x86_64 and aarch64; their structures are the kernel's own.
 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>               /* declares renameat; no stream is used */
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
static long kernel(long n, long a, long b, long c, long d, long e, long f) {
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "+a"(n) : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return n;
}
__asm__(".globl _start\n_start:\n\txor %ebp,%ebp\n\tmov %rsp,%rdi\n\tand $-16,%rsp\n\tcall begin\n\thlt\n");
#elif defined(__aarch64__)
static long kernel(long n, long a, long b, long c, long d, long e, long f) {
    register long x8 __asm__("x8") = n;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
}
__asm__(".globl _start\n_start:\n\tmov x29,xzr\n\tmov x0,sp\n\tbl begin\n");
#else
#error "ovt-supervisor knows x86_64 and aarch64"
#endif

static int last_error;
static char **environment;
int *__errno_location(void) { return &last_error; }

static long checked(long result) {
    if (result >= 0 || result < -4095) return result;
    errno = -result;
    return -1;
}

#define CALL(name, a, b, c, d, e, f) \
    checked(kernel(SYS_##name, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f)))
#define CALL3(name, a, b, c) CALL(name, a, b, c, 0, 0, 0)

/* files */
static int open_at(int dir, const char *path, int flags, mode_t mode) { return CALL(openat, dir, path, flags, mode, 0, 0); }
int close(int fd) { return CALL3(close, fd, 0, 0); }
ssize_t read(int fd, void *to, size_t n) { return CALL3(read, fd, to, n); }
ssize_t write(int fd, const void *from, size_t n) { return CALL3(write, fd, from, n); }
ssize_t pread(int fd, void *to, size_t n, off_t at) { return CALL(pread64, fd, to, n, at, 0, 0); }
ssize_t pwrite(int fd, const void *from, size_t n, off_t at) { return CALL(pwrite64, fd, from, n, at, 0, 0); }
int fstat(int fd, struct stat *to) { return CALL3(fstat, fd, to, 0); }
int fsync(int fd) { return CALL3(fsync, fd, 0, 0); }
int ftruncate(int fd, off_t n) { return CALL3(ftruncate, fd, n, 0); }
int fallocate(int fd, int mode, off_t at, off_t n) { return CALL(fallocate, fd, mode, at, n, 0, 0); }
int unlinkat(int dir, const char *path, int flags) { return CALL3(unlinkat, dir, path, flags); }
int renameat(int from_dir, const char *from, int to_dir, const char *to) { return CALL(renameat2, from_dir, from, to_dir, to, 0, 0); }
int chdir(const char *path) { return CALL3(chdir, path, 0, 0); }
int fchdir(int fd) { return CALL3(fchdir, fd, 0, 0); }
mode_t umask(mode_t mask) { return CALL3(umask, mask, 0, 0); }
int dup2(int from, int to) { return from == to ? to : CALL3(dup3, from, to, 0); }
static int control_fd(int fd, int command, long argument) { return CALL3(fcntl, fd, command, argument); }
static int control_device(int fd, long request, void *argument) { return CALL3(ioctl, fd, request, argument); }
static int close_fds(unsigned first, unsigned last) { return CALL3(close_range, first, last, 0); }

/* memory */
void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset) {
    return (void *)CALL(mmap, at, n, protection, flags, fd, offset);
}
int madvise(void *at, size_t n, int advice) { return CALL3(madvise, at, n, advice); }

/* waiting and sockets */
int poll(struct pollfd *fds, nfds_t n, int milliseconds) {
    struct timespec limit = { milliseconds / 1000, milliseconds % 1000 * 1000000L };
    return CALL(ppoll, fds, n, milliseconds < 0 ? NULL : &limit, NULL, 8, 0);
}
int clock_gettime(clockid_t clock, struct timespec *to) { return CALL3(clock_gettime, clock, to, 0); }
int socket(int domain, int type, int protocol) { return CALL3(socket, domain, type, protocol); }
int bind(int fd, const struct sockaddr *address, socklen_t n) { return CALL3(bind, fd, address, n); }
int listen(int fd, int backlog) { return CALL3(listen, fd, backlog, 0); }
int accept4(int fd, struct sockaddr *address, socklen_t *n, int flags) { return CALL(accept4, fd, address, n, flags, 0, 0); }
ssize_t send(int fd, const void *from, size_t n, int flags) { return CALL(sendto, fd, from, n, flags, 0, 0); }
ssize_t recv(int fd, void *to, size_t n, int flags) { return CALL(recvfrom, fd, to, n, flags, 0, 0); }

/* processes and signals */
static int control_process(int option, long argument) { return CALL(prctl, option, argument, 0, 0, 0, 0); }
void _exit(int code) { for (;;) CALL3(exit_group, code, 0, 0); }
pid_t fork(void) { return CALL(clone, SIGCHLD, 0, 0, 0, 0, 0); }
int execv(const char *path, char *const *arguments) { return CALL3(execve, path, arguments, environment); }
pid_t waitpid(pid_t pid, int *status, int flags) { return CALL(wait4, pid, status, flags, NULL, 0, 0); }
int waitid(idtype_t type, id_t id, siginfo_t *info, int flags) { return CALL(waitid, type, id, info, flags, NULL, 0); }
int kill(pid_t pid, int number) { return CALL3(kill, pid, number, 0); }
pid_t getpid(void) { return CALL3(getpid, 0, 0, 0); }
pid_t getsid(pid_t pid) { return CALL3(getsid, pid, 0, 0); }
pid_t setsid(void) { return CALL3(setsid, 0, 0, 0); }

static int signal_action(int number, __sighandler_t action) {          /* SIG_DFL or SIG_IGN: neither needs a restorer */
    struct { __sighandler_t action; unsigned long flags; void *restorer; uint64_t mask; } kernel_action = { .action = action };
    return CALL(rt_sigaction, number, &kernel_action, NULL, 8, 0, 0);
}
static int signal_mask(uint64_t mask) { return CALL(rt_sigprocmask, SIG_SETMASK, &mask, NULL, 8, 0, 0); }
static int signal_descriptor(uint64_t mask) { return CALL(signalfd4, -1, &mask, 8, SFD_CLOEXEC | SFD_NONBLOCK, 0, 0); }

/* strings; the barriers keep the compiler from turning these loops into calls of themselves */
#define BARRIER __asm__ volatile("" ::: "memory")
void *memcpy(void *to, const void *from, size_t n) {
#if defined(__x86_64__)
    void *at = to;
    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(n) : : "memory");
#else
    for (size_t i = 0; i < n; i++) { ((char *)to)[i] = ((const char *)from)[i]; BARRIER; }
#endif
    return to;
}
void *mempcpy(void *to, const void *from, size_t n) { return (char *)memcpy(to, from, n) + n; }
void *memset(void *to, int byte, size_t n) {
    for (size_t i = 0; i < n; i++) { ((char *)to)[i] = byte; BARRIER; }
    return to;
}
size_t strlen(const char *text) {
    size_t n = 0;
    for (; text[n]; n++) BARRIER;
    return n;
}
int strcmp(const char *a, const char *b) {
    for (; *a && *a == *b; a++, b++) BARRIER;
    return *(const unsigned char *)a - *(const unsigned char *)b;
}
static const char *find(const char *from, char byte, size_t n) {
    for (; n; n--, from++) if (*from == byte) return from;
    return NULL;
}
static const char *find_last(const char *from, char byte, size_t n) {
    while (n--) if (from[n] == byte) return from + n;
    return NULL;
}
