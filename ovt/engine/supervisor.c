/* ovt-supervisor: the one small process beside a detached guest, container or virtual machine alike.
 *
 *   ovt-supervisor --pid N --dir DIR [--name TEXT] [--stdin FD] [--stdout FD --stderr FD | --pty FD]
 *                  [--log PATH --log-max BYTES --log-files N] [--events FD] [--ready FD]
 *                  [--exit-command PROGRAM ARGUMENT...]
 *
 * supervisor.py forks, creates the guest and executes this program in place, so the guest is its child. It copies the
 * guest's output to the log and to attach clients, reaps the guest, writes DIR/exit.json and becomes the exit
 * command. It is not a daemon, knows no policy, and never holds the guest up for the log or an ordinary client.
 * All memory is static or, for what a client has not taken, one lazily mapped queue: a supervisor that waits costs
 * little more than its stack, and no libc is linked (freestanding.c). Needs Linux 5.9 (close_range).
 *
 * Events: what the guest's hypervisor tells on --events (QMP, lines of JSON) is appended to DIR/qmp.log as it is.
 * Log: CRI lines, `2026-11-22T16:00:00.000000000Z stdout F text`; P instead of F where the line goes on.
 * Attach: DIR/attach.sock is SOCK_SEQPACKET; every packet is one letter and its data.
 *   from clients  H flags      first packet; 1 = lossless (the guest waits for me), 2 = quiet (only the exit, please)
 *                 I data       for the guest's standard input; ignored unless --stdin was given
 *                 E            end of input: closes the pipe, or types a terminal's end-of-file character; with --events
 *                              that is ^D, for the terminal that matters is the guest's own
 *                 W rows cols  window size, big-endian 16 bits each
 *   to clients    A flags      attached, nothing is missed from here on; 1 = terminal, 2 = input is taken
 *                 O data, E data   standard output, standard error
 *                 L count      so many bytes (big-endian, 64 bits) were skipped because the client was too slow
 *                 X status     the guest has ended, 128 + n on a signal; the last packet
 *                 B            too many clients
 * Closing the socket is detaching.
 */
#include "freestanding.c"

enum {
    CHUNK = 16384,           /* longest piece of output in one read, packet or log record */
    BATCH = 2 * CHUNK,       /* log records gathered for one write */
    CLIENTS = 64,
    QUEUE = 4 << 20,         /* holds two full pipes of the largest size an unprivileged guest can set (1 MiB) */
    DRAIN_MS = 500,          /* how long output of left-over grandchildren is awaited after the guest's end */
    PTY_RETRY_MS = 1000,     /* how often a terminal that nobody has open is looked at, at least */
    EVENTS_MAX = 4 << 20,    /* bytes of qmp.log before it becomes qmp.log.1 */
    EXIT_RETRY_MS = 100,     /* between attempts to write exit.json on a full disk … */
    EXIT_RETRIES = 600,      /* … and how many: one minute */
};
enum { LOSSLESS = 1, QUIET = 2 };

struct client {
    int fd;                  /* 0: free slot */
    unsigned char flags, greeted, hung_up, behind;
    uint64_t skipped;        /* bytes not sent since the client fell behind; only without LOSSLESS */
    size_t offset;           /* of the first packet in the queue that it has not got; only while behind */
};

static struct client clients[CLIENTS];
static struct { char *data; size_t length; int failed; } queue;    /* [length, 2 bytes][packet] … */
static struct { int fd; char name[8]; unsigned char kind, in_line; } outputs[2] = {
    { -1, "stdout", 'O', 0 }, { -1, "stderr", 'E', 0 } };
static struct { int fd, tty, machine, in_line, offset, length; } input = { .fd = -1 };
static char packet_in[CHUNK + 1];   /* the last packet of a client; the part of it that the guest has yet to take is in input */
static struct { int directory, fd, files, error; const char *name; uint64_t size, max, lost_lines, lost_bytes; } logging = {
    .directory = -1, .fd = -1, .files = 1, .max = UINT64_MAX };
static char batch[BATCH], chunk[CHUNK + 1];
static size_t batched;
static int events = -1, events_file = -1;
static int directory = -1, listener = -1, ready = -1, signals = -1, ended, status;
static pid_t guest;
static int pty_sleep;             /* milliseconds until a terminal that nobody has open is read again; 0: it is open */
static mode_t callers_umask;

/* text without stdio */

static char *put(char *at, const char *text) { return (char *)memcpy(at, text, strlen(text) + 1) + strlen(text); }

static char *put_some(char *at, const char *text, size_t most) {
    size_t n = strlen(text) < most ? strlen(text) : most;
    at = mempcpy(at, text, n);
    *at = 0;
    return at;
}

static uint64_t number(const char *text) {
    uint64_t value = 0;
    for (; *text >= '0' && *text <= '9'; text++) value = value * 10 + (*text - '0');
    return value;
}

static char *put_number(char *at, uint64_t value, int width) {
    char digits[20];
    int n = 0;
    do digits[n++] = '0' + value % 10; while (value /= 10);
    for (; width > n; width--) *at++ = '0';
    while (n) *at++ = digits[--n];
    *at = 0;
    return at;
}

/* RFC 3339 in UTC, nanoseconds: 30 characters. The calendar is computed in years that begin in March. */
static char *put_time(char *at, const struct timespec *when) {
    static time_t cached = -1;
    static char text[21];
    if (when->tv_sec != cached) {
        uint64_t day = when->tv_sec / 86400 + 719468, second = when->tv_sec % 86400;
        uint64_t era = day / 146097, doe = day % 146097;
        uint64_t yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
        uint64_t doy = doe - (365 * yoe + yoe / 4 - yoe / 100), mp = (5 * doy + 2) / 153;
        uint64_t month = mp < 10 ? mp + 3 : mp - 9;
        char *p = put_number(text, yoe + era * 400 + (month <= 2), 4);
        p = put_number(put(p, "-"), month, 2);
        p = put_number(put(p, "-"), doy - (153 * mp + 2) / 5 + 1, 2);
        p = put_number(put(p, "T"), second / 3600, 2);
        p = put_number(put(p, ":"), second / 60 % 60, 2);
        put_number(put(p, ":"), second % 60, 2);
        cached = when->tv_sec;
    }
    return put(put_number(put(put(at, text), "."), when->tv_nsec, 9), "Z");
}

static int64_t milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void fail(const char *what) {
    char text[512], *at = put(text, "E");
    at = put(put_number(put(put_some(at, what, 300), ": errno "), errno, 1), "\n");
    if (guest > 0) {
        kill(guest, SIGKILL);
        waitpid(guest, NULL, 0);
    }
    if (ready >= 0 && write(ready, text, at - text) < 0) _exit(2);
    _exit(1);
}

/* the log */

static void log_open(void) {
    char last = '\n';
    struct stat seen;
    logging.fd = open_at(logging.directory, logging.name, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (logging.fd < 0) {
        logging.error = errno;
        return;
    }
    logging.size = fstat(logging.fd, &seen) == 0 ? seen.st_size : 0;
    /* a predecessor killed within a write left a torn record: end its line, so that ours stay readable */
    if (logging.size && pread(logging.fd, &last, 1, logging.size - 1) == 1 && last != '\n' && write(logging.fd, "\n", 1) == 1)
        logging.size++;
}

static const char *log_numbered(char *at, int number) {
    if (number == 0) return logging.name;
    put_number(put(put(at, logging.name), "."), number, 1);
    return at;
}

static void log_rotate(void) {
    char from[300], to[300];
    close(logging.fd);
    unlinkat(logging.directory, log_numbered(from, logging.files - 1), 0);
    for (int n = logging.files - 1; n > 0; n--)
        renameat(logging.directory, log_numbered(from, n - 1), logging.directory, log_numbered(to, n));
    log_open();
}

/* All of it or, up to the last whole record, what the disk takes; the number of bytes kept. */
static size_t log_append(const char *data, size_t length) {
    ssize_t n = -1;
    if (logging.fd >= 0 && logging.size && logging.size + length > logging.max) log_rotate();
    if (logging.fd < 0) log_open();
    if (logging.fd < 0) return 0;
    n = write(logging.fd, data, length);
    size_t kept = n < 0 ? 0 : n;
    if (kept < length) {
        logging.error = n < 0 ? errno : ENOSPC;
        const char *end = kept ? find_last(data, '\n', kept) : NULL;
        size_t whole = end ? (size_t)(end + 1 - data) : 0;
        if (kept > whole && ftruncate(logging.fd, logging.size + whole) == 0) kept = whole;
    }
    logging.size += kept;
    return kept;
}

static void log_flush(const struct timespec *now) {
    if (batched && logging.lost_lines) {
        char text[200], *at = put(put_time(text, now), " stderr F ovt: ");
        at = put_number(at, logging.lost_lines, 1);
        at = put_number(put(at, " log records ("), logging.lost_bytes, 1);
        at = put_number(put(at, " bytes) were lost: the log could not be written, errno "), logging.error, 1);
        at = put(at, "\n");
        if (log_append(text, at - text) == (size_t)(at - text)) logging.lost_lines = logging.lost_bytes = 0;
    }
    size_t kept = batched && !logging.lost_lines ? log_append(batch, batched) : 0;
    for (size_t i = kept; i < batched; i++) logging.lost_lines += batch[i] == '\n';
    logging.lost_bytes += batched - kept;
    batched = 0;
}

static void log_output(int stream, const char *data, size_t length) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    while (length) {
        const char *newline = find(data, '\n', length);
        size_t n = newline ? (size_t)(newline - data) : length, space = n + 48;
        if (batched && (batched + space > BATCH || batched + space > logging.max)) log_flush(&now);
        char *at = put(put(put_time(batch + batched, &now), " "), outputs[stream].name);
        at = mempcpy(put(at, newline ? " F " : " P "), data, n);
        *at++ = '\n';
        batched = at - batch;
        data += n + !!newline;
        length -= n + !!newline;
    }
    log_flush(&now);
}

/* attach clients */

static void client_close(struct client *c) {
    close(c->fd);
    memset(c, 0, sizeof *c);
}

/* 1 sent, 0 full; a client that went away counts as sent, reading from it will tell */
static int client_send(struct client *c, const void *packet, size_t length) {
    return send(c->fd, packet, length, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0 || (errno != EAGAIN && errno != ENOBUFS && errno != ENOMEM);
}

static void client_flush(struct client *c) {
    if (c->skipped) {
        unsigned char packet[9] = { 'L' };
        for (int i = 0; i < 8; i++) packet[8 - i] = c->skipped >> (8 * i);
        if (!client_send(c, packet, sizeof packet)) return;
        c->skipped = 0;
    }
    while (c->behind && c->offset < queue.length) {
        uint16_t length;
        memcpy(&length, queue.data + c->offset, 2);
        if (!client_send(c, queue.data + c->offset + 2, length)) return;
        c->offset += 2 + length;
    }
    c->behind = 0;
}

static void queue_release(void) {
    if (!queue.length) return;
    for (int i = 0; i < CLIENTS; i++)
        if (clients[i].fd && clients[i].behind) return;
    queue.length = 0;
    madvise(queue.data, QUEUE, MADV_DONTNEED);
}

static int queue_room(void) { return !queue.failed && queue.length + 2 + CHUNK + 1 <= QUEUE; }

/* To every greeted client. What one does not take now is queued if it is lossless or this is the exit, else skipped. */
static void broadcast(const char *packet, size_t length) {
    uint16_t size = length;
    size_t at = queue.length;
    int queued = 0, last = packet[0] == 'X';
    for (struct client *c = clients; c < clients + CLIENTS; c++) {
        if (!c->fd || !c->greeted || c->hung_up || ((c->flags & QUIET) && !last)) continue;
        if (c->skipped) client_flush(c);
        if (!c->behind && !c->skipped && client_send(c, packet, length)) continue;
        if (!(c->flags & LOSSLESS) && !last) {
            c->skipped += length - 1;
            continue;
        }
        if (!queue.data) {
            queue.data = mmap(NULL, QUEUE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (queue.data == MAP_FAILED) queue.data = NULL, queue.failed = 1;
        }
        if (queue.failed || at + 2 + length > QUEUE) {
            c->skipped += length - 1;
            continue;
        }
        if (!c->behind) c->offset = at;
        c->behind = queued = 1;
    }
    if (queued) {
        memcpy(queue.data + at, &size, 2);
        memcpy(queue.data + at + 2, packet, length);
        queue.length = at + 2 + length;
    }
}

static void client_accept(void) {
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return;
    for (struct client *c = clients; c < clients + CLIENTS; c++)
        if (!c->fd) {
            c->fd = fd;
            return;
        }
    struct client surplus = { .fd = fd };
    client_send(&surplus, "B", 1);
    close(fd);
}

/* input */

static void input_close(void) {
    if (input.fd >= 0 && !input.tty) close(input.fd);
    input.fd = -1;
    input.length = 0;
}

static void input_flush(void) {
    while (input.length) {
        ssize_t n = write(input.fd, packet_in + input.offset, input.length);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (n < 0 && input.tty) {              /* nobody has the terminal open: like a key pressed too early */
            input.length = 0;
            return;
        }
        if (n < 0) {
            input_close();
            return;
        }
        input.offset += n;
        input.length -= n;
    }
}

static void input_end(void) {
    struct termios modes;
    if (!input.tty) {
        input_close();
    } else if (control_device(input.fd, TCGETS, &modes) == 0 && (modes.c_lflag & ICANON)) {
        packet_in[1] = modes.c_cc[VEOF];
        input.offset = input.length = 1;
        input_flush();
    } else if (input.machine) {                /* the terminal is a wire to one inside, whose modes cannot be seen */
        packet_in[1] = packet_in[2] = 4;       /* ^D; within a line it ends but that */
        input.offset = 1;
        input.length = input.in_line ? 2 : 1;
        input.in_line = 0;
        input_flush();
    }
}

/* One packet; never called while input waits for the guest, because its buffer is packet_in. */
static void client_read(struct client *c) {
    ssize_t n = recv(c->fd, packet_in, sizeof packet_in, MSG_DONTWAIT | MSG_TRUNC);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    const unsigned char *packet = (unsigned char *)packet_in;
    if (n <= 0 || n > (ssize_t)sizeof packet_in || (!c->greeted && (packet[0] != 'H' || n != 2))) {
        client_close(c);
    } else if (packet[0] == 'H' && n == 2) {
        char answer[2] = { 'A', (input.tty ? 1 : 0) | (input.fd >= 0 ? 2 : 0) };
        c->flags = packet[1];
        c->greeted = 1;
        client_send(c, answer, 2);
    } else if (packet[0] == 'I' && input.fd >= 0) {
        input.offset = 1;
        input.length = n - 1;
        if (n > 1) input.in_line = packet[n - 1] != '\n' && packet[n - 1] != '\r';
        input_flush();
    } else if (packet[0] == 'E' && input.fd >= 0) {
        input_end();
    } else if (packet[0] == 'W' && n == 5 && input.tty && outputs[0].fd >= 0) {
        struct winsize size = { .ws_row = packet[1] << 8 | packet[2], .ws_col = packet[3] << 8 | packet[4] };
        control_device(outputs[0].fd, TIOCSWINSZ, &size);
    }
}

/* output */

/* One piece; whether there may be more. */
static int output_read(int stream) {
    ssize_t n = read(outputs[stream].fd, chunk + 1, CHUNK);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    if (n < 0 && input.tty && !ended) {        /* EIO: no process has the terminal open now; a later one may */
        pty_sleep = pty_sleep * 2 > PTY_RETRY_MS ? PTY_RETRY_MS : pty_sleep ? pty_sleep * 2 : 10;
        return 0;
    }
    if (n <= 0) {
        close(outputs[stream].fd);
        if (input.tty) input.fd = -1;
        outputs[stream].fd = -1;
        return 0;
    }
    pty_sleep = 0;
    if (logging.name) log_output(stream, chunk + 1, n);
    chunk[0] = outputs[stream].kind;
    broadcast(chunk, n + 1);
    return 1;
}

/* Events that the disk does not take are lost; the hypervisor must not wait for it. */
static void events_read(void) {
    ssize_t n = read(events, chunk, CHUNK);
    struct stat seen;
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) {
        close(events);
        events = -1;
        return;
    }
    if (events_file >= 0 && fstat(events_file, &seen) == 0 && seen.st_size > EVENTS_MAX && chunk[n - 1] == '\n') {
        renameat(directory, "qmp.log", directory, "qmp.log.1");
        close(events_file);
        events_file = -1;
    }
    if (events_file < 0)
        events_file = open_at(directory, "qmp.log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (events_file >= 0 && write(events_file, chunk, n) < 0) return;
}

/* What was written before the guest ended is in the pipes: all of that is read. Others may hold the pipes open. */
static void drain(void) {
    int64_t deadline = milliseconds() + DRAIN_MS, left = DRAIN_MS;
    while ((outputs[0].fd >= 0 || outputs[1].fd >= 0) && left >= 0) {
        struct pollfd waiting[2] = { { outputs[0].fd, POLLIN, 0 }, { outputs[1].fd, POLLIN, 0 } };
        if (poll(waiting, 2, left) < 0 && errno != EINTR) return;
        for (int i = 0; i < 2; i++)
            while (outputs[i].fd >= 0 && queue_room() && output_read(i) && milliseconds() <= deadline + DRAIN_MS) {}
        if (!queue_room()) return;
        left = deadline - milliseconds();
    }
}

/* the end */

static void reap(void) {
    struct signalfd_siginfo info;
    while (read(signals, &info, sizeof info) == sizeof info)
        if (info.ssi_signo != SIGCHLD && !ended) kill(guest, info.ssi_signo);
    int how;
    for (pid_t pid; (pid = waitpid(-1, &how, WNOHANG)) > 0;)
        if (pid == guest) {
            ended = 1;
            status = how;
        }
}

static int exit_code(void) { return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status); }

static int exit_record(const struct timespec *when) {
    char text[200], *at = put_number(put(text, "{\"pid\": "), guest, 1);
    at = put_number(put(at, ", \"code\": "), exit_code(), 1);
    if (WIFSIGNALED(status)) at = put_number(put(at, ", \"signal\": "), WTERMSIG(status), 1);
    at = put(put_time(put(at, ", \"finished\": \""), when), "\"}\n");
    int fd = open_at(directory, ".exit.json", O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0) return 0;
    int done = pwrite(fd, text, at - text, 0) == at - text && ftruncate(fd, at - text) == 0 && fsync(fd) == 0;
    close(fd);
    return done && renameat(directory, ".exit.json", directory, "exit.json") == 0 && (fsync(directory) == 0 || errno == EINVAL);
}

static int unserved(void) {
    int n = 0;
    for (struct client *c = clients; c < clients + CLIENTS; c++) n += c->fd && !c->hung_up && (c->behind || c->skipped);
    return n;
}

/* Give slow clients the rest, for as long as they stay connected. */
static void linger(void) {
    while (unserved()) {
        struct pollfd waiting[CLIENTS];
        for (int i = 0; i < CLIENTS; i++)
            waiting[i] = (struct pollfd) { clients[i].fd && (clients[i].behind || clients[i].skipped) ? clients[i].fd : -1, POLLOUT, 0 };
        if (poll(waiting, CLIENTS, -1) < 0) continue;
        for (int i = 0; i < CLIENTS; i++) {
            if (waiting[i].revents & (POLLHUP | POLLERR)) clients[i].hung_up = 1;
            else if (waiting[i].revents) client_flush(&clients[i]);
        }
    }
}

static void finish(char **command) {
    struct timespec when;
    clock_gettime(CLOCK_REALTIME, &when);
    drain();
    for (struct pollfd more = { events, POLLIN, 0 }; events >= 0 && poll(&more, 1, 0) == 1;) events_read();
    for (struct pollfd more = { listener, POLLIN, 0 }; poll(&more, 1, 0) == 1;) client_accept();
    for (struct client *c = clients; c < clients + CLIENTS; c++)
        if (c->fd && !c->greeted) input.length = 0, client_read(c);
    char packet[2] = { 'X', exit_code() };
    int recorded = exit_record(&when);
    broadcast(packet, 2);
    unlinkat(directory, "attach.sock", 0);
    close(listener);
    for (int i = 0; i < EXIT_RETRIES && !recorded; i++) {
        poll(NULL, 0, EXIT_RETRY_MS);
        recorded = exit_record(&when);
    }
    /* the exit command must not wait for a pager, nor the pager's reader lose the end */
    if (unserved()) {
        pid_t pid = fork();
        if (pid == 0)
            for (int i = 0; i < 2; i++) close(outputs[i].fd);
        if (pid <= 0) linger();
        if (pid == 0) _exit(0);
    }
    if (!command) _exit(recorded ? 0 : 1);
    signal_action(SIGHUP, SIG_DFL);
    signal_action(SIGPIPE, SIG_DFL);
    signal_action(SIGXFSZ, SIG_DFL);
    signal_mask(0);
    umask(callers_umask);
    control_process(PR_SET_CHILD_SUBREAPER, 0);
    execv(command[0], command);
    _exit(127);
}

/* the beginning */

static void keep_only(int *keep, int count) {
    unsigned low = 3;
    for (;;) {
        unsigned next = ~0U;
        for (int i = 0; i < count; i++)
            if (keep[i] >= (int)low && (unsigned)keep[i] < next) next = keep[i];
        if (next > low && close_fds(low, next == ~0U ? next : next - 1) < 0) fail("close_range");
        if (next == ~0U) return;
        control_fd(next, F_SETFD, FD_CLOEXEC);
        low = next + 1;
    }
}

static void nonblocking(int fd) {
    if (fd >= 0 && control_fd(fd, F_SETFL, control_fd(fd, F_GETFL, 0) | O_NONBLOCK) < 0) fail("a descriptor for standard streams");
}

static void listen_at(const char *path) {
    struct sockaddr_un address = { AF_UNIX, "attach.sock" };
    struct stat unused;
    directory = open_at(AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    if (directory < 0 || fchdir(directory) < 0) fail(path);
    unlinkat(directory, "attach.sock", 0);
    callers_umask = umask(0177);
    listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    /* bound by its last name alone: sun_path holds 107 characters, instance directories may be longer */
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 64) < 0)
        fail("attach.sock");
    /* the guest's end must be recorded even when the disk is full by then: take the space now */
    int fd = open_at(directory, ".exit.json", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0 || (fallocate(fd, 0, 0, 256) < 0 && errno != EOPNOTSUPP) || fstat(fd, &unused) < 0) fail(".exit.json");
    close(fd);
}

static void log_at(char *path) {
    char *slash = (char *)find_last(path, '/', strlen(path));
    if (!slash || strlen(slash + 1) > 255 - 12) {
        errno = EINVAL;
        fail("--log");
    }
    *slash = 0;
    logging.directory = open_at(AT_FDCWD, *path ? path : "/", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    logging.name = slash + 1;
    if (logging.directory < 0) fail("--log");
    log_open();
    if (logging.fd < 0) errno = logging.error, fail("--log");
}

static void serve(void) {
    enum { SIGNALS, LISTENER, EVENTS, OUTPUT, INPUT = OUTPUT + 2, FIRST };
    struct pollfd waiting[FIRST + CLIENTS];
    waiting[SIGNALS] = (struct pollfd) { signals, POLLIN, 0 };
    waiting[LISTENER] = (struct pollfd) { listener, POLLIN, 0 };
    while (!ended) {
        waiting[EVENTS] = (struct pollfd) { events, POLLIN, 0 };
        for (int i = 0; i < 2; i++)            /* a filled queue is a lossless client that the guest waits for */
            waiting[OUTPUT + i] = (struct pollfd) { queue.length || pty_sleep ? -1 : outputs[i].fd, POLLIN, 0 };
        waiting[INPUT] = (struct pollfd) { input.length ? input.fd : -1, POLLOUT, 0 };
        for (int i = 0; i < CLIENTS; i++) {
            struct client *c = &clients[i];
            int wanted = (input.length ? 0 : POLLIN) | (c->behind || c->skipped ? POLLOUT : 0);
            waiting[FIRST + i] = (struct pollfd) { c->fd && !(c->hung_up && input.length) ? c->fd : -1, wanted, 0 };
        }
        if (poll(waiting, FIRST + CLIENTS, pty_sleep ? pty_sleep : -1) < 0) continue;
        if (waiting[INPUT].revents) input_flush();
        for (int i = 0; i < CLIENTS; i++) {
            struct client *c = &clients[i];
            int got = waiting[FIRST + i].revents;
            if (got & (POLLHUP | POLLERR)) c->hung_up = 1, c->behind = 0, c->skipped = 0;
            if ((got & POLLOUT) && !c->hung_up) client_flush(c);
            if ((got & (POLLIN | POLLHUP | POLLERR)) && !input.length) client_read(c);
        }
        queue_release();
        if (waiting[LISTENER].revents) client_accept();
        for (int i = 0; i < 2; i++)
            if (outputs[i].fd >= 0 && !queue.length && (waiting[OUTPUT + i].revents || pty_sleep)) output_read(i);
        if (waiting[EVENTS].revents) events_read();
        if (waiting[SIGNALS].revents) reap();
    }
}

static int run(int argc, char **argv) {
    char *path = NULL, *log = NULL, *name = NULL, **command = NULL;
    for (int i = 1; i + 1 < argc && !command; i += 2) {
        const char *key = argv[i];
        char *value = argv[i + 1];
        if (!strcmp(key, "--pid")) guest = number(value);
        else if (!strcmp(key, "--dir")) path = value;
        else if (!strcmp(key, "--name")) name = value;
        else if (!strcmp(key, "--stdin")) input.fd = number(value);
        else if (!strcmp(key, "--stdout")) outputs[0].fd = number(value);
        else if (!strcmp(key, "--stderr")) outputs[1].fd = number(value);
        else if (!strcmp(key, "--pty")) outputs[0].fd = number(value), input.tty = 1;
        else if (!strcmp(key, "--log")) log = value;
        else if (!strcmp(key, "--log-max")) logging.max = number(value);
        else if (!strcmp(key, "--log-files")) logging.files = number(value);
        else if (!strcmp(key, "--events")) events = number(value), input.machine = 1;
        else if (!strcmp(key, "--ready")) ready = number(value);
        else if (!strcmp(key, "--exit-command")) command = argv + i + 1;
        else guest = 0;
    }
    errno = EINVAL;
    if (guest <= 0 || !path || logging.files < 1 || logging.files > 999 || (input.tty && input.fd >= 0 && input.fd != outputs[0].fd))
        guest = 0, fail("arguments");
    if (name) {
        char title[16];
        put_some(put(title, "ovt:"), name, sizeof title - 5);
        control_process(PR_SET_NAME, (long)title);
    }
    int null = open_at(AT_FDCWD, "/dev/null", O_RDWR | O_CLOEXEC, 0);
    for (int fd = 0; fd < 3; fd++)
        if (null < 0 || dup2(null, fd) < 0) fail("/dev/null");
    keep_only((int[]) { input.fd, outputs[0].fd, outputs[1].fd, events, ready }, 5);
    siginfo_t seen;
    if (waitid(P_PID, guest, &seen, WEXITED | WNOHANG | WNOWAIT) < 0) fail("--pid is not a child of this process");
    if (control_process(PR_SET_CHILD_SUBREAPER, 1) < 0) fail("PR_SET_CHILD_SUBREAPER");
    if (getsid(0) != getpid()) setsid();
    signal_action(SIGHUP, SIG_IGN);
    signal_action(SIGPIPE, SIG_IGN);
    signal_action(SIGXFSZ, SIG_IGN);
    signal_action(SIGCHLD, SIG_DFL);           /* were it ignored, as a caller may, the guest's status would be lost */
    uint64_t mask = 0;
    for (const char *n = (char[]) { SIGCHLD, SIGTERM, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, 0 }; *n; n++) mask |= 1UL << (*n - 1);
    signal_mask(mask);
    signals = signal_descriptor(mask);
    if (signals < 0) fail("signalfd");
    nonblocking(input.fd);
    nonblocking(outputs[0].fd);
    nonblocking(outputs[1].fd);
    nonblocking(events);
    listen_at(path);
    if (log) log_at(log);
    if (chdir("/") < 0) fail("/");
    /* nobody is there to start or stop this guest when the launcher died: end it, record that, run the exit command */
    if (ready >= 0 && write(ready, "R\n", 2) != 2) kill(guest, SIGKILL);
    close(ready);
    ready = -1;
    reap();
    serve();
    finish(command);
    return 0;
}

/* Where the kernel's stack begins: argc, argv, NULL, the environment. */
__attribute__((used, noreturn)) void begin(long *stack) {
    environment = (char **)(stack + 1) + stack[0] + 1;
    _exit(run(stack[0], (char **)(stack + 1)));
}
