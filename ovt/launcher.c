/* ovt-runtime: the program that callers start. It becomes Python, or for a plain `start` or `delete` needs none.
 *
 * A `start` writes one byte into a FIFO, a `delete` removes a dozen directory entries; an interpreter for that would
 * cost twenty times what it does. So this program does by itself what lifecycle.start and lifecycle.delete do
 * (ovt/engine/container/lifecycle.py) where `create` has said by the file `plain` that there is no more to it (plain.py
 * beside that). Everything else, and all that is not as expected, it leaves to `ovt-runtime.py` beside it, arguments
 * and environment untouched; so it has no error of its own but that there is no Python. What it takes for itself must
 * end as it would there (tests/test_launcher.py does both).
 */
#pragma GCC diagnostic ignored "-Wunused-function"
#include "engine/freestanding.c"
#include <limits.h>

#define PYTHON "/usr/bin/python3"
#define SCRIPT "/ovt-runtime.py"
#define ROOT "/run/ovt" /* state.default_root */

struct request {
    int (*verb)(const struct request *);
    const char *root, *log, *id;
    char path[PATH_MAX]; /* ROOT/ID */
};

/* in the order of their removal: the record goes last */
static const char *const FILES[] = { "plain", "exec.fifo", "exec.json", "start.error", "state.json" };
enum { N_FILES = sizeof FILES / sizeof *FILES };

static int start(const struct request *request);
static int delete(const struct request *request);

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

/* `[options] start ID` and `[options] delete [--force] ID` in the spellings that runtime.split takes; 0 for anything
 * else, faulty options among it. */
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
    if (argc - i == 2 && !strcmp(argv[i], "start") && !variable("NOTIFY_SOCKET")) request->verb = start;
    else if (argc - i >= 2 && !strcmp(argv[i], "delete")) request->verb = delete;
    else return 0;
    i++;
    /* what is left to be deleted here has ended, so that force makes no difference */
    if (request->verb == delete && argc - i == 2 && (!strcmp(argv[i], "--force") || !strcmp(argv[i], "-f"))) i++;
    if (argc - i != 1 || !is_id(argv[i])) return 0;
    request->id = argv[i];
    if (!request->root || !*request->root) {
        /* the root of a user namespace may be a normal user, whose containers are elsewhere: Python finds out */
        const char *other = variable("XDG_RUNTIME_DIR");
        if (CALL3(geteuid, 0, 0, 0) || (other && *other)) return 0;
        request->root = ROOT;
    }
    size_t n = strlen(request->root), length = strlen(request->id);
    if (n + length + 2 > sizeof request->path) return 0;
    char *end = mempcpy(request->path, request->root, n);
    *end = '/';
    memcpy(end + 1, request->id, length + 1);
    return 1;
}

/* The state directory; -1 when there is none or it is another's, where nothing counts. */
static int open_state(const struct request *request) {
    struct stat status;
    int directory = open_at(AT_FDCWD, request->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    if (directory < 0 || fstat(directory, &status) < 0 || status.st_mode & 022) return -1;
    return !status.st_uid || status.st_uid == (uid_t)CALL3(geteuid, 0, 0, 0) ? directory : -1;
}

/* Returns 1 when the container's program runs. 0 leaves it to Python: the FIFO is there still, or the program could not
 * be executed and start.error says why. */
static int start(const struct request *request) {
    struct stat status;
    int directory = open_state(request);
    if (directory < 0 || CALL(newfstatat, directory, "plain", &status, AT_SYMLINK_NOFOLLOW, 0, 0) < 0) return 0;
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

/* `facts` is "PID STARTED": whether that process has ended. Its number may be another's by now (procfs.alive). */
static int has_ended(const char *facts) {
    char path[64] = "/proc/", text[1024];
    const char *space = find(facts, ' ', strlen(facts));
    if (!space || space - facts > 20) return 0;
    memcpy(mempcpy(path + 6, facts, space - facts), "/stat", 6);
    int fd = open_at(AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0) return errno == ENOENT;
    ssize_t n = read(fd, text, sizeof text - 1);
    if (n < 0) return errno == ESRCH;
    text[n] = 0;
    const char *field = find_last(text, ')', n); /* the name before it may hold anything, also ")" */
    if (!field || n - (field - text) < 3) return 0;
    field += 2; /* the third: the state */
    if (*field == 'Z' || *field == 'X') return 1;
    for (int i = 3; i < 22; i++) {
        field = find(field, ' ', strlen(field));
        if (!field) return 0;
        field++;
    }
    const char *end = find(field, ' ', strlen(field));
    return end && !is(field, end - field, space + 1);
}

/* Whether the record is there, and nothing that this program does not know. */
static int holds_only_files(int directory) {
    struct entry { uint64_t inode, offset; uint16_t length; uint8_t type; char name[]; };
    _Alignas(struct entry) char entries[4096];
    long n = CALL3(getdents64, directory, entries, sizeof entries);
    int record = 0;
    for (long at = 0; at < n;) {
        const struct entry *entry = (const struct entry *)(entries + at);
        int i = 0;
        while (i < N_FILES && strcmp(entry->name, FILES[i])) i++;
        if (i == N_FILES && strcmp(entry->name, ".") && strcmp(entry->name, "..")) return 0;
        record |= i == N_FILES - 1;
        at += entry->length;
    }
    return record && CALL3(getdents64, directory, entries, sizeof entries) == 0;
}

/* Returns 1 when the container is gone. 0 leaves it, or what is left of it, to Python, which can begin anew at any
 * point. `plain` holds "PID STARTED" and the cgroups to remove, each with a NUL at its end. */
static int delete(const struct request *request) {
    char facts[8192];
    int directory = open_state(request);
    int plain = directory < 0 ? -1 : open_at(directory, "plain", O_RDONLY | O_NOFOLLOW | O_CLOEXEC, 0);
    ssize_t n = plain < 0 ? 0 : read(plain, facts, sizeof facts);
    if (n <= 0 || n == sizeof facts || facts[n - 1] || !has_ended(facts) || !holds_only_files(directory)) return 0;
    for (const char *cgroup = facts + strlen(facts) + 1; cgroup < facts + n; cgroup += strlen(cgroup) + 1)
        if (unlinkat(AT_FDCWD, cgroup, AT_REMOVEDIR) < 0 && errno != ENOENT) return 0; /* somebody is in it */
    for (int i = 0; i < N_FILES; i++)
        if (unlinkat(directory, FILES[i], 0) < 0 && errno != ENOENT) return 0;
    return unlinkat(AT_FDCWD, request->path, AT_REMOVEDIR) == 0;
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
    if (parse(argc, argv, &request)) {
        int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC;
        int log = request.log && *request.log ? open_at(AT_FDCWD, request.log, flags, 0600) : 0;
        if (log >= 0 && request.verb(&request)) _exit(0);
    }
    _exit(become_python(argc, argv));
}
