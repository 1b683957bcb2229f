/* Part of guest.c: the protocol of the QEMU guest agent: lines of JSON, one request and one answer at a time.
 *
 * The other side may vanish in the middle of anything and another may come: a request without its end is dropped at the
 * byte 0xFF, which a client sends before guest-sync-delimited, and when the port says that nobody is there.
 */
enum {
    REQUEST_MAX = (1 << 20) + 4096,      /* a payload of 1 MiB and what is around it */
    ANSWER_WAITING = 64 << 10,           /* unread answers of more than this, and no request is read */
    PORT_RETRY_MS = 1000,
};
enum { WHILE_FROZEN = 1, INSIDE_ONLY = 2, DELIMITED = 4 };

static void guest_sync(const struct node *arguments) {
    print(reply, "%lld", (long long)required_number(arguments, "id"));
}

static void guest_ping(const struct node *arguments) {
    (void)arguments;
    print(reply, "{}");
}

static void guest_info(const struct node *arguments);

/* name, function, parameters, what is special */
static const struct command {
    const char *name;
    void (*function)(const struct node *);
    const char *parameters;
    int flags;
} commands[] = {
    { "guest-exec", guest_exec, "path arg env cwd user input-data capture-output", 0 },
    { "guest-exec-status", guest_exec_status, "pid", 0 },
    { "guest-file-close", file_close, "handle", 0 },
    { "guest-file-flush", file_flush, "handle", 0 },
    { "guest-file-open", file_open, "path mode", 0 },
    { "guest-file-read", file_read, "handle count", 0 },
    { "guest-file-seek", file_seek, "handle offset whence", 0 },
    { "guest-file-write", file_write, "handle buf-b64 count", 0 },
    { "guest-fsfreeze-freeze", freeze, "", INSIDE_ONLY },
    { "guest-fsfreeze-freeze-list", freeze, "mountpoints", INSIDE_ONLY },
    { "guest-fsfreeze-status", freeze_status, "", WHILE_FROZEN },
    { "guest-fsfreeze-thaw", thaw_command, "", WHILE_FROZEN | INSIDE_ONLY },
    { "guest-fstrim", trim, "minimum", INSIDE_ONLY },
    { "guest-get-fsinfo", get_fsinfo, "", 0 },
    { "guest-get-host-name", get_host_name, "", 0 },
    { "guest-get-memory-block-info", get_memory_block_info, "", 0 },
    { "guest-get-memory-blocks", get_memory_blocks, "", 0 },
    { "guest-get-osinfo", get_osinfo, "", 0 },
    { "guest-get-time", get_time, "", 0 },
    { "guest-get-timezone", get_timezone, "", 0 },
    { "guest-get-users", get_users, "", 0 },
    { "guest-get-vcpus", get_vcpus, "", 0 },
    { "guest-info", guest_info, "", WHILE_FROZEN },
    { "guest-network-get-interfaces", get_interfaces, "", 0 },
    { "guest-ping", guest_ping, "", WHILE_FROZEN },
    { "guest-set-memory-blocks", set_memory_blocks, "mem-blks", INSIDE_ONLY },
    { "guest-set-time", set_time, "time", INSIDE_ONLY },
    { "guest-set-vcpus", set_vcpus, "vcpus", INSIDE_ONLY },
    { "guest-shutdown", shutdown_command, "mode", INSIDE_ONLY },
    { "guest-suspend-ram", suspend, "", INSIDE_ONLY },
    { "guest-sync", guest_sync, "id", WHILE_FROZEN },
    { "guest-sync-delimited", guest_sync, "id", WHILE_FROZEN | DELIMITED },
    { "ovt-exec", ovt_exec, "path arg env cwd user tty rows cols", 0 },
    { "ovt-identity", ovt_identity, "hostname machine-id mac interface entropy time", INSIDE_ONLY },
    { "ovt-io", ovt_io, "pid input eof rows cols signal wait-ms", 0 },
    { "ovt-main", ovt_main, "path arg env cwd user tty rows cols poweroff", INSIDE_ONLY },
};

static void guest_info(const struct node *arguments) {
    (void)arguments;
    print(reply, "{\"version\": \"ovt 1\", \"supported_commands\": [");
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        int silent = commands[i].function == shutdown_command || commands[i].function == suspend;
        print(reply, "%s{\"name\": \"%s\", \"enabled\": %s, \"success-response\": %s}", i ? ", " : "", commands[i].name,
              serving_only && commands[i].flags & INSIDE_ONLY ? "false" : "true", silent ? "false" : "true");
    }
    print(reply, "]}");
}

/* --- answers --- */

/* Ends the answer that begins at `from`: what a command has printed, or its error instead. */
static void end_answer(size_t from) {
    if (reply->failed) {
        reply->failed = 0;
        problem.set = 0;
        fail("out of memory");
    }
    if (problem.set) {
        reply->length = from;
        print(reply, "{\"error\": {\"class\": \"%s\", ", problem.class);
        put_member(reply, "desc", problem.text);
        if (problem.number)
            print(reply, ", \"errno\": %d", problem.number);
        print(reply, "}");
    }
    put(reply, "}\n", 2);
}

static void answer_waiting(int now) {
    if (!waiting.process || !(now || io_ready(waiting.process) || now_ms() >= waiting.until))
        return;
    size_t from = reply->length;
    struct process *process = waiting.process;
    waiting.process = NULL;
    memset(&problem, 0, sizeof problem);
    print(reply, "{\"return\": ");
    print_io(process);
    end_answer(from);
}

static int allowed(const struct command *command, const char *parameter) {
    size_t length = strlen(parameter);
    for (const char *at = command->parameters; *at; at += strspn(at, " ")) {
        size_t word = strcspn(at, " ");
        if (word == length && !memcmp(at, parameter, word))
            return 1;
        at += word;
    }
    return 0;
}

static const struct command *find_command(const struct node *request) {
    struct node *arguments = member(request, "arguments"), *name = member(request, "execute");
    const struct command *command = NULL;
    if (!name || name->type != STRING) {
        fail(request && request->type == OBJECT ? "the request lacks 'execute'" : "the request is not an object");
        return NULL;
    }
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(commands[i].name, name->text))
            command = &commands[i];
    if (!command) {
        fail("The command %.100s has not been found", name->text);
        problem.class = "CommandNotFound";
        return NULL;
    }
    if (arguments && arguments->type != OBJECT)
        fail("'arguments' must be an object");
    for (struct node *node = arguments ? first_of(arguments) : NULL; node && !problem.set; node = next_of(node))
        if (!allowed(command, node->key))
            fail("Parameter '%.60s' is unexpected", node->key);
    if (thaw_at && !(command->flags & WHILE_FROZEN))
        fail("%s is not possible while file systems are frozen: thaw them first", command->name);
    if (serving_only && command->flags & INSIDE_ONLY)
        fail("%s is only for the first process of a virtual machine", command->name);
    return command;
}

static void handle_line(char *line, size_t length) {
    while (length && line[length - 1] == '\r')
        length--;
    if (!length)
        return;
    answer_waiting(1);
    memset(&problem, 0, sizeof problem);
    no_reply = 0;
    struct node *request = read_json(line, length);
    if (!request)
        fail("Invalid JSON: %s", json.error);
    const struct command *command = problem.set ? NULL : find_command(request);
    size_t from = reply->length;
    if (command && command->flags & DELIMITED)
        put(reply, "\xff", 1);
    print(reply, "{\"return\": ");
    if (!problem.set)
        command->function(member(request, "arguments"));
    if (!problem.set && (waiting.process || no_reply))
        reply->length = from;
    else
        end_answer(from);
}

/* --- the port --- */

static void open_port(int fd) {
    if (fd < 0)
        return;
    port.fd = fd;
    /* The port sends SIGIO when somebody comes to the other end; poll would only tell, all the time, that nobody is. */
    fcntl(fd, F_SETOWN, getpid());
    fcntl(fd, F_SETFL, O_NONBLOCK | O_ASYNC);
    port.absent = 1;
    port.retry_at = 0;
}

static void lose_client(void) {
    if (serving_only)
        exit(0);
    port.absent = 1;
    port.retry_at = now_ms() + PORT_RETRY_MS;
    port.skipping = 0;
    port.scanned = 0;
    clear(&port.in);
    clear(&port.out);
    waiting.process = NULL;
}

static void look_for_client(void) {
    struct pollfd one = { .fd = port.fd, .events = POLLIN };
    if (port.fd < 0 || !port.absent)
        return;
    port.retry_at = now_ms() + PORT_RETRY_MS;
    if (poll(&one, 1, 0) >= 0 && !(one.revents & (POLLHUP | POLLERR)))
        port.absent = 0;
}

static void send_answers(void) {
    size_t done = 0;
    if (port.out.failed)         /* no memory even for an error: the client has to sync again */
        clear(&port.out);
    while (done < port.out.length) {
        ssize_t count = write(port.fd, port.out.data + done, port.out.length - done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            break;
        done += (size_t)count;
    }
    if (done)
        consume(&port.out, done);
    if (!port.out.length && port.out.capacity > ANSWER_WAITING)
        clear(&port.out);        /* the memory of a large answer belongs to the guest again */
}

static void refuse_length(void) {
    answer_waiting(1);
    memset(&problem, 0, sizeof problem);
    size_t from = reply->length;
    fail("the request is longer than %d bytes", REQUEST_MAX);
    print(reply, "{\"return\": ");
    end_answer(from);
}

/* Handles the requests that are complete; whether it stopped before the last because the answers are too many. */
static int handle_requests(void) {
    size_t used = 0;
    int more = 1;
    while (more && port.out.length < ANSWER_WAITING) {
        char *start = port.in.data + used, *end = port.in.data + port.in.length, *at = start + port.scanned;
        while (at < end && *at != '\n' && *at != '\xff')
            at++;
        port.scanned = (size_t)(at - start);
        more = at < end;
        if (!more)
            break;
        if (*at == '\n' && !port.skipping) {
            if (port.scanned > REQUEST_MAX)
                refuse_length();
            else
                handle_line(start, port.scanned);
        }
        port.skipping = 0;
        used += port.scanned + 1;
        port.scanned = 0;
    }
    if (used)
        consume(&port.in, used);
    if (port.scanned > REQUEST_MAX) {
        if (!port.skipping)
            refuse_length();
        port.skipping = 1;
        port.in.length = port.scanned = 0;
    }
    if (!port.in.length && port.in.capacity > ANSWER_WAITING)
        clear(&port.in);
    return more;
}

static void take_requests(void) {
    for (int rounds = 0; rounds < 64 && port.out.length < ANSWER_WAITING; rounds++) {
        char *to = reserve(&port.in, 16384);
        if (!to) {
            port.in.failed = 0;
            port.in.length = port.scanned = 0;
            port.skipping = 1;
            return;
        }
        ssize_t count = read(port.fd, to, 16384);
        if (count < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (count <= 0) {
            lose_client();
            return;
        }
        port.in.length += (size_t)count;
        handle_requests();
        send_answers();
    }
}
