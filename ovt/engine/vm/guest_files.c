/* Part of guest.c: commands on files (guest-file-*) and file systems (freezing, trimming, what there is). */
enum {
    HANDLES = 64,
    READ_DEFAULT = 4096, READ_MOST = 16 << 20,
    THAW_MS = 60000,
};

static struct { int fd; int64_t used; } handles[HANDLES];    /* used: a time, 0: free */
static int64_t thaw_at;          /* 0: nothing is frozen */

/* --- files --- */

static int find_handle(const struct node *arguments) {
    int64_t handle = required_number(arguments, "handle");
    if (!problem.set && handle > 0 && handle <= HANDLES && handles[handle - 1].used) {
        handles[handle - 1].used = now_ms();
        return handles[handle - 1].fd;
    }
    fail("handle '%lld' has not been found", (long long)handle);
    return -1;
}

static void file_open(const struct node *arguments) {
    static const struct { const char *mode; int flags; } modes[] = {
        { "r", O_RDONLY }, { "w", O_WRONLY | O_CREAT | O_TRUNC }, { "a", O_WRONLY | O_CREAT | O_APPEND },
        { "r+", O_RDWR }, { "w+", O_RDWR | O_CREAT | O_TRUNC }, { "a+", O_RDWR | O_CREAT | O_APPEND } };
    const char *path = required_string(arguments, "path"), *mode = string_in(arguments, "mode");
    char plain[4] = "r";
    int flags = -1, handle = 0;
    if (mode) {                  /* without the b that changes nothing */
        size_t length = 0;
        for (const char *at = mode; *at && length < sizeof plain - 1; at++)
            if (*at != 'b')
                plain[length++] = *at;
        plain[length] = 0;
    }
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        if (!strcmp(modes[i].mode, plain))
            flags = modes[i].flags;
    if (flags < 0)
        fail("invalid file open mode '%.20s'", mode);
    /* The one longest unused goes when there are too many: whoever opened it has died without closing it. */
    for (int i = 1; i < HANDLES; i++)
        if (handles[i].used < handles[handle].used)
            handle = i;
    if (problem.set)
        return;
    /* Without O_NONBLOCK, opening a FIFO would wait for its other end. */
    int fd = open(path, flags | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0666);
    if (fd < 0) {
        fail_errno(errno, "cannot open", path);
        return;
    }
    if (handles[handle].used)
        close(handles[handle].fd);
    handles[handle].fd = fd;
    handles[handle].used = now_ms();
    print(reply, "%d", handle + 1);
}

static void file_close(const struct node *arguments) {
    int fd = find_handle(arguments);
    if (problem.set)
        return;
    handles[required_number(arguments, "handle") - 1].used = 0;
    if (close(fd))
        fail_errno(errno, "cannot close", "the file");
    print(reply, "{}");
}

static void file_read(const struct node *arguments) {
    int fd = find_handle(arguments);
    size_t most = (size_t)number_in(arguments, "count", READ_DEFAULT, 0, READ_MOST), length = 0;
    struct stat status;
    if (problem.set)
        return;
    /* Reserve what a regular file has left, not what was asked for: callers ask for the most to be safe. */
    size_t room = most;
    off_t position = lseek(fd, 0, SEEK_CUR);
    if (!fstat(fd, &status) && S_ISREG(status.st_mode) && status.st_size >= position && position >= 0
        && (size_t)(status.st_size - position) < room && status.st_size > 0)
        room = (size_t)(status.st_size - position) + 1;
    if (room > most)
        room = most;
    char *data = malloc(room + 1);
    int ended = 0;
    while (data && length < room && !ended) {
        ssize_t count = read(fd, data + length, room - length);
        if (count < 0 && !length)
            fail_errno(errno, "cannot read", "the file");
        if (count < 0)
            break;
        ended = !count;
        length += (size_t)count;
    }
    if (!data)
        fail("out of memory");
    print(reply, "{\"count\": %zu, \"eof\": %s, \"buf-b64\": ", length, ended ? "true" : "false");
    put_base64(reply, data, length);
    print(reply, "}");
    free(data);
}

static void file_write(const struct node *arguments) {
    int fd = find_handle(arguments);
    const char *text = required_string(arguments, "buf-b64");
    struct buffer data = { 0 };
    if (!problem.set && !get_base64(&data, text))
        fail("Parameter 'buf-b64' is not base64");
    int64_t count = number_in(arguments, "count", (int64_t)data.length, 0, (int64_t)data.length), done = 0;
    while (!problem.set && done < count) {
        ssize_t some = write(fd, data.data + done, (size_t)(count - done));
        if (some < 0 && (!done || errno != EAGAIN))
            fail_errno(errno, "cannot write", "the file");
        if (some < 0)
            break;
        done += some;
    }
    print(reply, "{\"count\": %lld, \"eof\": false}", (long long)done);
    clear(&data);
}

static void file_seek(const struct node *arguments) {
    static const char *const names[] = { "set", "cur", "end" };
    int fd = find_handle(arguments), whence = -1;
    int64_t offset = required_number(arguments, "offset");
    struct node *node = member(arguments, "whence");
    for (int i = 0; node && i < 3; i++)
        if (node->type == STRING ? !strcmp(node->text, names[i]) : node->type == INTEGER && node->number == i)
            whence = i;
    if (whence < 0)
        fail("Parameter 'whence' must be set, cur or end");
    if (problem.set)
        return;
    off_t position = lseek(fd, offset, whence == 0 ? SEEK_SET : whence == 1 ? SEEK_CUR : SEEK_END);
    if (position < 0)
        fail_errno(errno, "cannot seek in", "the file");
    off_t end = position < 0 ? 0 : lseek(fd, 0, SEEK_END);
    lseek(fd, position, SEEK_SET);
    print(reply, "{\"position\": %lld, \"eof\": %s}", (long long)position, position >= end ? "true" : "false");
}

static void file_flush(const struct node *arguments) {
    int fd = find_handle(arguments);
    if (!problem.set && fsync(fd) && errno != EINVAL && errno != EROFS)
        fail_errno(errno, "cannot flush", "the file");
    print(reply, "{}");
}

/* --- file systems --- */

struct mount { char *source, *target, *type; unsigned major, minor; };

/* mountinfo writes spaces and the like as \040. */
static char *unescape(char *text) {
    char *to = text;
    for (char *from = text; *from; from++)
        if (from[0] == '\\' && from[1] >= '0' && from[1] <= '3' && from[2] && from[3]) {
            *to++ = (char)((from[1] - '0') << 6 | (from[2] - '0') << 3 | (from[3] - '0'));
            from += 3;
        } else {
            *to++ = *from;
        }
    *to = 0;
    return text;
}

/* Calls `visit` for every mount: `36 35 98:0 /root /target options optional… - type source options`. */
static void each_mount(void (*visit)(struct mount *, void *), void *context) {
    char *line = NULL;
    size_t size = 0;
    FILE *file = fopen("/proc/self/mountinfo", "re");
    while (file && getline(&line, &size, file) > 0) {
        struct mount mount;
        char *rest = strstr(line, " - "), *save;
        if (!rest)
            continue;
        *rest = 0;
        strtok_r(line, " ", &save);
        strtok_r(NULL, " ", &save);
        char *device = strtok_r(NULL, " ", &save), *colon = device ? strchr(device, ':') : NULL;
        mount.major = colon ? (unsigned)strtoul(device, NULL, 10) : 0;
        mount.minor = colon ? (unsigned)strtoul(colon + 1, NULL, 10) : 0;
        strtok_r(NULL, " ", &save);
        mount.target = strtok_r(NULL, " ", &save);
        mount.type = strtok_r(rest + 3, " ", &save);
        mount.source = strtok_r(NULL, " \n", &save);
        if (mount.target && mount.type && mount.source) {
            unescape(mount.target);
            unescape(mount.source);
            visit(&mount, context);
        }
    }
    free(line);
    if (file)
        fclose(file);
}

/* File systems on block devices; those of memory and of the kernel have major number 0, as have btrfs and shares. */
static int on_disk(const struct mount *mount) {
    return mount->major || !strcmp(mount->type, "btrfs");
}

struct sweep { unsigned long request; const struct node *only; int count; uint64_t done[64]; int done_count; };

static int chosen(const struct mount *mount, struct sweep *sweep) {
    uint64_t device = (uint64_t)mount->major << 32 | mount->minor;
    if (!on_disk(mount))
        return 0;
    for (int i = 0; i < sweep->done_count; i++)
        if (sweep->done[i] == device)
            return 0;
    int listed = !sweep->only;
    for (struct node *node = first_of(sweep->only); node; node = next_of(node))
        listed |= node->type == STRING && !strcmp(node->text, mount->target);
    if (listed && sweep->done_count < 64)
        sweep->done[sweep->done_count++] = device;
    return listed;
}

static void freeze_one(struct mount *mount, void *context) {
    struct sweep *sweep = context;
    if ((problem.set && sweep->request == FIFREEZE) || !chosen(mount, sweep))
        return;
    int fd = open(mount->target, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || ioctl(fd, sweep->request, 0)) {
        /* A read-only or foreign file system that cannot be frozen needs none of it; one frozen already is. */
        if (sweep->request == FIFREEZE && errno != EOPNOTSUPP && errno != EBUSY)
            fail_errno(errno, "cannot freeze", mount->target);
    } else {
        sweep->count++;
        while (sweep->request == FITHAW && !ioctl(fd, FITHAW, 0))
            ;                /* a file system may have been frozen more than once */
    }
    if (fd >= 0)
        close(fd);
}

static int thaw(void) {
    struct sweep sweep = { .request = FITHAW };
    each_mount(freeze_one, &sweep);
    thaw_at = 0;
    return sweep.count;
}

static void freeze(const struct node *arguments) {
    struct sweep sweep = { .request = FIFREEZE };
    sweep.only = typed_member(arguments, "mountpoints", ARRAY, "array of strings");
    if (problem.set)
        return;
    each_mount(freeze_one, &sweep);
    if (problem.set) {
        thaw();
        return;
    }
    /* The host that froze us may die before it thaws us, and a guest that cannot write for ever is as good as dead;
     * a snapshot, which is what this is for, takes less than a second. */
    thaw_at = now_ms() + THAW_MS;
    print(reply, "%d", sweep.count);
}

static void freeze_status(const struct node *arguments) {
    (void)arguments;
    print(reply, thaw_at ? "\"frozen\"" : "\"thawed\"");
}

static void thaw_command(const struct node *arguments) {
    (void)arguments;
    int count = thaw();
    print(reply, "%d", count);
}

static void trim_one(struct mount *mount, void *context) {
    struct sweep *sweep = context;
    if (!chosen(mount, sweep))
        return;
    struct fstrim_range range = { .len = UINT64_MAX };
    int fd = open(mount->target, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    int error = fd < 0 || ioctl(fd, FITRIM, &range) ? errno : 0;
    print(reply, "%s{", sweep->count++ ? ", " : "");
    put_member(reply, "path", mount->target);
    if (error) {
        print(reply, ", ");
        put_member(reply, "error", strerror(error));
        print(reply, "}");
    } else {
        print(reply, ", \"trimmed\": %llu, \"minimum\": %llu}",
              (unsigned long long)range.len, (unsigned long long)range.minlen);
    }
    if (fd >= 0)
        close(fd);
}

static void trim(const struct node *arguments) {
    (void)arguments;
    struct sweep sweep = { 0 };
    print(reply, "{\"paths\": [");
    each_mount(trim_one, &sweep);
    print(reply, "]}");
}

static void describe_mount(struct mount *mount, void *context) {
    size_t from = *(size_t *)context;
    struct statvfs space;
    char name[280] = "";
    int share = !strcmp(mount->type, "9p") || !strcmp(mount->type, "virtiofs") || !strcmp(mount->type, "nfs");
    if (!on_disk(mount) && !share)
        return;
    separate(reply, from);
    const char *slash = strrchr(mount->source, '/');
    snprintf(name, sizeof name, "%s", slash && slash[1] ? slash + 1 : mount->source);
    print(reply, "{");
    put_member(reply, "name", name);
    print(reply, ", ");
    put_member(reply, "mountpoint", mount->target);
    print(reply, ", ");
    put_member(reply, "type", mount->type);
    /* statvfs asks the server of a share, which may not answer. */
    if (!share && !statvfs(mount->target, &space))
        print(reply, ", \"used-bytes\": %llu, \"total-bytes\": %llu, \"total-bytes-privileged\": %llu",
              (unsigned long long)(space.f_blocks - space.f_bfree) * space.f_frsize,
              (unsigned long long)(space.f_blocks - space.f_bfree + space.f_bavail) * space.f_frsize,
              (unsigned long long)space.f_blocks * space.f_frsize);
    print(reply, ", \"disk\": []}");
}

static void get_fsinfo(const struct node *arguments) {
    (void)arguments;
    print(reply, "[");
    size_t from = reply->length;
    each_mount(describe_mount, &from);
    print(reply, "]");
}
