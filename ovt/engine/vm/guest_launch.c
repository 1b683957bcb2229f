/* Part of guest.c: starting a program as a user, in a directory, with variables and a terminal. */
enum { GROUPS = 64 };

enum terminal { NO_TERMINAL, ITS_OWN, THE_CONSOLE };

struct launch {
    char **arguments, **environment;
    const char *cwd, *user;
    int tty, rows, columns;
    enum terminal terminal;  /* what its input is to it */
    int stage, error;        /* what failed, if the program was not started */
};
enum { PREPARING, USER, DIRECTORY, PROGRAM };

struct user { uid_t uid; gid_t gid, groups[GROUPS]; int group_count; char home[256]; };

/* A user and group by name or number, as in `user`, `1000`, `user:group`, with all groups of /etc/group. */
static int find_user(const char *text, struct user *user) {
    char name[128], *end;
    if ((size_t)snprintf(name, sizeof name, "%s", text) >= sizeof name)
        return 0;
    char *group = strchr(name, ':');
    if (group)
        *group++ = 0;
    unsigned long number = strtoul(name, &end, 10);
    int numeric = isdigit((unsigned char)*name) && !*end && number < UINT32_MAX, found = numeric, group_found = !group;
    *user = (struct user){ .uid = numeric ? (uid_t)number : 0, .home = "/" };
    char *known = numeric ? NULL : name, entry_name[128] = "";
    FILE *file = fopen("/etc/passwd", "re");
    for (struct passwd *entry; file && (entry = fgetpwent(file));)
        if (known ? !strcmp(entry->pw_name, known) : entry->pw_uid == user->uid) {
            user->uid = entry->pw_uid;
            user->gid = entry->pw_gid;
            snprintf(user->home, sizeof user->home, "%s", entry->pw_dir);
            snprintf(entry_name, sizeof entry_name, "%s", entry->pw_name);
            found = 1;
            break;
        }
    if (file)
        fclose(file);
    unsigned long gid = group ? strtoul(group, &end, 10) : 0;
    if (group && isdigit((unsigned char)*group) && !*end && gid < UINT32_MAX) {
        user->gid = (gid_t)gid;
        group_found = 1;
    }
    file = fopen("/etc/group", "re");
    for (struct group *entry; file && (entry = fgetgrent(file));) {
        if (group && !group_found && !strcmp(entry->gr_name, group)) {
            user->gid = entry->gr_gid;
            group_found = 1;
        }
        for (char **other = entry->gr_mem; *entry_name && *other; other++)
            if (!strcmp(*other, entry_name) && user->group_count < GROUPS)
                user->groups[user->group_count++] = entry->gr_gid;
    }
    if (file)
        fclose(file);
    return found && group_found;
}

static int has_variable(char **environment, const char *name) {
    size_t length = strlen(name);
    for (; *environment; environment++)
        if (!strncmp(*environment, name, length) && (*environment)[length] == '=')
            return 1;
    return 0;
}

static void set_size(int terminal, int rows, int columns) {
    struct winsize size = { .ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns };
    if (rows > 0 && columns > 0)
        ioctl(terminal, TIOCSWINSZ, &size);
}

static void run(struct launch *launch, const struct user *user, const int fds[3], int report) {
    char home[sizeof user->home + 8];
    sigset_t none;
    sigemptyset(&none);
    signal(SIGPIPE, SIG_DFL);
    launch->stage = PREPARING;
    /* The console is the terminal of process 1. It would be hung up, and what it has not sent yet dropped, at the end
     * of a main program that led its session, so that is only its foreground. */
    if (launch->terminal == THE_CONSOLE ? setpgid(0, 0) || tcsetpgrp(fds[0], getpid()) : setsid() < 0)
        goto failed;
    sigprocmask(SIG_SETMASK, &none, NULL);       /* not before: SIGTTOU is among them */
    for (int i = 0; i < 3; i++)
        if (dup2(fds[i], i) < 0)
            goto failed;
    if (launch->terminal == ITS_OWN && ioctl(0, TIOCSCTTY, 1))
        goto failed;
    launch->stage = USER;
    if (launch->user && (setgroups((size_t)user->group_count, user->groups) || setgid(user->gid) || setuid(user->uid)))
        goto failed;
    launch->stage = DIRECTORY;
    if (chdir(launch->cwd ? launch->cwd : "/"))
        goto failed;
    launch->stage = PROGRAM;
    snprintf(home, sizeof home, "HOME=%s", user->home);
    /* Every array of variables has room for three more: a program without a PATH finds none of its own. */
    char **end = launch->environment;
    while (*end)
        end++;
    if (!has_variable(launch->environment, "PATH"))
        *end++ = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    if (!has_variable(launch->environment, "HOME"))
        *end++ = home;
    if (launch->tty && !has_variable(launch->environment, "TERM"))
        *end++ = "TERM=linux";
    *end = NULL;
    environ = launch->environment;
    execvp(launch->arguments[0], launch->arguments);
failed:
    launch->error = errno;
    if (write(report, launch, sizeof *launch) < 0)
        _exit(126);
    _exit(127);
}

/* Starts the program with these descriptors in a session of its own; 0 and launch->stage, error if it cannot. */
static pid_t start(struct launch *launch, const int fds[3]) {
    struct user user;
    struct launch failure;
    int report[2];
    /* Without a user it is root, who has a home too. */
    if (!find_user(launch->user ? launch->user : "0", &user)) {
        launch->stage = USER;
        launch->error = ENOENT;
        return 0;
    }
    if (launch->user && launch->terminal)
        fchown(fds[0], user.uid, (gid_t)-1);
    launch->stage = PREPARING;
    launch->error = 0;
    if (pipe2(report, O_CLOEXEC)) {
        launch->error = errno;
        return 0;
    }
    pid_t pid = fork();
    if (!pid)
        run(launch, &user, fds, report[1]);
    launch->error = pid < 0 ? errno : 0;
    close(report[1]);
    if (pid > 0 && read(report[0], &failure, sizeof failure) == sizeof failure) {
        launch->stage = failure.stage;
        launch->error = failure.error;
        waitpid(pid, NULL, 0);
    }
    close(report[0]);
    return launch->error ? 0 : pid;
}

static void fail_launch(const struct launch *launch) {
    static const char *const whats[] = {
        "cannot start", "no such user:", "cannot enter the directory", "cannot execute" };
    const char *which = launch->stage == USER && launch->user ? launch->user
        : launch->stage == DIRECTORY && launch->cwd ? launch->cwd : launch->arguments[0];
    fail_errno(launch->error, whats[launch->stage], which);
}

/* An array of the strings in a member, with `head` before and room for three and NULL behind. */
static char **strings_in(const struct node *arguments, const char *name, const char *head) {
    struct node *list = typed_member(arguments, name, ARRAY, "array of strings");
    size_t count = 0;
    for (struct node *node = first_of(list); node; node = next_of(node))
        count++;
    char **strings = calloc(count + 5, sizeof *strings), **end = strings;
    if (!strings) {
        fail("out of memory");
        return NULL;
    }
    if (head)
        *end++ = (char *)head;
    for (struct node *node = first_of(list); node; node = next_of(node)) {
        if (node->type != STRING)
            fail("Invalid parameter type for '%s', expected: array of strings", name);
        *end++ = (char *)node->text;
    }
    return strings;
}

static void read_launch(const struct node *arguments, struct launch *launch) {
    *launch = (struct launch){
        .arguments = strings_in(arguments, "arg", required_string(arguments, "path")),
        .environment = strings_in(arguments, "env", NULL),
        .cwd = string_in(arguments, "cwd"), .user = string_in(arguments, "user"), .tty = flag_in(arguments, "tty", 0),
        .rows = (int)number_in(arguments, "rows", 0, 0, 0xffff),
        .columns = (int)number_in(arguments, "cols", 0, 0, 0xffff) };
    launch->terminal = launch->tty ? ITS_OWN : NO_TERMINAL;
}

static void forget_launch(struct launch *launch) {
    free(launch->arguments);
    free(launch->environment);
}
