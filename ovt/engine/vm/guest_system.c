/* Part of guest.c: commands on the guest as a whole: names, times, addresses, processors, memory, users, identity. */

static int read_text(const char *path, char *text, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t count = fd < 0 ? -1 : read(fd, text, size - 1);
    if (fd >= 0)
        close(fd);
    text[count > 0 ? count : 0] = 0;
    text[strcspn(text, "\n")] = 0;
    return count > 0;
}

/* 0, or an error number. */
static int write_text(const char *path, const char *text, int flags) {
    int fd = open(path, O_WRONLY | O_CLOEXEC | flags, 0644), error = errno;
    if (fd < 0)
        return error;
    error = write(fd, text, strlen(text)) < 0 ? errno : 0;
    close(fd);
    return error;
}

/* --- names --- */

static void get_host_name(const struct node *arguments) {
    (void)arguments;
    struct utsname uts;
    uname(&uts);
    print(reply, "{");
    put_member(reply, "host-name", uts.nodename);
    print(reply, "}");
}

static void get_osinfo(const struct node *arguments) {
    (void)arguments;
    static const char *const keys[][2] = {
        { "ID", "id" }, { "NAME", "name" }, { "PRETTY_NAME", "pretty-name" }, { "VERSION", "version" },
        { "VERSION_ID", "version-id" }, { "VARIANT", "variant" }, { "VARIANT_ID", "variant-id" } };
    struct utsname uts;
    char line[512];
    FILE *file = fopen("/etc/os-release", "re");
    if (!file)
        file = fopen("/usr/lib/os-release", "re");
    uname(&uts);
    print(reply, "{");
    put_member(reply, "kernel-release", uts.release);
    print(reply, ", ");
    put_member(reply, "kernel-version", uts.version);
    print(reply, ", ");
    put_member(reply, "machine", uts.machine);
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *value = strchr(line, '=');
        if (!value)
            continue;
        *value++ = 0;
        size_t length = strlen(value);
        if (length > 1 && (*value == '"' || *value == '\'') && value[length - 1] == *value) {
            value[length - 1] = 0;
            value++;
        }
        for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
            if (!strcmp(line, keys[i][0])) {
                print(reply, ", ");
                put_member(reply, keys[i][1], value);
            }
    }
    if (file)
        fclose(file);
    print(reply, "}");
}

static void get_users(const struct node *arguments) {
    (void)arguments;
    struct utmpx entry;
    char user[sizeof entry.ut_user + 1];
    FILE *file = fopen("/run/utmp", "re");
    print(reply, "[");
    size_t from = reply->length;
    while (file && fread(&entry, sizeof entry, 1, file) == 1)
        if (entry.ut_type == USER_PROCESS) {
            separate(reply, from);
            snprintf(user, sizeof user, "%.*s", (int)sizeof entry.ut_user, entry.ut_user);
            print(reply, "{");
            put_member(reply, "user", user);
            print(reply, ", \"login-time\": %lld.%06lld}",
                  (long long)entry.ut_tv.tv_sec, (long long)entry.ut_tv.tv_usec);
        }
    print(reply, "]");
    if (file)
        fclose(file);
}

/* --- time --- */

static void get_time(const struct node *arguments) {
    (void)arguments;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    print(reply, "%lld", now.tv_sec * 1000000000LL + now.tv_nsec);
}

static void get_timezone(const struct node *arguments) {
    (void)arguments;
    time_t now = time(NULL);
    struct tm local;
    localtime_r(&now, &local);
    print(reply, "{");
    put_member(reply, "zone", local.tm_zone ? local.tm_zone : "UTC");
    print(reply, ", \"offset\": %ld}", local.tm_gmtoff);
}

/* Sets the clock to `time` (nanoseconds since 1970) and the hardware clock with it; without, from that clock. */
static void set_clock(const struct node *arguments) {
    int fd = open("/dev/rtc0", O_RDONLY | O_CLOEXEC);
    struct rtc_time hardware;
    struct tm broken = { 0 };
    struct timespec now = { 0 };
    if (member(arguments, "time")) {
        int64_t time = number_in(arguments, "time", 0, 0, INT64_MAX);
        now = (struct timespec){ time / 1000000000, time % 1000000000 };
    } else if (fd < 0 || ioctl(fd, RTC_RD_TIME, &hardware)) {
        fail_errno(errno, "cannot read", "/dev/rtc0");
    } else {
        broken = (struct tm){ .tm_sec = hardware.tm_sec, .tm_min = hardware.tm_min, .tm_hour = hardware.tm_hour,
                              .tm_mday = hardware.tm_mday, .tm_mon = hardware.tm_mon, .tm_year = hardware.tm_year };
        now.tv_sec = timegm(&broken);
    }
    if (!problem.set && clock_settime(CLOCK_REALTIME, &now))
        fail_errno(errno, "cannot set", "the clock");
    if (!problem.set && fd >= 0 && member(arguments, "time") && gmtime_r(&now.tv_sec, &broken)) {
        hardware = (struct rtc_time){ .tm_sec = broken.tm_sec, .tm_min = broken.tm_min, .tm_hour = broken.tm_hour,
                                      .tm_mday = broken.tm_mday, .tm_mon = broken.tm_mon, .tm_year = broken.tm_year };
        ioctl(fd, RTC_SET_TIME, &hardware);      /* a virtual machine may have none that can be set */
    }
    if (fd >= 0)
        close(fd);
}

static void set_time(const struct node *arguments) {
    set_clock(arguments);
    print(reply, "{}");
}

/* --- addresses --- */

static void put_addresses(const struct ifaddrs *list, const char *name) {
    print(reply, "[");
    size_t from = reply->length;
    for (const struct ifaddrs *entry = list; entry; entry = entry->ifa_next) {
        int family = entry->ifa_addr ? entry->ifa_addr->sa_family : AF_UNSPEC, prefix = 0;
        if (strcmp(entry->ifa_name, name) || (family != AF_INET && family != AF_INET6))
            continue;
        const void *address = family == AF_INET ? (void *)&((struct sockaddr_in *)entry->ifa_addr)->sin_addr
            : (void *)&((struct sockaddr_in6 *)entry->ifa_addr)->sin6_addr;
        const unsigned char *mask = family == AF_INET ? (void *)&((struct sockaddr_in *)entry->ifa_netmask)->sin_addr
            : (void *)&((struct sockaddr_in6 *)entry->ifa_netmask)->sin6_addr;
        char text[INET6_ADDRSTRLEN];
        for (int i = 0; entry->ifa_netmask && i < (family == AF_INET ? 4 : 16); i++)
            prefix += __builtin_popcount(mask[i]);
        separate(reply, from);
        print(reply, "{\"ip-address\": \"%s\", \"ip-address-type\": \"ipv%d\", \"prefix\": %d}",
              inet_ntop(family, address, text, sizeof text), family == AF_INET ? 4 : 6, prefix);
    }
    print(reply, "]");
}

static void get_interfaces(const struct node *arguments) {
    (void)arguments;
    struct ifaddrs *list;
    if (getifaddrs(&list)) {
        fail_errno(errno, "cannot list", "network interfaces");
        return;
    }
    print(reply, "[");
    size_t from = reply->length;
    for (const struct ifaddrs *entry = list; entry; entry = entry->ifa_next) {
        if (!entry->ifa_addr || entry->ifa_addr->sa_family != AF_PACKET)     /* there is one for each interface */
            continue;
        const struct sockaddr_ll *link = (void *)entry->ifa_addr;
        const struct rtnl_link_stats *stats = entry->ifa_data;
        separate(reply, from);
        print(reply, "{");
        put_member(reply, "name", entry->ifa_name);
        if (link->sll_halen == 6)
            print(reply, ", \"hardware-address\": \"%02x:%02x:%02x:%02x:%02x:%02x\"", link->sll_addr[0],
                  link->sll_addr[1], link->sll_addr[2], link->sll_addr[3], link->sll_addr[4], link->sll_addr[5]);
        print(reply, ", \"ip-addresses\": ");
        put_addresses(list, entry->ifa_name);
        if (stats) {
            print(reply, ", \"statistics\": {\"rx-bytes\": %u, \"rx-packets\": %u, \"rx-errs\": %u, \"rx-dropped\": %u",
                  stats->rx_bytes, stats->rx_packets, stats->rx_errors, stats->rx_dropped);
            print(reply, ", \"tx-bytes\": %u, \"tx-packets\": %u, \"tx-errs\": %u, \"tx-dropped\": %u}",
                  stats->tx_bytes, stats->tx_packets, stats->tx_errors, stats->tx_dropped);
        }
        print(reply, "}");
    }
    print(reply, "]");
    freeifaddrs(list);
}

/* --- processors and memory --- */

static int compare_numbers(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

/* The numbers N of the entries NAME<N> of a directory, sorted; how many. */
static int numbered(const char *directory, const char *name, int *numbers, int most) {
    DIR *dir = opendir(directory);
    int count = 0;
    for (struct dirent *entry; dir && count < most && (entry = readdir(dir));) {
        size_t length = strlen(name);
        if (!strncmp(entry->d_name, name, length) && isdigit((unsigned char)entry->d_name[length]))
            numbers[count++] = atoi(entry->d_name + length);
    }
    if (dir)
        closedir(dir);
    qsort(numbers, (size_t)count, sizeof *numbers, compare_numbers);
    return count;
}

/* Processors and memory blocks are told and switched alike: by the file `online` of their directory, or by no such
 * file where the thing cannot be taken away. */
struct kind { const char *directory, *name, *id; };
static const struct kind cpus = { "/sys/devices/system/cpu", "cpu", "logical-id" };
static const struct kind blocks = { "/sys/devices/system/memory", "memory", "phys-index" };
static int numbers[8192];

static void list_kind(const struct kind *kind) {
    int count = numbered(kind->directory, kind->name, numbers, sizeof numbers / sizeof *numbers);
    print(reply, "[");
    for (int i = 0; i < count; i++) {
        char path[96], text[8];
        snprintf(path, sizeof path, "%s/%s%d/online", kind->directory, kind->name, numbers[i]);
        int can = read_text(path, text, sizeof text);
        print(reply, "%s{\"%s\": %d, \"online\": %s, \"can-offline\": %s}", i ? ", " : "", kind->id, numbers[i],
              !can || *text == '1' ? "true" : "false", can ? "true" : "false");
    }
    print(reply, "]");
}

/* 0, or an error number; ENOENT: there is no such thing. */
static int switch_one(const struct kind *kind, int64_t number, int online) {
    char path[96], text[8];
    snprintf(path, sizeof path, "%s/%s%lld", kind->directory, kind->name, (long long)number);
    if (number < 0 || access(path, F_OK))
        return ENOENT;
    strcat(path, "/online");
    if (!read_text(path, text, sizeof text))
        return online ? 0 : EOPNOTSUPP;
    return (*text == '1') == online ? 0 : write_text(path, online ? "1" : "0", 0);
}

static void get_vcpus(const struct node *arguments) { (void)arguments; list_kind(&cpus); }
static void get_memory_blocks(const struct node *arguments) { (void)arguments; list_kind(&blocks); }

/* The protocol answers how many were done, and an error only when the first failed. */
static void set_vcpus(const struct node *arguments) {
    int done = 0;
    struct node *node = first_of(typed_member(arguments, "vcpus", ARRAY, "array"));
    for (; node; node = next_of(node), done++) {
        int64_t number = required_number(node, "logical-id");
        int online = flag_in(node, "online", 0), error = problem.set ? 0 : switch_one(&cpus, number, online);
        if (!problem.set && error) {
            fail("cannot switch processor %lld: %s", (long long)number, strerror(error));
            problem.number = error;
        }
        if (problem.set)
            break;
    }
    if (done)
        problem.set = 0;
    print(reply, "%d", done);
}

static void set_memory_blocks(const struct node *arguments) {
    print(reply, "[");
    size_t from = reply->length;
    struct node *node = first_of(typed_member(arguments, "mem-blks", ARRAY, "array"));
    for (; node; node = next_of(node)) {
        int64_t number = required_number(node, "phys-index");
        int online = flag_in(node, "online", 0);
        if (problem.set)
            return;
        int error = switch_one(&blocks, number, online);
        separate(reply, from);
        print(reply, "{\"phys-index\": %lld, \"response\": \"%s\"", (long long)number,
              !error ? "success" : error == ENOENT ? "not-found"
              : error == EOPNOTSUPP ? "operation-not-supported" : "operation-failed");
        print(reply, error && error != ENOENT && error != EOPNOTSUPP ? ", \"error-code\": %d}" : "}", error);
    }
    print(reply, "]");
}

static void get_memory_block_info(const struct node *arguments) {
    (void)arguments;
    char text[32];
    if (!read_text("/sys/devices/system/memory/block_size_bytes", text, sizeof text))
        fail("this kernel cannot switch memory");
    print(reply, "{\"size\": %llu}", strtoull(text, NULL, 16));
}

static void suspend(const struct node *arguments) {
    (void)arguments;
    char text[64];
    read_text("/sys/power/state", text, sizeof text);
    if (!strstr(text, "mem")) {
        fail("this guest cannot be suspended to memory");
        return;
    }
    no_reply = 1;
    /* Not from here: this process then goes on the moment the guest wakes, whatever became of the attempt. */
    if (!fork()) {
        write_text("/sys/power/state", "mem", 0);
        _exit(0);
    }
}

/* --- identity --- */

static int parse_mac(const char *text, unsigned char mac[6]) {
    char *end = (char *)text;
    for (int i = 0; i < 6; i++, text = end + 1) {
        unsigned long byte = strtoul(text, &end, 16);
        if (end - text != 2 || !isxdigit((unsigned char)*text) || *end != (i < 5 ? ':' : 0))
            return 0;
        mac[i] = (unsigned char)byte;
    }
    return !(mac[0] & 1);        /* the address of a group is nobody's */
}

static int set_mac(const char *name, const unsigned char mac[6]) {
    struct ifreq request = { 0 };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), error;
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    error = ioctl(fd, SIOCGIFFLAGS, &request) ? errno : 0;
    short flags = request.ifr_flags;
    request.ifr_flags &= (short)~IFF_UP;
    if (!error && ioctl(fd, SIOCSIFFLAGS, &request))
        error = errno;
    request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    memcpy(request.ifr_hwaddr.sa_data, mac, 6);
    if (!error && ioctl(fd, SIOCSIFHWADDR, &request))
        error = errno;
    request.ifr_flags = flags;
    if (flags & IFF_UP)
        ioctl(fd, SIOCSIFFLAGS, &request);
    close(fd);
    return error;
}

static void add_entropy(const struct buffer *bytes) {
    struct { struct rand_pool_info info; unsigned char data[512]; } pool;
    size_t length = bytes->length < sizeof pool.data ? bytes->length : sizeof pool.data;
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    pool.info.entropy_count = (int)length * 8;
    pool.info.buf_size = (int)length;
    memcpy(pool.info.buf, bytes->data, length);
    /* A clone has its origin's random state: until this is done, both would make the same keys. */
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) || ioctl(fd, RNDRESEEDCRNG))
        fail_errno(errno, "cannot seed", "/dev/urandom");
    explicit_bzero(&pool, sizeof pool);
    if (fd >= 0)
        close(fd);
}

/* Makes a clone another machine than its origin. Everything is checked before anything is changed. */
static void ovt_identity(const struct node *arguments) {
    const char *name = string_in(arguments, "hostname"), *id = string_in(arguments, "machine-id");
    const char *mac_text = string_in(arguments, "mac"), *nic = string_in(arguments, "interface");
    const char *seed = string_in(arguments, "entropy");
    struct buffer bytes = { 0 };
    unsigned char mac[6];
    char line[80];
    if (!nic)
        nic = "eth0";
    if (name && (!*name || strlen(name) > 64))
        fail("Parameter 'hostname' must have 1 to 64 bytes");
    if (id && (strlen(id) != 32 || strspn(id, "0123456789abcdef") != 32))
        fail("Parameter 'machine-id' must be 32 hexadecimal digits in lower case");
    if (mac_text && !parse_mac(mac_text, mac))
        fail("Parameter 'mac' must be the address of one card, such as 52:54:00:12:34:56");
    if (strlen(nic) >= IFNAMSIZ)
        fail("Parameter 'interface' is too long");
    if (seed && !get_base64(&bytes, seed))
        fail("Parameter 'entropy' is not base64");
    number_in(arguments, "time", 0, 0, INT64_MAX);
    if (!problem.set && bytes.length)
        add_entropy(&bytes);
    if (!problem.set && member(arguments, "time"))
        set_clock(arguments);
    if (!problem.set && name) {
        if (sethostname(name, strlen(name)))
            fail_errno(errno, "cannot set the host name", name);
        snprintf(line, sizeof line, "%s\n", name);
        write_text("/etc/hostname", line, O_CREAT | O_TRUNC);
    }
    if (!problem.set && id) {
        snprintf(line, sizeof line, "%s\n", id);
        int error = write_text("/etc/machine-id", line, O_CREAT | O_TRUNC);
        if (error)
            fail_errno(error, "cannot write", "/etc/machine-id");
    }
    int error = !problem.set && mac_text ? set_mac(nic, mac) : 0;
    if (error)
        fail_errno(error, "cannot set the address of", nic);
    else if (!problem.set && mac_text)
        start_dhcp(nic);
    clear(&bytes);
    print(reply, "{}");
}
