/* ovt-guest: init and guest agent, in one static program, of a virtual machine without a distribution in it.
 *
 *   /init                      process 1 of the initramfs
 *   ovt-guest --serve FD       only the agent, on a connected socket; what would change the machine is refused
 *
 * As process 1 it mounts what every program expects, inserts the modules listed in /ovt/modules, runs the main program
 * that /ovt/main describes on the console, inserts those of /ovt/modules.late (before, where there are disks), asks for an address on every card, and
 * serves the protocol of the QEMU guest agent on the port org.qemu.guest_agent.0. When the main program ends, its exit
 * status goes to the port org.ovt.exit.0 (128 + n on a signal; 125: a share could not be mounted, 126: not executable,
 * 127: not found) and the machine off. The power button and busybox's `poweroff` send it SIGTERM first.
 *
 *   /ovt/main: NAME=value entries, each with its NUL: arg and env repeated, cwd, user, hostname, tty=1, rows, cols,
 *   share=TAG:TARGET[:OPTIONS] repeated, poweroff=1 (go off when the program ends). Without arg there is none.
 *
 * Besides the protocol of QEMU (docs/interop/qemu-ga-ref) there are
 *   ovt-exec {path, arg, env, cwd, user, tty, rows, cols} -> {pid}       a terminal or three pipes
 *   ovt-io {pid, input, eof, rows, cols, signal, wait-ms} -> {out, err, pending, exited, exitcode | signal}
 *            answers when there is output or the end, after wait-ms, or when the next request comes; pending are the
 *            bytes of input that the program has not taken; pid 0 is the main program (size and signals only)
 *   ovt-main {as ovt-exec, poweroff} -> {pid}    the main program, later than at boot; poweroff is true unless given
 *   ovt-identity {hostname, machine-id, mac, interface, entropy, time}   makes a clone another machine
 * and `errno` in errors that have one. It is not a service manager: one program, what the agent was asked for, no more.
 *
 * One loop and no threads; process 1 must not die, so every table has a limit and every allocation may fail. The
 * parts are included, in this order, because each needs only those before it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <ifaddrs.h>
#include <linux/fs.h>
#include <linux/if_link.h>
#include <linux/if_packet.h>
#include <linux/input.h>
#include <linux/netlink.h>
#include <linux/random.h>
#include <linux/rtc.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <utmpx.h>

#include "guest_json.c"

static struct {
    int fd, absent, skipping;    /* absent: nobody is at the other end; skipping: to the end of too long a request */
    size_t scanned;              /* bytes of `in` without an end of line */
    int64_t retry_at;
    struct buffer in, out;
} port = { .fd = -1 };
static struct buffer *const reply = &port.out;
static int no_reply;         /* the command in hand is one that answers nothing */
static int serving_only, debug, console = -1;

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* A line on the console, which is the program's: only for what keeps that from running as it was told to. */
__attribute__((format(printf, 1, 2)))
static void say(const char *format, ...) {
    char line[512] = "ovt: ";
    va_list list;
    va_start(list, format);
    int length = vsnprintf(line + 5, sizeof line - 6, format, list);
    va_end(list);
    strcat(line, "\n");
    if (length > 0 && console >= 0 && write(console, line, strlen(line)) < 0)
        length = 0;          /* there is nobody else to tell */
}
#define step(...) do { if (debug) say(__VA_ARGS__); } while (0)

static void start_dhcp(const char *card);
static void open_port(int fd);

#include "guest_launch.c"
#include "guest_process.c"
#include "guest_files.c"
#include "guest_system.c"
#include "guest_boot.c"
#include "guest_end.c"
#include "guest_agent.c"

/* --- the loop --- */

static struct pollfd polled[3 + BUTTONS + 3 * PROCESSES];
static int polled_count, polled_port;

static void watch(int fd, short what) {
    if (fd >= 0 && what)
        polled[polled_count++] = (struct pollfd){ .fd = fd, .events = what };
}

static void watch_all(int signals) {
    polled_count = 0;
    watch(signals, POLLIN);
    watch(uevents, POLLIN);
    polled_port = polled_count;
    if (!port.absent)
        watch(port.fd, (short)((port.out.length < ANSWER_WAITING ? POLLIN : 0) | (port.out.length ? POLLOUT : 0)));
    for (int i = 0; i < BUTTONS; i++)
        watch(buttons[i].fd, POLLIN);
    for (struct process *process = processes; process < processes + PROCESSES; process++) {
        if (!process->pid)
            continue;
        watch(process->in, process->input.length || process->input_ends ? POLLOUT : 0);
        for (int i = 0; i < 2; i++)
            watch(process->streams[i], full(process, i) || process->quiet_until ? 0 : POLLIN);
    }
}

static int64_t next_moment(void) {
    int64_t next = INT64_MAX;
#define consider(condition, moment) do { if ((condition) && (moment) < next) next = (moment); } while (0)
    consider(waiting.process, waiting.until);
    consider(thaw_at, thaw_at);
    consider(ending && main_pid, kill_at);
    consider(port.fd >= 0 && port.absent, port.retry_at);
    for (struct process *process = processes; process < processes + PROCESSES; process++) {
        consider(process->pid && process->quiet_until, process->quiet_until);
        consider(process->pid && process->exited && !finished(process) && !full(process, 0) && !full(process, 1),
                 process->drain_until);
    }
    return next;
}

static void serve_processes(void) {
    for (struct process *process = processes; process < processes + PROCESSES; process++) {
        if (!process->pid)
            continue;
        if (now_ms() >= process->quiet_until)
            process->quiet_until = 0;
        give_input(process);
        take_output(process, 0);
        take_output(process, 1);
        if (process->exited && !full(process, 0) && !full(process, 1) && now_ms() >= process->drain_until)
            hang_up(process);
    }
}

static int exit_code(int status) { return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status); }

static void reap(void) {
    int status, main_status = -1;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        for (int i = 0; i < CARDS; i++)
            if (cards[i].dhcp == pid)
                cards[i].dhcp = 0;
        if (pid == main_pid)
            main_status = status;
        else
            reaped(pid, status);
    }
    if (main_status >= 0)
        main_ended(exit_code(main_status));
}

/* Process 1 gets the signals that busybox's halt, poweroff and reboot send to init, and SIGINT for Ctrl-Alt-Del. */
static void take_signals(int signals) {
    struct signalfd_siginfo info;
    while (read(signals, &info, sizeof info) == sizeof info) {
        if (serving_only && info.ssi_signo == SIGTERM)
            exit(0);
        switch (info.ssi_signo) {
        case SIGIO:
            port.retry_at = 0;
            break;
        case SIGUSR1:
            request_end(HALT);
            break;
        case SIGUSR2:
            request_end(POWERDOWN);
            break;
        case SIGTERM:
        case SIGINT:
            request_end(REBOOT);
        }
    }
    reap();
}

__attribute__((noreturn))
static void serve(int signals) {
    for (;;) {
        watch_all(signals);
        int64_t next = next_moment(), now = now_ms(), wait = next == INT64_MAX ? -1 : next > now ? next - now : 0;
        if (poll(polled, (nfds_t)polled_count, wait > INT32_MAX ? INT32_MAX : (int)wait) < 0 && errno != EINTR)
            usleep(10000);       /* no memory: process 1 can only try again */
        take_signals(signals);
        if (uevents >= 0 && polled[1].revents)
            take_uevents();
        for (int i = 0; i < BUTTONS; i++)
            if (buttons[i].fd >= 0)
                press_button(buttons[i].fd);
        /* Who does not read the answers and is gone will not be found out by reading from him. */
        if (port.fd >= 0 && !port.absent && port.out.length >= ANSWER_WAITING
            && polled[polled_port].revents & (POLLHUP | POLLERR))
            lose_client();
        if (port.absent && now_ms() >= port.retry_at)
            look_for_client();
        serve_processes();
        answer_waiting(0);
        if (port.fd >= 0 && !port.absent) {
            take_requests();
            do
                send_answers();
            while (port.out.length < ANSWER_WAITING && handle_requests());
        }
        if (thaw_at && now_ms() >= thaw_at)
            thaw();
        if (ending && main_pid && now_ms() >= kill_at)
            kill(main_pid, SIGKILL);
    }
}

static void boot(void) {
    char words[4096];
    clearenv();
    setsid();
    mount_system();
    open_console();
    if (read_text("/proc/cmdline", words, sizeof words))
        for (char *word = strtok(words, " "); word; word = strtok(NULL, " "))
            debug |= !strcmp(word, "debug");
    if (!debug)
        klogctl(8, NULL, 1);     /* the console is the program's; a panic is still told */
    reboot(RB_DISABLE_CAD);
    open_uevents();
    load_modules("/ovt/modules");
    card_flags("lo", IFF_UP);
    /* Movable, so that memory which comes can also go again. */
    write_text("/sys/devices/system/memory/auto_online_blocks", "online_movable", 0);
    read_main();
    const char *name = main_program.hostname ? main_program.hostname : "ovt";
    if (sethostname(name, strlen(name)))
        step("cannot set the host name %s: %s", name, strerror(errno));
    scan_ports();
    scan_buttons();
    step("boot is done, the agent's port is %s", port.fd < 0 ? "missing" : "open");
    int disks = has_disks();       /* the program may look for them at once */
    if (disks)
        load_modules("/ovt/modules.late");
    boot_main();
    if (!disks)
        load_modules("/ovt/modules.late");
    scan_ports();
    scan_buttons();
    scan_cards();
}

int main(int count, char **arguments) {
    sigset_t taken;
    sigfillset(&taken);
    sigprocmask(SIG_SETMASK, &taken, NULL);
    signal(SIGPIPE, SIG_IGN);
    for (int i = 0; i < BUTTONS; i++)
        buttons[i].fd = -1;
    for (int fd; (fd = open("/dev/null", O_RDWR)) <= 2;)
        if (fd < 0)
            break;           /* before /dev is there; the console's descriptors are open then */
    umask(022);
    serving_only = count == 3 && !strcmp(arguments[1], "--serve");
    if (!serving_only && getpid() != 1) {
        static const char usage[] = "usage: ovt-guest --serve FD, or as process 1 of a virtual machine\n";
        return write(2, usage, sizeof usage - 1) < 0 ? 3 : 2;
    }
    if (serving_only) {
        port.fd = atoi(arguments[2]);
        fcntl(port.fd, F_SETFD, FD_CLOEXEC);
        not_blocking(port.fd);
    } else {
        boot();
    }
    serve(signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK));
}
