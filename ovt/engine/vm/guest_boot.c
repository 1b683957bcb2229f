/* Part of guest.c: what only process 1 does: mounts, modules, cards, the main program, the power button, the end.
 *
 * Nothing here is fatal, for there is nobody to tell but the console: what cannot be done is left out, and the main
 * program shows what it misses. A share is the exception: a program must not run without the data it was given.
 */
enum {
    CARDS = 32, BUTTONS = 16, SHARES = 64,
    STOP_MS = 10000,         /* from SIGTERM to SIGKILL for the main program when the power button is pressed */
    END_MS = 2000,           /* the same for what runs besides, when the machine goes off */
    SYNC_MS = 10000,         /* the longest that a share or disk may take to become clean then */
    EXIT_PORT_MS = 2000,     /* the longest wait for the port that takes the exit status */
    FAILED = 125, NOT_EXECUTABLE = 126, NOT_FOUND = 127,
};
enum ending { NOT_ENDING, POWERDOWN, REBOOT, HALT };

static struct { char name[IFNAMSIZ]; int index; pid_t dhcp; } cards[CARDS];
static struct { char name[16]; int fd; } buttons[BUTTONS];
static struct {
    char **arguments, **environment, *shares[SHARES];
    const char *cwd, *user, *hostname;
    int argument_count, environment_count, share_count, tty, rows, columns, powers_off;
} main_program;
static enum ending ending;
static int64_t kill_at;
static int uevents = -1, exit_port = -1;

/* --- the file system --- */

static int make_directories(const char *path) {
    char part[512];
    for (const char *slash = path; slash && *slash;) {
        slash = strchr(slash + 1, '/');
        snprintf(part, sizeof part, "%.*s", slash ? (int)(slash - path) : (int)strlen(path), path);
        if (mkdir(part, 0755) && errno != EEXIST)
            return 0;
    }
    return 1;
}

static void mount_system(void) {
    static const struct { const char *type, *target, *options; unsigned long flags; } mounts[] = {
        { "proc", "/proc", "", MS_NOSUID | MS_NODEV | MS_NOEXEC },
        { "sysfs", "/sys", "", MS_NOSUID | MS_NODEV | MS_NOEXEC },
        { "devtmpfs", "/dev", "mode=0755", MS_NOSUID },
        { "devpts", "/dev/pts", "mode=0620,gid=5,ptmxmode=0666", MS_NOSUID | MS_NOEXEC },
        { "tmpfs", "/dev/shm", "mode=1777", MS_NOSUID | MS_NODEV },
        { "tmpfs", "/run", "mode=0755", MS_NOSUID | MS_NODEV },
        { "tmpfs", "/tmp", "mode=1777", MS_NOSUID | MS_NODEV },
        { "cgroup2", "/sys/fs/cgroup", "", MS_NOSUID | MS_NODEV | MS_NOEXEC } };
    static const char *const links[][2] = {
        { "/proc/self/fd", "/dev/fd" }, { "fd/0", "/dev/stdin" },
        { "fd/1", "/dev/stdout" }, { "fd/2", "/dev/stderr" } };
    for (size_t i = 0; i < sizeof mounts / sizeof *mounts; i++) {
        make_directories(mounts[i].target);
        if (mount(mounts[i].type, mounts[i].target, mounts[i].type, mounts[i].flags, mounts[i].options))
            step("cannot mount %s on %s: %s", mounts[i].type, mounts[i].target, strerror(errno));
    }
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        if (symlink(links[i][0], links[i][1]))
            step("cannot make %s: %s", links[i][1], strerror(errno));
}

/* One path a line, what others need before them. */
static void load_modules(const char *list) {
    char line[512];
    FILE *file = fopen(list, "re");
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        int fd = *line ? open(line, O_RDONLY | O_CLOEXEC) : -1;
        if (*line && (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)))
            step("module %s: %s", line, strerror(errno));
        close_fd(&fd);
    }
    if (file)
        fclose(file);
}

/* Whether there is a PCI device for mass storage (class 01), but for the AHCI that the machine always has. */
static int has_disks(void) {
    int found = 0;
    DIR *devices = opendir("/sys/bus/pci/devices");
    for (struct dirent *entry; devices && (entry = readdir(devices));) {
        char path[320], class[16];
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/class", entry->d_name);
        if (read_text(path, class, sizeof class))
            found |= !strncmp(class, "0x01", 4) && strncmp(class, "0x0106", 6);
    }
    if (devices)
        closedir(devices);
    return found;
}

/* TAG:TARGET[:OPTIONS]; 9p, or virtiofs where the options have that word or no 9p device has the tag. */
static int mount_share(char *share) {
    static const struct { const char *word; unsigned long set, clear; } flags[] = {
        { "ro", MS_RDONLY, 0 }, { "rw", 0, MS_RDONLY }, { "nosuid", MS_NOSUID, 0 }, { "nodev", MS_NODEV, 0 },
        { "noexec", MS_NOEXEC, 0 }, { "noatime", MS_NOATIME, 0 } };
    char data[256] = "", nine[512], *target = strchr(share, ':'), *options = strrchr(share, ':'), *save;
    unsigned long set = 0;
    int virtiofs = 0;
    if (!target || target[1] != '/') {
        say("the share %s is not TAG:TARGET:OPTIONS", share);
        return 0;
    }
    if (options != target)
        *options++ = 0;
    else
        options = NULL;
    *target++ = 0;
    for (char *word = options ? strtok_r(options, ",", &save) : NULL; word; word = strtok_r(NULL, ",", &save)) {
        int known = !strcmp(word, "virtiofs");
        virtiofs |= known;
        for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
            if (!strcmp(word, flags[i].word)) {
                set = (set | flags[i].set) & ~flags[i].clear;
                known = 1;
            }
        if (!known && strlen(data) + strlen(word) + 2 < sizeof data)
            sprintf(data + strlen(data), "%s%s", *data ? "," : "", word);
    }
    make_directories(target);
    snprintf(nine, sizeof nine, "trans=virtio,version=9p2000.L,msize=262144%s%s", *data ? "," : "", data);
    if (!virtiofs && !mount(share, target, "9p", set, nine))
        return 1;
    int error = errno;
    if ((virtiofs || error == ENOENT || error == ENODEV) && !mount(share, target, "virtiofs", set, data))
        return 1;
    say("cannot mount the share %s on %s: %s", share, target, strerror(virtiofs ? errno : error));
    return 0;
}

/* --- network cards --- */

static int card_flags(const char *name, short flags) {
    struct ifreq request = { 0 };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    int failed = ioctl(fd, SIOCGIFFLAGS, &request);
    request.ifr_flags |= flags;
    failed = failed || ioctl(fd, SIOCSIFFLAGS, &request);
    close(fd);
    return !failed;
}

/* What busybox's udhcpc calls with an event and the lease as variables; an image may bring /ovt/udhcpc instead.
 * Of several cards the one found first is the way out. A gateway outside the card's own network, as with a netmask of
 * 32 bits, needs a route of its own. */
#define DHCP_SCRIPT "/run/ovt-udhcpc"
static const char dhcp_script[] =
    "#!/bin/sh\n"
    "case \"$1\" in\n"
    "deconfig)\n"
    /* only what an earlier lease has put there: the program may have given it an address of its own */
    "    [ ! -e \"/run/ovt-lease.$interface\" ] || ip addr flush dev \"$interface\"\n"
    "    ip link set dev \"$interface\" up\n"
    "    ;;\n"
    "bound | renew)\n"
    "    : > \"/run/ovt-lease.$interface\"\n"
    "    ifconfig $interface $ip ${subnet:+netmask $subnet} ${broadcast:+broadcast $broadcast} ${mtu:+mtu $mtu}\n"
    "    metric=$(cat \"/sys/class/net/$interface/ifindex\")\n"
    "    for gateway in $router; do\n"
    "        ip route replace \"$gateway/32\" dev \"$interface\" metric \"$metric\"\n"
    "        ip route replace default via \"$gateway\" dev \"$interface\" metric \"$metric\"\n"
    "        metric=$((metric + 1000))\n"
    "    done\n"
    "    if [ -n \"$dns\" ]; then\n"
    "        {\n"
    "            [ -z \"$domain\" ] || echo \"search $domain\"\n"
    "            for server in $dns; do echo \"nameserver $server\"; done\n"
    "        } > \"/etc/resolv.conf.$interface\"\n"
    "        mv \"/etc/resolv.conf.$interface\" /etc/resolv.conf\n"
    "    fi\n"
    "    ;;\n"
    "esac\n";

/* The client stays and renews the lease: on a real network an address that is not renewed goes to somebody else. */
static void start_dhcp(const char *name) {
    char host[80] = "hostname:";
    const char *script = access("/ovt/udhcpc", X_OK) ? DHCP_SCRIPT : "/ovt/udhcpc";
    const char *arguments[] = { "udhcpc", "-f", "-t", "5", "-T", "1", "-A", "5", "-i", name, "-s", script, "-x", host,
                                NULL };
    int card = 0;
    while (card < CARDS && strcmp(cards[card].name, name))
        card++;
    if (gethostname(host + 9, sizeof host - 10))
        step("no host name: %s", strerror(errno));
    if (access(script, X_OK) && (write_text(script, dhcp_script, O_CREAT | O_TRUNC) || chmod(script, 0755)))
        step("cannot write %s: %s", script, strerror(errno));
    if (card == CARDS || access("/bin/busybox", X_OK)) {
        step("no DHCP for %s", name);
        return;
    }
    if (cards[card].dhcp)
        kill(cards[card].dhcp, SIGTERM);
    pid_t pid = fork();
    if (!pid) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        setsid();
        int null = open("/dev/null", O_RDWR);
        for (int i = 0; i < 3; i++)
            dup2(debug && i && console >= 0 ? console : null, i);
        execve("/bin/busybox", (char **)arguments,
               (char *[]){ "PATH=/bin:/sbin:/usr/bin:/usr/sbin", NULL });
        _exit(127);
    }
    cards[card].dhcp = pid > 0 ? pid : 0;
}

/* Brings up every Ethernet card that is new; bridges and the like, which somebody made, have no device. */
static void scan_cards(void) {
    DIR *dir = opendir("/sys/class/net");
    for (int i = 0; i < CARDS; i++)
        if (*cards[i].name && (int)if_nametoindex(cards[i].name) != cards[i].index) {
            if (cards[i].dhcp)
                kill(cards[i].dhcp, SIGTERM);
            *cards[i].name = 0;
        }
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        char path[300], type[16];
        int free_card = -1, known = 0;
        for (int i = CARDS; i--;) {
            known |= !strcmp(cards[i].name, entry->d_name);
            if (!*cards[i].name)
                free_card = i;
        }
        snprintf(path, sizeof path, "/sys/class/net/%s/device", entry->d_name);
        if (known || free_card < 0 || strlen(entry->d_name) >= IFNAMSIZ || access(path, F_OK))
            continue;
        snprintf(path, sizeof path, "/sys/class/net/%s/type", entry->d_name);
        if (!read_text(path, type, sizeof type) || atoi(type) != ARPHRD_ETHER)
            continue;
        strcpy(cards[free_card].name, entry->d_name);
        cards[free_card].index = (int)if_nametoindex(entry->d_name);
        cards[free_card].dhcp = 0;
        if (!card_flags(entry->d_name, IFF_UP))
            step("cannot bring up %s: %s", entry->d_name, strerror(errno));
        start_dhcp(entry->d_name);
    }
    if (dir)
        closedir(dir);
}

/* --- devices that come --- */

static void scan_ports(void) {
    DIR *dir = opendir("/sys/class/virtio-ports");
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        char path[300], name[64];
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        if (*entry->d_name == '.' || !read_text(path, name, sizeof name))
            continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        if (!strcmp(name, "org.qemu.guest_agent.0") && port.fd < 0)
            open_port(open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK));
        else if (!strcmp(name, "org.ovt.exit.0") && exit_port < 0)
            exit_port = open(path, O_WRONLY | O_CLOEXEC | O_NONBLOCK);
    }
    if (dir)
        closedir(dir);
}

static void scan_buttons(void) {
    DIR *dir = opendir("/dev/input");
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        char path[300];
        unsigned long keys[(KEY_MAX + 64) / 64] = { 0 };
        int slot = -1;
        for (int i = BUTTONS; i--;)
            if (buttons[i].fd < 0)
                slot = i;
        for (int i = 0; i < BUTTONS; i++)
            if (buttons[i].fd >= 0 && !strcmp(buttons[i].name, entry->d_name))
                slot = -1;
        if (slot < 0 || strncmp(entry->d_name, "event", 5) || strlen(entry->d_name) >= sizeof buttons[slot].name)
            continue;
        snprintf(path, sizeof path, "/dev/input/%s", entry->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd >= 0 && ioctl(fd, EVIOCGBIT(EV_KEY, sizeof keys), keys) >= 0
            && keys[KEY_POWER / 64] >> KEY_POWER % 64 & 1) {
            strcpy(buttons[slot].name, entry->d_name);
            buttons[slot].fd = fd;
        } else if (fd >= 0) {
            close(fd);
        }
    }
    if (dir)
        closedir(dir);
}

static void open_uevents(void) {
    struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = 1 };
    uevents = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
    if (uevents >= 0 && bind(uevents, (void *)&address, sizeof address))
        close_fd(&uevents);
}

/* `add@/devices/…` and then NAME=value, each with its NUL. New processors come switched off. */
static void take_uevents(void) {
    char text[8192], path[600];
    ssize_t length;
    while ((length = recv(uevents, text, sizeof text - 1, 0)) > 0) {
        const char *device = strchr(text, '@');
        text[length] = 0;
        if (!strncmp(text, "add@/devices/system/cpu/cpu", 27) && device) {
            snprintf(path, sizeof path, "/sys%s/online", device + 1);
            write_text(path, "1", 0);
        }
    }
    /* Looking is cheap, and it also finds what a lost message would have told. */
    scan_ports();
    scan_buttons();
    scan_cards();
}

/* --- the main program --- */

static void read_main(void) {
    struct stat status;
    int fd = open("/ovt/main", O_RDONLY | O_CLOEXEC), entries = 0;
    if (fd < 0 || fstat(fd, &status) || status.st_size > 1 << 22) {
        close_fd(&fd);
        return;
    }
    char *text = calloc(1, (size_t)status.st_size + 1);
    ssize_t length = text ? read(fd, text, (size_t)status.st_size) : 0;
    close(fd);
    /* Its variables may be secrets, and programs of other users run here too. */
    unlink("/ovt/main");
    for (ssize_t i = 0; i < length; i++)
        entries += !text[i];
    main_program.arguments = calloc((size_t)entries + 5, sizeof(char *));
    main_program.environment = calloc((size_t)entries + 5, sizeof(char *));
    if (!main_program.arguments || !main_program.environment)
        return;
    for (char *at = text, *value; at < text + length; at = value + strlen(value) + 1) {
        if (!(value = strchr(at, '='))) {
            value = at;
            continue;
        }
        *value++ = 0;
        if (!strcmp(at, "arg")) main_program.arguments[main_program.argument_count++] = value;
        else if (!strcmp(at, "env")) main_program.environment[main_program.environment_count++] = value;
        else if (!strcmp(at, "share") && main_program.share_count < SHARES)
            main_program.shares[main_program.share_count++] = value;
        else if (!strcmp(at, "cwd")) main_program.cwd = value;
        else if (!strcmp(at, "user") && *value) main_program.user = value;
        else if (!strcmp(at, "hostname")) main_program.hostname = value;
        else if (!strcmp(at, "tty")) main_program.tty = atoi(value);
        else if (!strcmp(at, "rows")) main_program.rows = atoi(value);
        else if (!strcmp(at, "cols")) main_program.columns = atoi(value);
        else if (!strcmp(at, "poweroff")) main_program.powers_off = atoi(value);
        else step("/ovt/main: unknown entry %s", at);
    }
}

/* Without a terminal the bytes of the output pass unchanged and input is not echoed; it still comes by lines of up to
 * 4095 bytes, with ^D at the start of one as its end, because a serial line has no other end. */
static void set_console(int tty) {
    struct termios mode;
    if (tcgetattr(console, &mode))
        return;
    if (tty) {
        mode.c_iflag = ICRNL | IXON | BRKINT | IUTF8;
        mode.c_oflag = OPOST | ONLCR;
        mode.c_lflag = ISIG | ICANON | ECHO | ECHOE | ECHOK | ECHOCTL | ECHOKE | IEXTEN;
        static const unsigned char keys[] = {
            [VINTR] = 3, [VQUIT] = 28, [VERASE] = 127, [VKILL] = 21, [VEOF] = 4, [VSTART] = 17, [VSTOP] = 19,
            [VSUSP] = 26, [VREPRINT] = 18, [VWERASE] = 23, [VLNEXT] = 22 };
        memcpy(mode.c_cc, keys, sizeof keys);
    } else {
        mode.c_iflag = 0;
        mode.c_oflag = 0;
        mode.c_lflag = ICANON;
        memset(mode.c_cc, 0, sizeof mode.c_cc);
        mode.c_cc[VEOF] = 4;
    }
    mode.c_cc[VMIN] = 1;
    mode.c_cflag |= CLOCAL | CREAD;
    tcsetattr(console, TCSANOW, &mode);
}

/* The device behind /dev/console, so that `tty` says its name and programs can open it again. */
static void open_console(void) {
    char path[80] = "/dev/", active[64];
    if (read_text("/sys/class/tty/console/active", active, sizeof active)) {
        char *last = strrchr(active, ' ');
        strcat(path, last ? last + 1 : active);
        console = open(path, O_RDWR | O_CLOEXEC | O_NOCTTY);
    }
    if (console < 0)
        console = open("/dev/console", O_RDWR | O_CLOEXEC | O_NOCTTY);
    if (console < 0)
        console = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (isatty(console) && ioctl(console, TIOCSCTTY, 1))
        step("the console is nobody's terminal: %s", strerror(errno));
}

/* The pid, or the exit status that stands for what went wrong, negative. */
static int start_main(struct launch *launch) {
    int fds[3] = { console, console, console };
    set_console(launch->tty);
    set_size(console, launch->rows, launch->columns);
    launch->terminal = isatty(console) ? THE_CONSOLE : NO_TERMINAL;
    return (main_pid = start(launch, fds)) ? main_pid
        : launch->stage == PROGRAM && launch->error == ENOENT ? -NOT_FOUND : -NOT_EXECUTABLE;
}
