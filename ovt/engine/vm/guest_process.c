/* Part of guest.c: programs that the agent starts: guest-exec of the protocol, ovt-exec and ovt-io of our own.
 *
 * guest-exec collects the output until it is fetched with the exit status. ovt-exec has a terminal or three pipes and
 * ovt-io carries what goes over them; there the program waits when nobody fetches its output.
 */
enum {
    PROCESSES = 128,
    CAPTURE = 16 << 20,      /* of each stream of guest-exec; what is more is dropped and said so */
    WINDOW = 256 << 10,      /* of each stream of ovt-exec; then it is not read on until fetched */
    INPUT = 4 << 20,         /* that a program may have left unread */
    TERMINAL_RETRY_MS = 100, /* how often a terminal that nobody has open is looked at */
    DRAIN_MS = 500,          /* how long output of left-over grandchildren is awaited after the program's end */
    WAIT_MS = 60000,         /* the longest that ovt-io waits */
};

static struct process {
    pid_t pid;               /* 0: free slot */
    int interactive, tty;    /* of ovt-exec; its in and out are one terminal */
    int in, streams[2];      /* -1: closed */
    struct buffer input, output[2];
    int input_ends, truncated[2];
    int exited, status;
    int64_t drain_until, quiet_until;
} processes[PROCESSES];

static struct { struct process *process; int64_t until; } waiting;     /* an ovt-io that is not answered yet */
static pid_t main_pid;

/* --- running --- */

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* Closes both streams and the input; with a terminal they are the same. */
static void hang_up(struct process *process) {
    if (process->tty)
        process->in = -1;
    close_fd(&process->in);
    close_fd(&process->streams[0]);
    close_fd(&process->streams[1]);
}

static void forget(struct process *process) {
    hang_up(process);
    clear(&process->input);
    clear(&process->output[0]);
    clear(&process->output[1]);
    if (waiting.process == process)
        waiting.process = NULL;
    process->pid = 0;
}

static int finished(const struct process *process) {
    return process->exited && process->streams[0] < 0 && process->streams[1] < 0;
}

/* A free slot; when there is none, that of a program that has ended and that nobody has asked about. */
static struct process *free_slot(void) {
    for (struct process *process = processes; process < processes + PROCESSES; process++)
        if (!process->pid)
            return process;
    for (struct process *process = processes; process < processes + PROCESSES; process++)
        if (finished(process)) {
            forget(process);
            return process;
        }
    fail("%d programs are running already", PROCESSES);
    return NULL;
}

static struct process *find_process(int64_t pid) {
    for (struct process *process = processes; process < processes + PROCESSES; process++)
        if (process->pid && process->pid == pid)
            return process;
    fail("PID %lld does not exist", (long long)pid);
    return NULL;
}

static void not_blocking(int fd) {
    if (fd >= 0)
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

/* Starts a program with a terminal, or with pipes where `piped` (0 input, 1 output, 2 errors) says so. */
static struct process *spawn(struct launch *launch, const int piped[3], int merged) {
    int ours[3] = { -1, -1, -1 }, theirs[3] = { -1, -1, -1 };
    struct process *process = problem.set ? NULL : free_slot();
    if (!process)
        return NULL;
    if (launch->tty) {
        int unlock = 0, master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
        int slave = master < 0 || ioctl(master, TIOCSPTLCK, &unlock) ? -1
            : ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
        if (slave < 0)
            fail_errno(errno, "cannot open", "a terminal");
        set_size(master, launch->rows, launch->columns);
        ours[0] = ours[1] = master;
        for (int i = 0; i < 3; i++)
            theirs[i] = slave;
    }
    for (int i = 0, pair[2]; i < 3 && !launch->tty; i++) {
        if (i == 2 && merged) {
            theirs[2] = theirs[1];
        } else if (!piped[i]) {
            theirs[i] = open("/dev/null", O_RDWR | O_CLOEXEC);
        } else if (!pipe2(pair, O_CLOEXEC)) {
            ours[i] = pair[!i];
            theirs[i] = pair[!!i];
        }
        if (theirs[i] < 0)
            fail_errno(errno, "cannot open", "a pipe");
    }
    pid_t pid = problem.set ? 0 : start(launch, theirs);
    if (!pid && !problem.set)
        fail_launch(launch);
    /* A number that the kernel gives a second time means the new program from now on. */
    for (struct process *old = processes; pid && old < processes + PROCESSES; old++)
        if (old->pid == pid)
            forget(old);
    for (int i = 0; i < 3; i++) {
        if ((!i || theirs[i] != theirs[i - 1]) && theirs[i] >= 0)
            close(theirs[i]);
        not_blocking(ours[i]);
    }
    *process = (struct process){ .tty = launch->tty, .in = ours[0], .streams = { ours[1], ours[2] } };
    if (pid)
        process->pid = pid;
    else
        hang_up(process);
    return pid ? process : NULL;
}

static int full(const struct process *process, int which) {
    return process->interactive && process->output[which].length >= WINDOW;
}

static void take_output(struct process *process, int which) {
    static char chunk[65536];
    while (process->streams[which] >= 0 && !full(process, which)) {
        ssize_t count = read(process->streams[which], chunk, sizeof chunk);
        if (count < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (count <= 0) {
            /* EIO: nobody has the terminal open. Programs close their streams before they end, and hanging up then
             * would kill them; others open /dev/tty again. */
            if (process->tty && !process->exited)
                process->quiet_until = now_ms() + TERMINAL_RETRY_MS;
            else if (process->tty)
                hang_up(process);
            else
                close_fd(&process->streams[which]);
            return;
        }
        struct buffer *output = &process->output[which];
        size_t room = process->interactive ? sizeof chunk : CAPTURE - output->length;
        process->truncated[which] |= (size_t)count > room;
        put(output, chunk, (size_t)count < room ? (size_t)count : room);
        process->truncated[which] |= output->failed;
        output->failed = 0;
    }
}

static void give_input(struct process *process) {
    while (process->in >= 0 && process->input.length) {
        ssize_t count = write(process->in, process->input.data, process->input.length);
        if (count < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (count < 0) {
            clear(&process->input);
            process->input_ends = 1;
            break;
        }
        consume(&process->input, (size_t)count);
    }
    if (process->input_ends && process->in >= 0) {
        if (process->tty && write(process->in, "\4", 1) != 1)     /* VEOF */
            return;
        if (!process->tty)
            close_fd(&process->in);
        process->input_ends = 0;
    }
}

static void reaped(pid_t pid, int status) {
    for (struct process *process = processes; process < processes + PROCESSES; process++)
        if (process->pid == pid && !process->exited) {
            process->exited = 1;
            process->status = status;
            process->drain_until = now_ms() + DRAIN_MS;
            take_output(process, 0);
            take_output(process, 1);
            return;
        }
}

static void print_end(const struct process *process, int flag) {
    print(reply, "\"exited\": %s", flag ? "true" : "false");
    if (flag && WIFSIGNALED(process->status))
        print(reply, ", \"signal\": %d", WTERMSIG(process->status));
    else if (flag)
        print(reply, ", \"exitcode\": %d", WEXITSTATUS(process->status));
}

/* --- commands --- */

static void guest_exec(const struct node *arguments) {
    struct launch launch;
    struct node *capture = member(arguments, "capture-output");
    const char *mode = capture && capture->type == STRING ? capture->text
        : flag_in(arguments, "capture-output", 0) ? "separated" : "none";
    const char *data = string_in(arguments, "input-data");
    struct buffer input = { 0 };
    int merged = !strcmp(mode, "merged"), both = merged || !strcmp(mode, "separated");
    int piped[3] = { !!data, both || !strcmp(mode, "stdout"), both || !strcmp(mode, "stderr") };
    if (!piped[1] && !piped[2] && strcmp(mode, "none"))
        fail("Parameter 'capture-output' does not accept value '%.40s'", mode);
    if (data && !get_base64(&input, data))
        fail("Parameter 'input-data' is not base64");
    read_launch(arguments, &launch);
    struct process *process = spawn(&launch, piped, merged);
    if (process) {
        process->input = input;
        process->input_ends = !!data;
        give_input(process);
        print(reply, "{\"pid\": %d}", (int)process->pid);
    } else {
        clear(&input);
    }
    forget_launch(&launch);
}

static void guest_exec_status(const struct node *arguments) {
    static const char *const names[] = { "out", "err" };
    struct process *process = find_process(required_number(arguments, "pid"));
    if (problem.set)
        return;
    if (process->interactive) {
        fail("PID %d was started by ovt-exec: ovt-io tells its status", (int)process->pid);
        return;
    }
    print(reply, "{");
    print_end(process, finished(process));
    for (int i = 0; i < 2 && finished(process); i++)
        if (process->output[i].length) {
            print(reply, ", \"%s-data\": ", names[i]);
            put_base64(reply, process->output[i].data, process->output[i].length);
            if (process->truncated[i])
                print(reply, ", \"%s-truncated\": true", names[i]);
        }
    print(reply, "}");
    if (finished(process))
        forget(process);
}

static void ovt_exec(const struct node *arguments) {
    struct launch launch;
    static const int piped[3] = { 1, 1, 1 };
    read_launch(arguments, &launch);
    struct process *process = spawn(&launch, piped, 0);
    if (process) {
        process->interactive = 1;
        print(reply, "{\"pid\": %d}", (int)process->pid);
    }
    forget_launch(&launch);
}

/* The answer of an ovt-io: all output there is; the end is told when no output is left. */
static void print_io(struct process *process) {
    static const char *const names[] = { "out", "err" };
    print(reply, "{");
    for (int i = 0; i < 2; i++) {
        if (process->exited && full(process, i))
            process->drain_until = now_ms() + DRAIN_MS;
        print(reply, "\"%s\": ", names[i]);
        put_base64(reply, process->output[i].data, process->output[i].length);
        print(reply, ", ");
        process->output[i].length = 0;
    }
    print(reply, "\"pending\": %zu, ", process->input.length);
    print_end(process, finished(process));
    print(reply, "}");
    if (finished(process))
        forget(process);
}

static int io_ready(const struct process *process) {
    return process->output[0].length || process->output[1].length || finished(process);
}

/* `pid` 0 is the main program: its terminal is the console, so only its size and its signals go this way. */
static void ovt_io(const struct node *arguments) {
    int64_t pid = required_number(arguments, "pid"), wait = number_in(arguments, "wait-ms", 0, 0, INT64_MAX);
    int rows = (int)number_in(arguments, "rows", 0, 0, 0xffff);
    int columns = (int)number_in(arguments, "cols", 0, 0, 0xffff);
    int number = (int)number_in(arguments, "signal", 0, 1, 64), ends = flag_in(arguments, "eof", 0);
    const char *data = string_in(arguments, "input");
    if (!problem.set && main_pid && (!pid || pid == main_pid)) {
        set_size(console, rows, columns);
        if (number)
            kill(main_pid, number);
        print(reply, "{\"out\": \"\", \"err\": \"\", \"pending\": 0, \"exited\": false}");
        return;
    }
    struct process *process = problem.set ? NULL : find_process(pid);
    if (process && !process->interactive)
        fail("PID %d was not started by ovt-exec", (int)process->pid);
    if (process && data && process->input.length > INPUT)
        fail("PID %d does not read its input: %zu bytes wait already", (int)process->pid, process->input.length);
    if (problem.set)
        return;
    if (data && process->in >= 0 && !process->input_ends && !get_base64(&process->input, data)) {
        fail("Parameter 'input' is not base64");
        return;
    }
    process->input_ends |= ends;
    if (process->tty)
        set_size(process->streams[0], rows, columns);
    give_input(process);
    if (number && !process->exited)
        kill(process->pid, number);
    take_output(process, 0);
    take_output(process, 1);
    if (io_ready(process) || !wait) {
        print_io(process);
        return;
    }
    waiting.process = process;
    waiting.until = now_ms() + (wait < WAIT_MS ? wait : WAIT_MS);
}
