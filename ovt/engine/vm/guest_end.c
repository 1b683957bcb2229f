/* Part of guest.c: the end of the main program and of the machine. */

static struct { char *targets[SHARES]; int count; } to_unmount;

static void note_mount(struct mount *mount, void *context) {
    (void)context;
    int share = !strcmp(mount->type, "9p") || !strcmp(mount->type, "virtiofs");
    if ((on_disk(mount) || share) && to_unmount.count < SHARES)
        to_unmount.targets[to_unmount.count++] = strdup(mount->target);
}

/* Reaps until no process is left or the time is over; whether none is left. */
static int reap_all(int64_t milliseconds) {
    for (int64_t end = now_ms() + milliseconds; now_ms() < end; poll(NULL, 0, 10)) {
        pid_t pid;
        while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
            ;
        if (pid < 0)
            return 1;
    }
    return 0;
}

/* Writes to a port or line that may not take anything; gives up in the end. */
static void write_patiently(int fd, const char *text, int64_t milliseconds) {
    size_t done = 0, length = strlen(text);
    for (int64_t end = now_ms() + milliseconds; fd >= 0 && done < length && now_ms() < end;) {
        ssize_t count = write(fd, text + done, length - done);
        if (count > 0)
            done += (size_t)count;
        else
            poll(NULL, 0, 10);
    }
}

static void write_exit_status(int code) {
    char text[16];
    for (int64_t end = now_ms() + EXIT_PORT_MS; exit_port < 0 && now_ms() < end; poll(NULL, 0, 10))
        scan_ports();
    snprintf(text, sizeof text, "%d\n", code);
    write_patiently(exit_port, text, EXIT_PORT_MS);
}

/* Ends everything that runs, writes everything that is dirty, and switches off; `code` < 0: no exit status to tell. */
__attribute__((noreturn))
static void finish(enum ending how, int code) {
    int left = 0;
    step("the end, exit status %d", code);
    if (thaw_at)
        thaw();
    if (code >= 0 && how != REBOOT)      /* it will be started once more */
        write_exit_status(code);
    kill(-1, SIGTERM);
    kill(-1, SIGCONT);       /* a stopped program does not end on SIGTERM */
    if (!reap_all(END_MS)) {
        kill(-1, SIGKILL);
        reap_all(END_MS);
    }
    for (int64_t end = now_ms() + END_MS; console >= 0 && !ioctl(console, TIOCOUTQ, &left) && left && now_ms() < end;)
        poll(NULL, 0, 5);
    /* In a process of its own: a share whose server is gone holds whoever asks it. */
    if (!fork()) {
        sync();
        each_mount(note_mount, NULL);
        while (to_unmount.count--)
            umount2(to_unmount.targets[to_unmount.count], 0);
        _exit(0);
    }
    reap_all(SYNC_MS);
    /* The console is the program's: the kernel's own last line is not part of its output. */
    if (!debug)
        write_text("/proc/sys/kernel/printk", "0", 0);
    reboot(how == REBOOT ? RB_AUTOBOOT : how == HALT ? RB_HALT_SYSTEM : RB_POWER_OFF);
    for (;;)
        pause();
}

static void main_ended(int code) {
    main_pid = 0;
    if (ending || main_program.powers_off)
        finish(ending ? ending : POWERDOWN, code);
    write_exit_status(code);
}

/* The power button and its like: the main program may end by itself, then everything does. */
static void request_end(enum ending how) {
    if (ending)
        return;
    if (!main_pid)
        finish(how, -1);
    ending = how;
    kill_at = now_ms() + STOP_MS;
    kill(main_pid, SIGTERM);
    /* An interactive shell ignores SIGTERM; losing its terminal is how it is told to go. */
    if (main_program.tty)
        kill(main_pid, SIGHUP);
    kill(main_pid, SIGCONT);
}

static void press_button(int fd) {
    struct input_event event;
    int pressed = 0;
    while (read(fd, &event, sizeof event) == sizeof event)
        pressed |= event.type == EV_KEY && event.code == KEY_POWER && event.value == 1;
    if (pressed)
        request_end(POWERDOWN);
}

/* The commands that end the machine are answered by its end alone, as the protocol has it. */
static void shutdown_command(const struct node *arguments) {
    const char *mode = string_in(arguments, "mode");
    enum ending how = !mode || !strcmp(mode, "powerdown") ? POWERDOWN : !strcmp(mode, "reboot") ? REBOOT
        : !strcmp(mode, "halt") ? HALT : NOT_ENDING;
    if (!how)
        fail("mode is invalid (valid values are: halt|powerdown|reboot)");
    if (problem.set)
        return;
    no_reply = 1;
    request_end(how);
}

/* Starts the main program later than at boot: what a fork of a template does. */
static void ovt_main(const struct node *arguments) {
    struct launch launch;
    int powers_off = flag_in(arguments, "poweroff", 1);
    read_launch(arguments, &launch);
    if (main_pid)
        fail("the main program runs already, as PID %d", (int)main_pid);
    if (ending)
        fail("the machine is going off");
    if (!problem.set) {
        main_program.tty = launch.tty;
        main_program.powers_off = powers_off;
        if (start_main(&launch) < 0)
            fail_launch(&launch);
        else
            print(reply, "{\"pid\": %d}", (int)main_pid);
    }
    forget_launch(&launch);
}

static void boot_main(void) {
    set_console(main_program.tty);
    for (int i = 0; i < main_program.share_count; i++)
        if (!mount_share(main_program.shares[i]) && main_program.argument_count)
            finish(POWERDOWN, FAILED);
    if (!main_program.argument_count)
        return;
    struct launch launch = {
        .arguments = main_program.arguments, .environment = main_program.environment, .cwd = main_program.cwd,
        .user = main_program.user, .tty = main_program.tty,
        .rows = main_program.rows, .columns = main_program.columns };
    int pid = start_main(&launch);
    if (pid > 0)
        return;
    if (launch.stage == PROGRAM && launch.error == ENOENT)
        say("%s: not found", launch.arguments[0]);
    else if (launch.stage == PROGRAM)
        say("%s: %s", launch.arguments[0], strerror(launch.error));
    else if (launch.stage == USER)
        say("no such user: %s", launch.user);
    else
        say("%s: %s", launch.stage == DIRECTORY && launch.cwd ? launch.cwd : "the console", strerror(launch.error));
    main_ended(-pid);
}
