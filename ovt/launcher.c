/* ovt-runtime: the program that callers start. It becomes Python, or for the plain kind of `start` needs none.
 *
 * A `start` writes one byte into a FIFO; an interpreter for that would cost twenty times what it does. So this program
 * does by itself what lifecycle.start (ovt/engine/container/lifecycle.py) does when `create` has left the file `plain`:
 * there is a program to execute and no hook around it. Everything else, and all that is not as expected, it leaves to
 * `ovt-runtime.py` beside it, arguments and environment untouched; so it has no error of its own but that there is no
 * Python. What it takes for itself must end as it would there (tests/test_launcher.py does both).
 */
#pragma GCC diagnostic ignored "-Wunused-function"
#include "engine/freestanding.c"
#include <limits.h>

#define PYTHON "/usr/bin/python3"
#define SCRIPT "/ovt-runtime.py"
#define ROOT "/run/ovt" /* state.default_root */

struct request {
    const char *root, *log, *id;
};

static int is(const char *text, size_t n, const char *name) { /* the first n bytes of text are name */
    while (n && *name && *text == *name) text++, name++, n--;
    return !n && !*name;
}

static const char *variable(const char *name) {
    for (char **entry = environment; *entry; entry++) {
        const char *equals = find(*entry, '=', strlen(*entry));
        if (equals && is(*entry, equals - *entry, name)) return equals + 1;
    }
    return NULL;
}

/* The rule of state.check_id; it also keeps the name from being a path. */
static int is_id(const char *text) {
    if (!*text || *text == '.' || *text == '-' || strlen(text) > 1024) return 0;
    for (; *text; text++) {
        char letter = *text | 0x20;
        int good = (letter >= 'a' && letter <= 'z') || (*text >= '0' && *text <= '9');
        if (!good && *text != '_' && *text != '+' && *text != '-' && *text != '.') return 0;
    }
    return 1;
}

/* `[options] start ID` in the spellings that runtime.split takes; 0 for anything else, faulty options among it. */
static int parse(int argc, char **argv, struct request *request) {
    static const char *const values[] = {
        "root", "log", "log-format", "cgroup-manager", "rootless", "criu", "log-level",
    };
    int i = 1;
    for (; i < argc && argv[i][0] == '-'; i++) {
        const char *name = argv[i];
        while (*name == '-') name++;
        const char *value = find(name, '=', strlen(name));
        size_t n = value ? (size_t)(value - name) : strlen(name), which = 0;
        if (value) value++;
        if (is(name, n, "debug") || is(name, n, "systemd-cgroup")) {
            if (value && strcmp(value, "true") && strcmp(value, "1") && strcmp(value, "false") && strcmp(value, "0"))
                return 0;
            continue;
        }
        while (which < sizeof values / sizeof *values && !is(name, n, values[which])) which++;
        if (which == sizeof values / sizeof *values) return 0;
        if (!value && ++i == argc) return 0;
        if (!value) value = argv[i];
        if (which == 0) request->root = value;
        if (which == 1) request->log = value;
        if (which == 2 && strcmp(value, "text") && strcmp(value, "json")) return 0;
    }
    if (argc - i != 2 || strcmp(argv[i], "start") || !is_id(argv[i + 1])) return 0;
    request->id = argv[i + 1];
    if (!request->root || !*request->root) {
        const char *other = variable("XDG_RUNTIME_DIR_OVT");
        if (CALL3(geteuid, 0, 0, 0) || (other && *other)) return 0;
        request->root = ROOT;
    }
    return 1;
}

/* Returns 1 when the container's program runs. 0 leaves it to Python: the FIFO is there still, or the program could not
 * be executed and start.error says why. */
static int start(const struct request *request) {
    char path[PATH_MAX];
    struct stat status;
    size_t n = strlen(request->root), length = strlen(request->id);
    if (n + length + 2 > sizeof path) return 0;
    memcpy(path, request->root, n);
    path[n] = '/';
    memcpy(path + n + 1, request->id, length + 1);
    int directory = open_at(AT_FDCWD, path, O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
    if (directory < 0 || fstat(directory, &status) < 0 || status.st_mode & 022) return 0;
    if (status.st_uid && status.st_uid != (uid_t)CALL3(geteuid, 0, 0, 0)) return 0; /* another's: nothing in it counts */
    if (CALL(newfstatat, directory, "plain", &status, AT_SYMLINK_NOFOLLOW, 0, 0) < 0) return 0;
    struct pollfd fifo = { .fd = open_at(directory, "exec.fifo", O_WRONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC, 0) };
    if (fifo.fd < 0 || unlinkat(directory, "exec.fifo", 0) < 0) return 0; /* whoever unlinks it is the one who starts */
    signal_action(SIGPIPE, SIG_IGN); /* Python ignores it too, so nothing is to be undone should it be next */
    if (write(fifo.fd, "\1", 1) != 1) return 0;
    /* the reading end closes by itself when execve succeeds, and with the process when it fails */
    while (poll(&fifo, 1, -1) < 0)
        if (errno != EINTR) return 0;
    if (CALL(newfstatat, directory, "start.error", &status, 0, 0, 0) < 0) return errno == ENOENT; /* deleted by now */
    return status.st_size == 0;
}

/* One line on stderr, as every error of the runtime. */
static int fail(const char *what) {
    char line[PATH_MAX + 100];
    char *end = mempcpy(line, "ovt-runtime: ", 13);
    end = mempcpy(end, what, strlen(what));
    *end++ = '\n';
    return write(2, line, end - line) < 0 ? 126 : 127;
}

static int become_python(int argc, char **argv) {
    char script[PATH_MAX + sizeof SCRIPT];
    long n = CALL(readlinkat, AT_FDCWD, "/proc/self/exe", script, PATH_MAX, 0, 0);
    const char *slash = n > 0 ? find_last(script, '/', n) : NULL; /* also right for "… (deleted)" */
    if (!slash) return fail("cannot read /proc/self/exe (mount /proc)");
    memcpy(script + (slash - script), SCRIPT, sizeof SCRIPT);
    char *arguments[argc + 4];
    arguments[0] = PYTHON;
    arguments[1] = "-ISXutf8";
    arguments[2] = script;
    for (int i = 1; i < argc; i++) arguments[i + 2] = argv[i];
    arguments[argc < 1 ? 3 : argc + 2] = NULL;
    execv(PYTHON, arguments);
    return fail("cannot execute " PYTHON " (install Python 3.11 or newer there)");
}

/* Where the kernel's stack begins: argc, argv, NULL, the environment. */
__attribute__((used, noreturn)) void begin(long *stack) {
    int argc = stack[0];
    char **argv = (char **)(stack + 1);
    struct request request = { 0 };
    environment = argv + argc + 1;
    if (parse(argc, argv, &request) && !variable("NOTIFY_SOCKET")) {
        int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC;
        int log = request.log && *request.log ? open_at(AT_FDCWD, request.log, flags, 0600) : 0;
        if (log >= 0 && start(&request)) _exit(0);
    }
    _exit(become_python(argc, argv));
}
